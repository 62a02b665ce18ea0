// The arguments of the operator `contrastive` as the dispatcher passes them, and the checks without which a
// kernel would read out of bounds. Everything a user can do wrong is checked in
// ssl_kernels/ops/contrastive.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "operands.h"

namespace ssl_kernels {

using OptionalTensor = std::optional<at::Tensor>;

// What forward hands to backward as `kept` is (0,), where nothing is kept; one-dimensional, which the kernel
// that made it alone reads; or the expectation of the columns, (N, D).
inline bool holds_expectation(const at::Tensor& kept) { return kept.dim() == 2; }

inline void check_contrastive(const at::Tensor& rows, const OptionalTensor& columns, const at::Tensor& scale,
                              const OptionalTensor& positives, const OptionalTensor& row_ids,
                              const OptionalTensor& column_ids) {
  const auto n = rows.size(0), m = columns ? columns->size(0) : n;
  const auto acc = accumulation_type(rows);
  const auto on_device = [&](const at::Tensor& tensor) { return tensor.device() == rows.device(); };
  const auto are_ids = [&](const at::Tensor& ids, int64_t count) {
    return ids.scalar_type() == at::kLong && ids.dim() == 1 && ids.size(0) == count && on_device(ids);
  };
  TORCH_CHECK(rows.dim() == 2, "contrastive: rows must be 2-d, got ", rows.sizes());
  TORCH_CHECK(
      !columns || (columns->dim() == 2 && columns->size(1) == rows.size(1) && on_device(*columns) &&
                   accumulation_type(*columns) == acc),
      "contrastive: columns must have the width and device of rows, and float64 goes with float64 alone");
  TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == acc && on_device(scale),
              "contrastive: scale must be one number of dtype ", acc, " on the device of rows");
  TORCH_CHECK(!positives || (positives->scalar_type() == at::kLong &&
                             (positives->dim() == 1 || positives->dim() == 2) && positives->size(0) == n &&
                             on_device(*positives)),
              "contrastive: positives must be int64 of shape (N,) or (N, P)");
  TORCH_CHECK(n > 0 && m > 0 && rows.size(1) > 0, "contrastive: rows and columns must not be empty");
  TORCH_CHECK(!row_ids || are_ids(*row_ids, n), "contrastive: row_ids must be int64 of shape (N,)");
  TORCH_CHECK(!column_ids || are_ids(*column_ids, m), "contrastive: column_ids must be int64 of shape (M,)");
  TORCH_CHECK(!columns || row_ids.has_value() == column_ids.has_value(),
              "contrastive: row_ids and column_ids go together");
}

// The additions: what is added to logits, and which of them are left out by their size.
inline void check_additions(const at::Tensor& rows, const OptionalTensor& columns, const at::Tensor& scale,
                            const OptionalTensor& row_ids, bool both_directions,
                            const OptionalTensor& column_bias, const OptionalTensor& row_bias,
                            const OptionalTensor& row_limit, const OptionalTensor& exempt,
                            bool only_equal_ids) {
  const auto n = rows.size(0), m = columns ? columns->size(0) : n;
  const auto is_vector = [&](const OptionalTensor& tensor, int64_t count, at::ScalarType dtype) {
    return !tensor || (tensor->dim() == 1 && tensor->size(0) == count && tensor->scalar_type() == dtype &&
                       tensor->device() == rows.device());
  };
  TORCH_CHECK(is_vector(column_bias, m, scale.scalar_type()),
              "contrastive: column_bias must have shape (M,) and the dtype and device of scale");
  TORCH_CHECK(is_vector(row_bias, n, scale.scalar_type()) && (!row_bias || both_directions),
              "contrastive: row_bias must have shape (N,) and the dtype and device of scale, and goes with "
              "both_directions");
  TORCH_CHECK(is_vector(row_limit, n, scale.scalar_type()),
              "contrastive: row_limit must have shape (N,) and the dtype and device of scale");
  TORCH_CHECK(is_vector(exempt, m, at::kBool) && (!exempt || row_limit),
              "contrastive: exempt must be bool of shape (M,), and goes with row_limit");
  TORCH_CHECK(!only_equal_ids || row_ids, "contrastive: row_ids must be given with only_equal_ids");
}

}  // namespace ssl_kernels
