// Gradients that come as a batch: those of torch.autograd.grad with is_grads_batched, and of torch.func.vmap
// around a backward. A batch is a stand-in, of one dimension more than it tells, that no kernel can read.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>

#include <optional>
#include <utility>
#include <vector>

// After functorch's, whose functions of the same names would be ambiguous.
#include <ATen/LegacyBatchedTensorImpl.h>

namespace ssl_kernels {

class Batches {
 public:
  // Of `tensors`, which may be undefined, those of the innermost level; they outlive it.
  explicit Batches(const std::vector<at::Tensor>& tensors) : tensors_(tensors) {
    for (const at::Tensor& tensor : tensors)
      if (const auto batch = batch_of(tensor); batch && batch->level > level_)
        level_ = batch->level, size_ = batch->values.size(batch->dim);
    TORCH_CHECK(level_.second < 0 || size_ > 0, "a batch of gradients must hold at least one");
  }

  // 0 where nothing is batched.
  int64_t size() const { return size_; }

  // The tensors with number i of each batch in its place.
  std::vector<at::Tensor> operator[](int64_t i) const {
    std::vector<at::Tensor> result = tensors_;
    for (at::Tensor& tensor : result)
      if (const auto batch = batch_of(tensor); batch && batch->level == level_)
        tensor = batch->values.select(batch->dim, i);
    return result;
  }

  // A batch of what was made of each number.
  at::Tensor together(const std::vector<at::Tensor>& parts) const {
    const at::Tensor values = at::stack(parts);
    return level_.first ? at::functorch::makeBatched(values, 0, level_.second)
                        : at::addBatchDim(values, level_.second, 0);
  }

 private:
  // functorch's levels lie inside of those of is_grads_batched, whose implementation is older.
  using Level = std::pair<bool, int64_t>;
  struct Batch {
    at::Tensor values;
    int64_t dim;
    Level level;
  };

  static std::optional<Batch> batch_of(const at::Tensor& tensor) {
    if (!tensor.defined()) return std::nullopt;
    if (const auto* batch = at::functorch::maybeGetBatchedImpl(tensor))
      return Batch{batch->value(), batch->bdim(), {true, batch->level()}};
    const auto* batch = at::maybeGetBatchedImpl(tensor);
    if (!batch) return std::nullopt;
    TORCH_CHECK(batch->bdims().size() == 1, "is_grads_batched inside of is_grads_batched is not supported");
    return Batch{batch->value(), batch->bdims()[0].dim(), {false, batch->bdims()[0].level()}};
  }

  const std::vector<at::Tensor>& tensors_;
  Level level_{false, -1};
  int64_t size_ = 0;
};

}  // namespace ssl_kernels
