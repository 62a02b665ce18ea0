// `contrastive_fwd.native` and `contrastive_bwd.native` through the dispatcher, for what differentiates by
// them.
#pragma once

#include <tuple>

#include "autograd.h"
#include "contrastive.h"

namespace ssl_kernels {

using ContrastiveForwardResults =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using ContrastiveForwardOp = ContrastiveForwardResults(
    const at::Tensor& rows, const OptionalTensor& columns, const at::Tensor& scale,
    const OptionalTensor& positives, const OptionalTensor& row_ids, const OptionalTensor& column_ids,
    bool normalize_rows, bool normalize_columns, bool keep_diagonal, bool both_directions, bool keep,
    bool columns_need_grad, const OptionalTensor& column_bias, const OptionalTensor& row_bias,
    const OptionalTensor& row_limit, const OptionalTensor& exempt, bool only_equal_ids, bool equal_weights);
using ContrastiveBackwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const OptionalTensor& grad_lse, const OptionalTensor& grad_column_lse,
    const OptionalTensor& grad_positive_logits, const at::Tensor& rows, const OptionalTensor& columns,
    const at::Tensor& scale, const OptionalTensor& positives, const OptionalTensor& row_ids,
    const OptionalTensor& column_ids, const at::Tensor& lse, const at::Tensor& column_lse,
    const at::Tensor& row_rnorm, const at::Tensor& column_rnorm, const at::Tensor& kept, bool normalize_rows,
    bool normalize_columns, bool keep_diagonal, bool both_directions, bool rows_need_grad,
    bool columns_need_grad, const OptionalTensor& column_bias, const OptionalTensor& row_bias,
    const OptionalTensor& row_limit, const OptionalTensor& exempt, bool only_equal_ids,
    bool column_bias_needs_grad, bool row_bias_needs_grad);

inline const auto& contrastive_forward_op() {
  static const auto op = native_overload<ContrastiveForwardOp>("ssl_kernels::contrastive_fwd");
  return op;
}

inline const auto& contrastive_backward_op() {
  static const auto op = native_overload<ContrastiveBackwardOp>("ssl_kernels::contrastive_bwd");
  return op;
}

}  // namespace ssl_kernels
