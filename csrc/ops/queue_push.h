// The checks of the operator `queue_push_` without which a kernel would write out of bounds. Everything a
// user can do wrong is checked in ssl_kernels/ops/queue_push.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace ssl_kernels {

inline void check_queue_push(const at::Tensor& storage, const at::Tensor& keys, const at::Tensor& position,
                             const at::Tensor& filled) {
  const auto is_floating = [](const at::Tensor& x) {
    const auto dtype = x.scalar_type();
    return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16;
  };
  const auto is_count = [&](const at::Tensor& x) {
    return x.scalar_type() == at::kLong && x.dim() == 0 && x.device() == storage.device();
  };
  TORCH_CHECK(storage.dim() == 2 && storage.numel() > 0 && storage.is_contiguous() && is_floating(storage),
              "queue_push_: storage must be a contiguous floating tensor of shape (K, D), got ",
              storage.sizes());
  TORCH_CHECK(keys.dim() == 2 && keys.size(1) == storage.size(1) && keys.device() == storage.device() &&
                  is_floating(keys),
              "queue_push_: keys must be a floating tensor of shape (B, ", storage.size(1),
              ") on the device of storage, got ", keys.sizes());
  TORCH_CHECK(is_count(position) && is_count(filled),
              "queue_push_: position and filled must be 0-d int64 on the device of storage");
  TORCH_CHECK(!keys.is_alias_of(storage), "queue_push_: keys must not share memory with storage");
}

}  // namespace ssl_kernels
