// `contrastive_fwd.native` and `contrastive_bwd.native` through the dispatcher, for what differentiates by them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>

#include "contrastive.h"

namespace ssl_kernels {

using ContrastiveForwardResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using ContrastiveForwardOp = ContrastiveForwardResults(
    const at::Tensor& rows, const OptionalTensor& columns, const at::Tensor& scale, const OptionalTensor& positives,
    const OptionalTensor& row_ids, const OptionalTensor& column_ids, bool normalize_rows, bool normalize_columns,
    bool keep_diagonal, bool both_directions, bool keep, bool columns_need_grad,
    const OptionalTensor& column_bias, const OptionalTensor& row_bias, const OptionalTensor& row_limit,
    const OptionalTensor& exempt, bool only_equal_ids);
using ContrastiveBackwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const OptionalTensor& grad_lse, const OptionalTensor& grad_column_lse, const OptionalTensor& grad_positive_logits,
    const at::Tensor& rows, const OptionalTensor& columns, const at::Tensor& scale, const OptionalTensor& positives,
    const OptionalTensor& row_ids, const OptionalTensor& column_ids, const at::Tensor& lse, const at::Tensor& column_lse,
    const at::Tensor& row_rnorm, const at::Tensor& column_rnorm, const at::Tensor& kept, bool normalize_rows,
    bool normalize_columns, bool keep_diagonal, bool both_directions, bool rows_need_grad, bool columns_need_grad,
    const OptionalTensor& column_bias, const OptionalTensor& row_bias, const OptionalTensor& row_limit,
    const OptionalTensor& exempt, bool only_equal_ids, bool column_bias_needs_grad, bool row_bias_needs_grad);

template <class Op>
c10::TypedOperatorHandle<Op> native_overload(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "native").typed<Op>();
}

inline const auto& contrastive_forward_op() {
  static const auto op = native_overload<ContrastiveForwardOp>("ssl_kernels::contrastive_fwd");
  return op;
}

inline const auto& contrastive_backward_op() {
  static const auto op = native_overload<ContrastiveBackwardOp>("ssl_kernels::contrastive_bwd");
  return op;
}

inline OptionalTensor if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

}  // namespace ssl_kernels
