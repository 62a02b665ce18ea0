// The arguments of the operator `sigmoid_pairs` as the dispatcher passes them, and the checks without which a
// kernel would read out of bounds. Everything a user can do wrong is checked in ssl_kernels/losses/siglip.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "operands.h"

namespace ssl_kernels {

// Ids of rows and columns, or none of them.
struct PairIds {
  const std::optional<at::Tensor>& rows;
  const std::optional<at::Tensor>& columns;
  bool equal_are_positive;
};

inline void check_sigmoid_pairs(const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& scale,
                                const at::Tensor& bias, const PairIds& ids) {
  const auto acc = accumulation_type(rows);
  const auto on_device = [&](const at::Tensor& tensor) { return tensor.device() == rows.device(); };
  const auto is_number = [&](const at::Tensor& tensor) {
    return tensor.numel() == 1 && tensor.scalar_type() == acc && on_device(tensor);
  };
  TORCH_CHECK(rows.dim() == 2, "sigmoid_pairs: rows must be 2-d, got ", rows.sizes());
  TORCH_CHECK(columns.dim() == 2 && columns.size(1) == rows.size(1) && on_device(columns) &&
                  columns.scalar_type() == rows.scalar_type(),
              "sigmoid_pairs: columns must have the width, dtype and device of rows");
  TORCH_CHECK(rows.size(0) > 0 && columns.size(0) > 0 && rows.size(1) > 0,
              "sigmoid_pairs: rows and columns must not be empty");
  TORCH_CHECK(is_number(scale), "sigmoid_pairs: scale must be one number of dtype ", acc,
              " on the device of rows");
  TORCH_CHECK(is_number(bias), "sigmoid_pairs: bias must be one number of dtype ", acc,
              " on the device of rows");
  const auto are_ids = [&](const std::optional<at::Tensor>& tensor, const at::Tensor& of) {
    return !tensor || (tensor->scalar_type() == at::kLong && tensor->dim() == 1 &&
                       tensor->size(0) == of.size(0) && on_device(*tensor));
  };
  TORCH_CHECK(are_ids(ids.rows, rows),
              "sigmoid_pairs: row_ids must be int64 of shape (N,) on the device of rows");
  TORCH_CHECK(are_ids(ids.columns, columns),
              "sigmoid_pairs: column_ids must be int64 of shape (M,) on the device of rows");
  TORCH_CHECK(ids.rows.has_value() == ids.columns.has_value(),
              "sigmoid_pairs: row_ids and column_ids go together");
  TORCH_CHECK(!ids.equal_are_positive || ids.rows,
              "sigmoid_pairs: row_ids must be given with equal_ids_are_positive");
}

inline void check_sigmoid_pairs_grad(const at::Tensor& grad_losses, const at::Tensor& rows) {
  TORCH_CHECK(grad_losses.dim() == 1 && grad_losses.size(0) == rows.size(0) &&
                  grad_losses.scalar_type() == at::kDouble && grad_losses.device() == rows.device(),
              "sigmoid_pairs: grad_losses must be float64 of shape (N,) on the device of rows");
}

}  // namespace ssl_kernels
