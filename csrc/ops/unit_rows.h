// L2-normalisation of rows, and back, with torch's operators: for the terms of a loss that cost O(N · D).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/linalg_vector_norm.h>

#include "../cpu/rows.h"
#include "operands.h"

namespace ssl_kernels {

using cpu::kNormEpsilon;

// 1 / max(‖x‖, eps) along the last dimension.
inline at::Tensor reciprocal_norms(const at::Tensor& x) {
  return at::linalg_vector_norm(x, 2, {{-1}}).clamp_min_(kNormEpsilon).reciprocal_();
}

// The rows' factors by which x̂ turns with x, overwriting `radial`: rows shorter than eps are only scaled.
inline at::Tensor without_short_rows_(at::Tensor radial, const at::Tensor& rnorm) {
  return radial.masked_fill_(rnorm.eq(1 / kNormEpsilon), 0);
}

// The gradient by x from that by x̂ and radial_i = <x̂_i, grad_i>, overwriting both.
inline at::Tensor through_normalization_(at::Tensor grad, const at::Tensor& unit, const at::Tensor& rnorm,
                                         at::Tensor radial) {
  radial = without_short_rows_(radial, rnorm);
  return grad.addcmul_(unit, radial.unsqueeze(1), -1).mul_(rnorm.unsqueeze(1));
}

}  // namespace ssl_kernels
