// The CPU kernel of `batch_hard`. The contract, with every shape, is docs/batch_hard.md.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace ssl_kernels::cpu {

// positive_index, negative_index
std::pair<at::Tensor, at::Tensor> batch_hard(const at::Tensor& embeddings, const at::Tensor& labels, bool normalize,
                                             bool cosine);

}  // namespace ssl_kernels::cpu
