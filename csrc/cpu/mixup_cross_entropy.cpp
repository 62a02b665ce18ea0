// Cross-entropy of logits z (N, C) against mixed targets that are never made. For t the target, t' the
// partner's, w the classes' weights (1 without), [t] whether a class is none to ignore:
//   lse_i  = log sum_c exp(z_ic)
//   a_i = (1 - eps) lam_i [t_i] w_t,  b_i = (1 - eps) (1 - lam_i) [t'_i] w_t',  s_i = eps / C (lam_i [t_i] +
//   (1 - lam_i) [t'_i]) loss_i = m_i lse_i - a_i z_i,t - b_i z_i,t' - s_i sum_c w_c z_ic,  m_i = a_i + b_i +
//   s_i sum_c w_c grad_ic = g_i (m_i exp(z_ic - lse_i) - s_i w_c - a_i [c = t] - b_i [c = t'])
//   counted_i = lam_i [t_i] w_t + (1 - lam_i) [t'_i] w_t'
// Tiling: a thread takes whole rows; a row is read twice forward, the second time from the cache while the
//   next row comes into it, as the exponentials take about as long as the memory. With weights and smoothing
//   a third time.
// Traffic: forward reads N C, backward reads N C and writes N C elements.
// Numerics: exponentials and lane sums in acc_t, lse and loss in double, one rounding of the gradient.
//   Without weights m_i is 1 exactly where both classes count.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "../ops/mixing.h"
#include "huge_pages.h"
#include "mixing_math.h"
#include "permutation.h"
#include "rows.h"

namespace ssl_kernels::cpu {
namespace {

constexpr const char* kOp = "mixup_cross_entropy";

using OptionalTensor = std::optional<at::Tensor>;

struct CrossEntropyOptions {
  double label_smoothing;
  int64_t ignore_index;
  bool partner_is_class;  // `partner` holds the partners' classes, not a permutation
};

struct CrossEntropyRows {
  at::Tensor loss, lse;  // (N,) double
  double counted;        // the rows' weights in the mean, added up
};

// What a row's loss is made of; a term of weight 0 counts nothing, whatever its logit is.
struct Terms {
  int64_t classes[2];
  double weights[2];  // a and b
  double present;     // the shares of the classes that are none to ignore, added up
  double spread;      // s
  double mass;        // m
  double counted;     // the row's weight in the mean

  bool count() const { return weights[0] != 0 || weights[1] != 0 || spread != 0; }
};

template <class T>
class MixedTarget {
 public:
  MixedTarget(const at::Tensor& target, const at::Tensor& partner, const at::Tensor& lam,
              const at::Tensor& weight, int64_t classes, const CrossEntropyOptions& options)
      : lam_(checked_lam<T>(kOp, lam)),
        target_(checked_classes("target", target, classes, options.ignore_index)),
        class_weights_(weight.defined() ? weight.const_data_ptr<T>() : nullptr),
        ignore_index_(options.ignore_index),
        kept_(1 - options.label_smoothing),
        smoothing_(options.label_smoothing / classes) {
    if (options.partner_is_class) {
      partner_ = checked_classes("partner_target", partner, classes, ignore_index_);
    } else {
      partner_ = checked_permutation(kOp, partner);
      for (int64_t& p : partner_) p = target_[p];
    }
    if (smoothed_weights())
      for (int64_t c = 0; c < classes; ++c) weight_sum_ += class_weights_[c];
  }

  Terms operator[](int64_t i) const {
    Terms terms = {{target_[i], partner_[i]}, {}, 0, 0, 0, 0};
    const T shares[2] = {lam_[i], T(1) - lam_[i]};
    for (int k = 0; k < 2; ++k) {
      if (terms.classes[k] == ignore_index_) {
        terms.classes[k] = 0;
        continue;
      }
      const double weight = class_weights_ ? class_weights_[terms.classes[k]] : 1.;
      terms.weights[k] = kept_ * shares[k] * weight;
      terms.counted += shares[k] * weight;
      terms.present += shares[k];
    }
    const bool both = target_[i] != ignore_index_ && partner_[i] != ignore_index_;
    if (both) terms.present = 1;
    if (!class_weights_) terms.counted = terms.present;
    terms.spread = smoothing_ * terms.present;
    terms.mass = terms.present;
    if (class_weights_)
      terms.mass = kept_ * terms.counted + (terms.spread != 0 ? terms.spread * weight_sum_ : 0);
    return terms;
  }

  // The weights by which smoothing multiplies the classes, or null where they are 1 or nothing is smoothed.
  const T* smoothed_weights() const { return smoothing_ != 0 ? class_weights_ : nullptr; }

 private:
  static std::vector<int64_t> checked_classes(const char* name, const at::Tensor& target, int64_t classes,
                                              int64_t ignore_index) {
    const int64_t* values = target.const_data_ptr<int64_t>();
    std::vector<int64_t> result(target.size(0));
    for (int64_t i = 0; i < target.size(0); ++i) {
      const int64_t t = values[i * target.stride(0)];
      TORCH_CHECK_VALUE(t == ignore_index || (t >= 0 && t < classes), kOp, ": ", name, " must be in [0, ",
                        classes, "), got ", t, " at ", i);
      result[i] = t;
    }
    return result;
  }

  std::vector<T> lam_;
  std::vector<int64_t> target_, partner_;  // classes
  const T* class_weights_;
  double weight_sum_ = 0;
  int64_t ignore_index_;
  double kept_, smoothing_;
};

CrossEntropyRows losses_of_rows(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& partner,
                                const at::Tensor& lam, const at::Tensor& weight,
                                const CrossEntropyOptions& options) {
  return SSL_KERNELS_DISPATCH(logits.scalar_type(), kOp, [&] {
    const int64_t n = logits.size(0), classes = logits.size(1);
    const at::Tensor class_weights = weight.defined() ? weight.contiguous() : weight;
    const MixedTarget<acc_t> mixed_target(target, partner, lam, class_weights, classes, options);
    const acc_t* smoothed = mixed_target.smoothed_weights();
    const at::Tensor z = with_neighbours(logits);
    const auto doubles = logits.options().dtype(at::kDouble);
    at::Tensor loss = at::empty({n}, doubles), lse = at::empty({n}, doubles);
    const scalar_t* in = z.const_data_ptr<scalar_t>();
    double* losses = loss.mutable_data_ptr<double>();
    double* lses = lse.mutable_data_ptr<double>();
    const auto& math = cross_entropy_math<scalar_t>();
    at::parallel_for(0, n, rows_per_task(classes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* row = in + i * z.stride(0);
        const auto sums = math.sums(row, classes, i + 1 < end ? row + z.stride(0) : row);
        const Terms terms = mixed_target[i];
        lses[i] = double(sums.top) + std::log(sums.exp_total);
        double expected = 0;
        if (terms.spread != 0)
          expected = terms.spread * (smoothed ? math.weighted_total(row, smoothed, classes) : sums.total);
        for (int k = 0; k < 2; ++k)
          if (terms.weights[k] != 0)
            expected += terms.weights[k] * static_cast<double>(row[terms.classes[k]]);
        losses[i] = (terms.mass != 0 ? terms.mass * lses[i] : 0) - expected;
      }
    });
    double counted = 0;
    for (int64_t i = 0; i < n; ++i) counted += mixed_target[i].counted;
    return CrossEntropyRows{loss, lse, counted};
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mixup_cross_entropy_fwd(
    const at::Tensor& logits, const at::Tensor& target, const at::Tensor& partner, const at::Tensor& lam,
    const OptionalTensor& weight, double label_smoothing, int64_t ignore_index, bool partner_is_class,
    std::string_view reduction) {
  check_mixup_cross_entropy(logits, target, partner, lam, weight);
  const auto [rows, lse, counted] =
      losses_of_rows(logits, target, partner, lam, weight.value_or(at::Tensor()),
                     {label_smoothing, ignore_index, partner_is_class});
  const bool is_mean = reduction == "mean";
  const at::Tensor loss = reduction == "none" ? rows.to(lam.scalar_type()) : at::sum(rows, lam.scalar_type());
  const at::Tensor total = is_mean ? at::empty({}, lam.options()) : at::empty({0}, lam.options());
  if (is_mean) {  // by hand: an operation on one number takes longer than the rows of a small batch
    AT_DISPATCH_FLOATING_TYPES(lam.scalar_type(), kOp, [&] {
      *total.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(counted);
      *loss.mutable_data_ptr<scalar_t>() /= static_cast<scalar_t>(counted);
    });
  }
  return {loss, lse, total};
}

at::Tensor mixup_cross_entropy_bwd(const at::Tensor& grad_loss, const at::Tensor& logits,
                                   const at::Tensor& target, const at::Tensor& partner, const at::Tensor& lam,
                                   const OptionalTensor& weight, const at::Tensor& lse,
                                   double label_smoothing, int64_t ignore_index, bool partner_is_class) {
  check_mixup_cross_entropy(logits, target, partner, lam, weight);
  check_row_numbers("grad_loss", grad_loss, logits);
  check_row_numbers("lse", lse, logits);
  TORCH_CHECK(lse.is_contiguous(), kOp, ": lse must be what mixup_cross_entropy_fwd returned");
  return SSL_KERNELS_DISPATCH(logits.scalar_type(), kOp, [&] {
    const int64_t n = logits.size(0), classes = logits.size(1);
    const at::Tensor class_weights = weight ? weight->contiguous() : at::Tensor();
    const MixedTarget<acc_t> mixed_target(target, partner, lam, class_weights, classes,
                                          {label_smoothing, ignore_index, partner_is_class});
    const acc_t* smoothed = mixed_target.smoothed_weights();
    const at::Tensor z = with_neighbours(logits);
    at::Tensor grad = in_huge_pages(at::empty({n, classes}, logits.options()));
    const scalar_t* in = z.const_data_ptr<scalar_t>();
    const double* row_grads = grad_loss.const_data_ptr<double>();
    const double* lses = lse.const_data_ptr<double>();
    scalar_t* out = grad.mutable_data_ptr<scalar_t>();
    const auto& math = cross_entropy_math<scalar_t>();
    at::parallel_for(0, n, rows_per_task(classes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* row = in + i * z.stride(0);
        const Terms terms = mixed_target[i];
        if (!terms.count()) {
          std::fill_n(out + i * classes, classes, scalar_t(0));
          continue;
        }
        const double g = row_grads[i * grad_loss.stride(0)];
        // lse is rounded to acc_t; the factor e^lost makes up for it.
        const acc_t shift = static_cast<acc_t>(lses[i]);
        const double lost = double(shift) - lses[i];
        const acc_t factor = static_cast<acc_t>(g * terms.mass * (1 + lost + lost * lost / 2));
        const acc_t offset = static_cast<acc_t>(g * label_smoothing / classes * terms.present);
        if (smoothed)
          math.weighted_gradient(out + i * classes, row, shift, factor, offset, smoothed, classes);
        else
          math.gradient(out + i * classes, row, shift, factor, offset, classes);
        for (int64_t c : terms.classes) {
          double value = double(factor) * std::exp(static_cast<acc_t>(row[c]) - shift);
          value -= smoothed ? double(offset) * smoothed[c] : offset;
          for (int k = 0; k < 2; ++k)
            if (terms.classes[k] == c) value -= g * terms.weights[k];
          out[i * classes + c] = static_cast<scalar_t>(static_cast<acc_t>(value));
        }
      }
    });
    return grad;
  });
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("mixup_cross_entropy_fwd.native", &mixup_cross_entropy_fwd);
  library.impl("mixup_cross_entropy_bwd.native", &mixup_cross_entropy_bwd);
}

}  // namespace
}  // namespace ssl_kernels::cpu
