// The arguments of the operator `row_pairs` as the dispatcher passes them, and the checks without which a
// kernel would read out of bounds. Everything a user can do wrong is checked by the losses.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>

#include "operands.h"

namespace ssl_kernels {

using OptionalTensor = std::optional<at::Tensor>;

inline void check_row_pairs(const at::Tensor& x, const at::Tensor& y, const OptionalTensor& z,
                            std::string_view measure) {
  TORCH_CHECK(x.dim() == 2 && x.size(0) > 0 && x.size(1) > 0,
              "row_pairs: x must have shape (N, D) with N, D >= 1, got ", x.sizes());
  const auto fits = [&](const at::Tensor& other) {
    return other.sizes() == x.sizes() && other.scalar_type() == x.scalar_type() &&
           other.device() == x.device();
  };
  TORCH_CHECK(fits(y) && (!z || fits(*z)), "row_pairs: y and z must have the shape, dtype and device of x");
  TORCH_CHECK(measure == "product" || measure == "distance",
              "row_pairs: measure must be \"product\" or \"distance\", got \"", measure, "\"");
}

inline void check_row_pairs_grad(const at::Tensor& grad_values, const at::Tensor& saved, const at::Tensor& x,
                                 const OptionalTensor& z) {
  const auto acc = accumulation_type(x);
  TORCH_CHECK(grad_values.dim() == 1 && grad_values.size(0) == x.size(0) &&
                  grad_values.scalar_type() == at::kDouble && grad_values.device() == x.device(),
              "row_pairs: grad_values must be float64 of shape (N,) on the device of x");
  TORCH_CHECK(saved.sizes() == at::IntArrayRef({x.size(0), z ? 2 : 1, 4}) && saved.scalar_type() == acc &&
                  saved.device() == x.device(),
              "row_pairs: saved must be what the forward made");
}

}  // namespace ssl_kernels
