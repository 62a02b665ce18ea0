// `row_pairs_fwd.native` and `row_pairs_bwd.native` through the dispatcher, for what differentiates by them.
#pragma once

#include <tuple>

#include "autograd.h"
#include "row_pairs.h"

namespace ssl_kernels {

using RowPairsForwardOp = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& x, const at::Tensor& y,
                                                             const OptionalTensor& z, bool normalize,
                                                             std::string_view measure);
using RowPairsBackwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& grad_values, const at::Tensor& x, const at::Tensor& y, const OptionalTensor& z,
    const at::Tensor& saved, bool normalize, std::string_view measure, bool x_needs_grad, bool y_needs_grad,
    bool z_needs_grad);

inline const auto& row_pairs_forward_op() {
  static const auto op = native_overload<RowPairsForwardOp>("ssl_kernels::row_pairs_fwd");
  return op;
}

inline const auto& row_pairs_backward_op() {
  static const auto op = native_overload<RowPairsBackwardOp>("ssl_kernels::row_pairs_bwd");
  return op;
}

}  // namespace ssl_kernels
