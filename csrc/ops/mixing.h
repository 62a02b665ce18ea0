// The checks without which a kernel of the mixing operations would read or write out of bounds; everything
// else that a user can do wrong is checked in ssl_kernels/mixing.py. Values are the kernels' to check.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "operands.h"

namespace ssl_kernels {

inline void check_index(const char* op, const char* name, const at::Tensor& index, at::IntArrayRef shape,
                        const at::Tensor& x) {
  TORCH_CHECK(index.scalar_type() == at::kLong && index.sizes() == shape && index.device() == x.device(), op,
              ": ", name, " must be int64 of shape ", shape, " on ", x.device(), ", got ",
              index.scalar_type(), " of shape ", index.sizes(), " on ", index.device());
}

inline void check_batch(const char* op, const at::Tensor& x, int64_t least_dims) {
  TORCH_CHECK(x.dim() >= least_dims && x.numel() > 0, op, ": the batch must have ", least_dims,
              " dimensions or more, none of them 0, got ", x.sizes());
}

inline void check_lam(const char* op, const at::Tensor& lam, const at::Tensor& x) {
  const auto acc = accumulation_type(x);
  TORCH_CHECK(
      lam.scalar_type() == acc && lam.dim() == 1 && lam.size(0) == x.size(0) && lam.device() == x.device(),
      op, ": lam must be ", acc, " of shape (", x.size(0), ",) on ", x.device(), ", got ", lam.scalar_type(),
      " of shape ", lam.sizes(), " on ", lam.device());
}

inline void check_mixup(const char* op, const at::Tensor& x, const at::Tensor& lam,
                        const at::Tensor& permutation) {
  check_batch(op, x, 1);
  check_lam(op, lam, x);
  check_index(op, "permutation", permutation, {x.size(0)}, x);
}

inline void check_cutmix(const char* op, const at::Tensor& x, const at::Tensor& boxes,
                         const at::Tensor& permutation) {
  check_batch(op, x, 3);
  check_index(op, "boxes", boxes, {x.size(0), 4}, x);
  check_index(op, "permutation", permutation, {x.size(0)}, x);
}

inline void check_like(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  TORCH_CHECK(
      tensor.sizes() == x.sizes() && tensor.scalar_type() == x.scalar_type() && tensor.device() == x.device(),
      op, ": ", name, " must be ", x.scalar_type(), " of shape ", x.sizes(), " on ", x.device(), ", got ",
      tensor.scalar_type(), " of shape ", tensor.sizes(), " on ", tensor.device());
}

inline void check_mixup_normalize(const at::Tensor& x, const at::Tensor& lam, const at::Tensor& permutation,
                                  const at::Tensor& mean, const at::Tensor& std, at::ScalarType dtype) {
  const char* op = "mixup_normalize";
  check_mixup(op, x, lam, permutation);
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kByte, op,
              ": x must be uint8 of shape (B, C, H, W), got ", x.scalar_type(), " of shape ", x.sizes());
  for (const at::Tensor* numbers : {&mean, &std})
    TORCH_CHECK(numbers->scalar_type() == at::kFloat && numbers->dim() == 1 &&
                    numbers->size(0) == x.size(1) && numbers->device() == x.device(),
                op, ": mean and std must be float32 of shape (", x.size(1), ",) on ", x.device());
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op,
              ": dtype must be float32, float16 or bfloat16, got ", dtype);
}

inline void check_mixup_cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                                      const at::Tensor& partner, const at::Tensor& lam,
                                      const std::optional<at::Tensor>& weight) {
  const char* op = "mixup_cross_entropy";
  TORCH_CHECK(logits.dim() == 2, op, ": logits must have shape (N, C), got ", logits.sizes());
  check_mixup(op, logits, lam, partner);
  check_index(op, "target", target, {logits.size(0)}, logits);
  TORCH_CHECK(!weight || (weight->scalar_type() == lam.scalar_type() && weight->dim() == 1 &&
                          weight->size(0) == logits.size(1) && weight->device() == logits.device()),
              op, ": weight must be ", lam.scalar_type(), " of shape (", logits.size(1), ",) on ",
              logits.device());
}

inline void check_row_numbers(const char* name, const at::Tensor& numbers, const at::Tensor& logits) {
  TORCH_CHECK(numbers.scalar_type() == at::kDouble && numbers.dim() == 1 &&
                  numbers.size(0) == logits.size(0) && numbers.device() == logits.device(),
              "mixup_cross_entropy: ", name, " must be float64 of shape (", logits.size(0), ",) on ",
              logits.device());
}

}  // namespace ssl_kernels
