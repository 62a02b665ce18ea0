// The checks of the operator `momentum_update_` without which a kernel would write out of bounds. Everything
// a user can do wrong is checked in ssl_kernels/ops/momentum_update.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace ssl_kernels {

inline void check_momentum_update(at::TensorList masters, at::TensorList shadows, at::TensorList sources,
                                  const at::Tensor& weight) {
  TORCH_CHECK(masters.size() == shadows.size() && masters.size() == sources.size(),
              "momentum_update_: masters, shadows and sources must have one length, got ",
              masters.size(), ", ", shadows.size(), " and ", sources.size());
  const auto is_half = [](const at::Tensor& x) {
    return x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  };
  TORCH_CHECK(weight.dim() == 0 && weight.scalar_type() == at::kFloat &&
                  (masters.empty() || weight.device() == masters[0].device()),
              "momentum_update_: weight must be 0-d float32 on the device of the masters");
  for (size_t i = 0; i < masters.size(); ++i) {
    const at::Tensor &master = masters[i], &shadow = shadows[i], &source = sources[i];
    const auto fits = [&](const at::Tensor& x) {
      return x.sizes() == master.sizes() && x.strides() == master.strides() &&
             x.device() == masters[0].device();
    };
    TORCH_CHECK(
        master.scalar_type() == at::kFloat && is_half(shadow) &&
            (source.scalar_type() == at::kFloat || is_half(source)),
        "momentum_update_: masters must be float32, shadows float16 or bfloat16, sources any of these");
    TORCH_CHECK(master.is_non_overlapping_and_dense() && fits(master) && fits(shadow) && fits(source),
                "momentum_update_: master, shadow and source ", i,
                " must be dense, on one device and of the same shape and strides");
  }
}

}  // namespace ssl_kernels
