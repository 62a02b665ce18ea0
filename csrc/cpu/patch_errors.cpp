// patch_errors on the CPU, of patches x_p and targets t_p with C numbers each:
//   mean_p, var_p = mean and variance over C - 1 of t_p      r_p = 1 / sqrt(var_p + eps)
//   e_p = x_p - r_p (t_p - mean_p)      loss_p = |e_p|^2 / C      dx_p = 2 / C g_p e_p
//   without `normalize` r_p = 1 and mean_p = 0.
// Tiling: threads share the patches; a patch and its target are scratch in acc_t, in the first-level cache.
// Traffic: forward reads both once and writes three numbers a patch, backward reads both once and writes dx. Patches with
//   g_p = 0, as those that a mask leaves out, are written as 0 and not read.
// Numerics: sums in lanes of acc_t, the squares of what is left after the mean was subtracted.
#include "patch_errors.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cmath>
#include <vector>

#include "rows.h"

namespace ssl_kernels::cpu {
namespace {

using at::Tensor;

Tensor with_neighbours(const Tensor& rows) { return rows.size(1) == 1 || rows.stride(1) == 1 ? rows : rows.contiguous(); }

// Errors of one patch after the other, made in scratch.
template <class scalar_t, class target_t, class acc_t>
class Errors {
 public:
  Errors(const Tensor& prediction, const Tensor& target)
      : prediction_(with_neighbours(prediction)),
        target_(with_neighbours(target)),
        width_(prediction.size(1)),
        ones_(width_, acc_t(1)) {}

  struct Moments {
    acc_t mean, rstd;
  };

  Moments load_measured(acc_t* t, int64_t p, double eps) const {
    read_target(t, p);
    acc_t total;
    tile_math<acc_t>().sums(t, width_, 1, width_, &total, nullptr);
    const acc_t mean = total / static_cast<acc_t>(width_);
    tile_math<acc_t>().add_scaled(t, ones_.data(), -mean, width_);
    const double variance = tile_math<acc_t>().dot(t, t, width_) / static_cast<double>(width_ - 1);
    return {mean, static_cast<acc_t>(1 / std::sqrt(variance + eps))};
  }

  void load_target(acc_t* t, int64_t p, acc_t mean) const {
    read_target(t, p);
    tile_math<acc_t>().add_scaled(t, ones_.data(), -mean, width_);
  }

  void read_target(acc_t* t, int64_t p) const {
    row_conversion<target_t, acc_t>().load(t, target_.const_data_ptr<target_t>() + p * target_.stride(0), width_);
  }

  void subtract_from_prediction(acc_t* x, const acc_t* t, acc_t rstd, int64_t p) const {
    row_conversion<scalar_t, acc_t>().load(x, prediction_.const_data_ptr<scalar_t>() + p * prediction_.stride(0), width_);
    tile_math<acc_t>().add_scaled(x, t, -rstd, width_);
  }

 private:
  Tensor prediction_, target_;
  int64_t width_;
  std::vector<acc_t> ones_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> patch_errors_fwd(const Tensor& prediction, const Tensor& target, double eps,
                                                    bool normalize) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t n = prediction.size(0), c = prediction.size(1);
  return SSL_KERNELS_DISPATCH(prediction.scalar_type(), "patch_errors", [&] {
    const auto acc = prediction.options().dtype(c10::CppTypeToScalarType<acc_t>::value);
    const Tensor losses = at::empty({n}, acc);
    const at::DimVector kept = normalize ? at::DimVector({n, 1}) : at::DimVector({0});
    const Tensor mean = at::empty(kept, acc), rstd = at::empty(kept, acc);
    acc_t* loss = losses.mutable_data_ptr<acc_t>();
    acc_t *means = mean.mutable_data_ptr<acc_t>(), *rstds = rstd.mutable_data_ptr<acc_t>();
    dispatch_storage<acc_t>(target.scalar_type(), [&](auto storage) {
      const Errors<scalar_t, decltype(storage), acc_t> errors(prediction, target);
      at::parallel_for(0, n, rows_per_task(c), [&](int64_t begin, int64_t end) {
        std::vector<acc_t> scratch(2 * c);
        acc_t *t = scratch.data(), *x = t + c;
        for (int64_t p = begin; p < end; ++p) {
          acc_t factor = 1;
          if (normalize) {
            const auto moments = errors.load_measured(t, p, eps);
            means[p] = moments.mean;
            factor = rstds[p] = moments.rstd;
          } else {
            errors.read_target(t, p);
          }
          errors.subtract_from_prediction(x, t, factor, p);
          loss[p] = static_cast<acc_t>(tile_math<acc_t>().dot(x, x, c) / static_cast<double>(c));
        }
      });
    });
    return std::make_tuple(losses, mean, rstd);
  });
}

Tensor patch_errors_bwd(const Tensor& grad, const Tensor& prediction, const Tensor& target, const Tensor& mean,
                        const Tensor& rstd) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t n = prediction.size(0), c = prediction.size(1);
  return SSL_KERNELS_DISPATCH(prediction.scalar_type(), "patch_errors", [&] {
    const Tensor made = at::empty(prediction.sizes(), prediction.options()), upstream = grad.contiguous();
    const bool normalize = mean.numel() > 0;
    scalar_t* out = made.mutable_data_ptr<scalar_t>();
    const acc_t* g = upstream.const_data_ptr<acc_t>();
    const acc_t *means = mean.const_data_ptr<acc_t>(), *rstds = rstd.const_data_ptr<acc_t>();
    dispatch_storage<acc_t>(target.scalar_type(), [&](auto storage) {
      const Errors<scalar_t, decltype(storage), acc_t> errors(prediction, target);
      at::parallel_for(0, n, rows_per_task(c), [&](int64_t begin, int64_t end) {
        std::vector<acc_t> scratch(2 * c);
        acc_t *t = scratch.data(), *x = t + c;
        for (int64_t p = begin; p < end; ++p) {
          if (g[p] == 0) {
            std::fill_n(out + p * c, c, scalar_t(0));
            continue;
          }
          if (normalize)
            errors.load_target(t, p, means[p]);
          else
            errors.read_target(t, p);
          errors.subtract_from_prediction(x, t, normalize ? rstds[p] : acc_t(1), p);
          tile_math<acc_t>().scale(x, 2 * g[p] / static_cast<acc_t>(c), c);
          row_conversion<scalar_t, acc_t>().store(out + p * c, x, c);
        }
      });
    });
    return made;
  });
}

}  // namespace ssl_kernels::cpu
