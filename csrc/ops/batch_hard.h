// The arguments of the operator `batch_hard` as the dispatcher passes them, and the checks without which a
// kernel would read out of bounds. Everything a user can do wrong is checked in
// ssl_kernels/losses/triplet.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <string_view>

namespace ssl_kernels {

inline void check_batch_hard(const at::Tensor& embeddings, const at::Tensor& labels,
                             std::string_view distance) {
  TORCH_CHECK(embeddings.dim() == 2 && embeddings.size(0) > 0 && embeddings.size(1) > 0,
              "batch_hard: embeddings must have shape (N, D) with N, D >= 1, got ", embeddings.sizes());
  TORCH_CHECK(embeddings.size(0) < std::numeric_limits<int32_t>::max(),
              "batch_hard: embeddings must have fewer than ", std::numeric_limits<int32_t>::max(),
              " rows, got ", embeddings.size(0));
  TORCH_CHECK(labels.dim() == 1 && labels.size(0) == embeddings.size(0) &&
                  labels.scalar_type() == at::kLong && labels.device() == embeddings.device(),
              "batch_hard: labels must be int64 of shape (N,) on the device of embeddings");
  TORCH_CHECK(distance == "euclidean" || distance == "cosine",
              "batch_hard: distance must be \"euclidean\" or \"cosine\", got \"", distance, "\"");
}

}  // namespace ssl_kernels
