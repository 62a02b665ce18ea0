// patch_errors on the CPU, of patches x_p and targets t_p with C numbers each:
//   mean_p, var_p = mean and variance over C - 1 of t_p      r_p = 1 / sqrt(var_p + eps)
//   e_p = x_p - r_p (t_p - mean_p)      loss_p = |e_p|^2 / C      dx_p = 2 / C g_p e_p
//   without `normalize` r_p = 1 and mean_p = 0.
// Tiling: threads share the patches; a patch and its target, converted to acc_t where they are narrower, stay
//   in the first-level cache through the three passes of forward. Backward makes one.
// Traffic: forward reads both once and writes three numbers per patch, backward reads both once and writes
//   dx. Patches with g_p = 0, as those that a mask leaves out, are written as 0 and not read.
// Numerics: sums in lanes of acc_t, the squares of what is left after the mean was subtracted.
#include "patch_errors.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cmath>
#include <type_traits>
#include <vector>

#include "mixing_math.h"
#include "pool.h"
#include "rows.h"

namespace ssl_kernels::cpu {
namespace {

using at::Tensor;

// Rows as rows of acc_t: where they lie, or converted into a scratch.
template <class S, class acc_t>
class Reader {
 public:
  explicit Reader(const Tensor& rows)
      : rows_(with_neighbours(rows)),
        data_(rows_.const_data_ptr<S>()),
        stride_(rows_.stride(0)),
        width_(rows_.size(1)) {}

  static constexpr bool kConverts = !std::is_same_v<S, acc_t>;

  const acc_t* operator()(int64_t row, acc_t* scratch) const {
    if constexpr (kConverts) {
      row_conversion<S, acc_t>().load(scratch, data_ + row * stride_, width_);
      return scratch;
    } else {
      return data_ + row * stride_;
    }
  }

 private:
  Tensor rows_;
  const S* data_;
  int64_t stride_, width_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> patch_errors_fwd(const Tensor& prediction, const Tensor& target,
                                                    double eps, bool normalize) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t n = prediction.size(0), c = prediction.size(1);
  return SSL_KERNELS_DISPATCH(prediction.scalar_type(), "patch_errors", [&] {
    const auto acc = prediction.options().dtype(c10::CppTypeToScalarType<acc_t>::value);
    const Tensor losses = pooled({n}, acc);
    const at::DimVector kept = normalize ? at::DimVector({n, 1}) : at::DimVector({0});
    const Tensor mean = pooled(kept, acc), rstd = pooled(kept, acc);
    acc_t* loss = losses.mutable_data_ptr<acc_t>();
    acc_t *means = mean.mutable_data_ptr<acc_t>(), *rstds = rstd.mutable_data_ptr<acc_t>();
    dispatch_storage<acc_t>(target.scalar_type(), [&](auto storage) {
      const Reader<scalar_t, acc_t> of_prediction(prediction);
      const Reader<decltype(storage), acc_t> of_target(target);
      const PatchMath<acc_t>& math = patch_math<acc_t>();
      at::parallel_for(0, n, rows_per_task(c), [&](int64_t begin, int64_t end) {
        std::vector<acc_t> scratch(2 * c);
        for (int64_t p = begin; p < end; ++p) {
          const acc_t *t = of_target(p, scratch.data()), *x = of_prediction(p, scratch.data() + c);
          acc_t mean = 0, rstd = 1;
          if (normalize) {
            means[p] = mean = static_cast<acc_t>(math.sum(t, c) / static_cast<double>(c));
            const double variance = math.deviation(t, mean, c) / static_cast<double>(c - 1);
            rstds[p] = rstd = static_cast<acc_t>(1 / std::sqrt(variance + eps));
          }
          loss[p] = static_cast<acc_t>(math.error(x, t, mean, rstd, c) / static_cast<double>(c));
        }
      });
    });
    return std::make_tuple(losses, mean, rstd);
  });
}

Tensor patch_errors_bwd(const Tensor& grad, const Tensor& prediction, const Tensor& target,
                        const Tensor& mean, const Tensor& rstd) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t n = prediction.size(0), c = prediction.size(1);
  return SSL_KERNELS_DISPATCH(prediction.scalar_type(), "patch_errors", [&] {
    const Tensor made = pooled(prediction.sizes(), prediction.options()), upstream = grad.contiguous();
    const bool normalize = mean.numel() > 0;
    scalar_t* out = made.mutable_data_ptr<scalar_t>();
    const acc_t* g = upstream.const_data_ptr<acc_t>();
    const acc_t *means = mean.const_data_ptr<acc_t>(), *rstds = rstd.const_data_ptr<acc_t>();
    dispatch_storage<acc_t>(target.scalar_type(), [&](auto storage) {
      const Reader<scalar_t, acc_t> of_prediction(prediction);
      const Reader<decltype(storage), acc_t> of_target(target);
      const PatchMath<acc_t>& math = patch_math<acc_t>();
      at::parallel_for(0, n, rows_per_task(c), [&](int64_t begin, int64_t end) {
        std::vector<acc_t> scratch(2 * c);
        for (int64_t p = begin; p < end; ++p) {
          if (g[p] == 0) {
            std::fill_n(out + p * c, c, scalar_t(0));
            continue;
          }
          const acc_t *t = of_target(p, scratch.data()), *x = of_prediction(p, scratch.data() + c);
          const acc_t mean = normalize ? means[p] : acc_t(0), rstd = normalize ? rstds[p] : acc_t(1);
          const acc_t factor = 2 * g[p] / static_cast<acc_t>(c);
          if constexpr (Reader<scalar_t, acc_t>::kConverts) {
            math.gradient(scratch.data() + c, x, t, mean, rstd, factor, c);
            row_conversion<scalar_t, acc_t>().store(out + p * c, scratch.data() + c, c);
          } else {
            math.gradient(out + p * c, x, t, mean, rstd, factor, c);
          }
        }
      });
    });
    return made;
  });
}

}  // namespace ssl_kernels::cpu
