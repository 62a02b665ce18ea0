// Cross-entropy of logits z (N, C) against mixed targets that are never made, t = target, p the permutation:
//   lse_i  = log sum_c exp(z_ic)
//   loss_i = lse_i - (1 - eps) (lam_i z_i,t(i) + (1 - lam_i) z_i,t(p(i))) - eps / C sum_c z_ic
//   grad_ic = g_i (exp(z_ic - lse_i) - eps / C - (1 - eps) (lam_i [c = t(i)] + (1 - lam_i) [c = t(p(i))]))
// Tiling: a thread takes whole rows; a row is read twice forward, the second time from the cache while the next row
//   comes into it, as the exponentials take about as long as the memory.
// Traffic: forward reads N C, backward reads N C and writes N C elements.
// Numerics: exponentials and lane sums in acc_t, lse and loss in double, one rounding of the gradient.
#include "mixup_cross_entropy.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "huge_pages.h"
#include "mixing_math.h"
#include "permutation.h"
#include "rows.h"

namespace ssl_kernels::cpu {
namespace {

constexpr const char* kOp = "mixup_cross_entropy";

// For each row the two classes of its target and their weights; a class of weight 0 counts nothing.
struct Terms {
  int64_t classes[2];
  double weights[2];
};

template <class T>
class MixedTarget {
 public:
  MixedTarget(const at::Tensor& target, const at::Tensor& permutation, const at::Tensor& lam, int64_t classes,
              double label_smoothing)
      : partner_(checked_permutation(kOp, permutation)),
        lam_(checked_lam<T>(kOp, lam)),
        target_(target.const_data_ptr<int64_t>()),
        stride_(target.stride(0)),
        kept_(1 - label_smoothing) {
    for (int64_t i = 0; i < target.size(0); ++i)
      TORCH_CHECK_VALUE(at(i) >= 0 && at(i) < classes, kOp, ": target must be in 0 to ", classes - 1, ", got ", at(i),
                        " at ", i);
  }

  Terms operator[](int64_t i) const {
    return {{at(i), at(partner_[i])}, {kept_ * lam_[i], kept_ * (T(1) - lam_[i])}};
  }

 private:
  int64_t at(int64_t i) const { return target_[i * stride_]; }

  std::vector<int64_t> partner_;
  std::vector<T> lam_;
  const int64_t* target_;
  int64_t stride_;
  double kept_;
};

at::Tensor with_consecutive_classes(const at::Tensor& logits) {
  return logits.size(1) == 1 || logits.stride(1) == 1 ? logits : logits.contiguous();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> mixup_cross_entropy_fwd(const at::Tensor& logits, const at::Tensor& target,
                                                           const at::Tensor& permutation, const at::Tensor& lam,
                                                           double label_smoothing) {
  return SSL_KERNELS_DISPATCH(logits.scalar_type(), kOp, [&] {
    const int64_t n = logits.size(0), classes = logits.size(1);
    const MixedTarget<acc_t> mixed_target(target, permutation, lam, classes, label_smoothing);
    const at::Tensor z = with_consecutive_classes(logits);
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
        double expected = label_smoothing == 0 ? 0 : label_smoothing / classes * sums.total;
        for (int k = 0; k < 2; ++k)
          if (terms.weights[k] != 0) expected += terms.weights[k] * static_cast<double>(row[terms.classes[k]]);
        losses[i] = lses[i] - expected;
      }
    });
    return std::make_tuple(loss, lse);
  });
}

at::Tensor mixup_cross_entropy_bwd(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                                   const at::Tensor& permutation, const at::Tensor& lam, const at::Tensor& lse,
                                   double label_smoothing) {
  return SSL_KERNELS_DISPATCH(logits.scalar_type(), kOp, [&] {
    const int64_t n = logits.size(0), classes = logits.size(1);
    const MixedTarget<acc_t> mixed_target(target, permutation, lam, classes, label_smoothing);
    const at::Tensor z = with_consecutive_classes(logits);
    at::Tensor grad = in_huge_pages(at::empty({n, classes}, logits.options()));
    const scalar_t* in = z.const_data_ptr<scalar_t>();
    const double* weights = grad_loss.const_data_ptr<double>();
    const double* lses = lse.const_data_ptr<double>();
    scalar_t* out = grad.mutable_data_ptr<scalar_t>();
    const auto& math = cross_entropy_math<scalar_t>();
    at::parallel_for(0, n, rows_per_task(classes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* row = in + i * z.stride(0);
        const double g = weights[i * grad_loss.stride(0)];
        // lse is rounded to acc_t; the factor e^lost makes up for it.
        const acc_t shift = static_cast<acc_t>(lses[i]);
        const double lost = double(shift) - lses[i];
        const acc_t weight = static_cast<acc_t>(g * (1 + lost + lost * lost / 2));
        const acc_t offset = static_cast<acc_t>(g * label_smoothing / classes);
        math.gradient(out + i * classes, row, shift, weight, offset, classes);
        const Terms terms = mixed_target[i];
        for (int64_t c : terms.classes) {
          double value = double(weight) * std::exp(static_cast<acc_t>(row[c]) - shift) - offset;
          for (int k = 0; k < 2; ++k)
            if (terms.classes[k] == c) value -= g * terms.weights[k];
          out[i * classes + c] = static_cast<scalar_t>(static_cast<acc_t>(value));
        }
      }
    });
    return grad;
  });
}

}  // namespace ssl_kernels::cpu
