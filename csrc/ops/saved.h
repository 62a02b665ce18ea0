// What a node of autograd keeps for its backward.
#pragma once

#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/custom_function.h>

namespace ssl_kernels {

// Inference tensors, which autograd refuses to save, as clones; the others as they are. A teacher's features are made
// under inference_mode and get no gradient.
inline torch::autograd::variable_list savable(torch::autograd::variable_list tensors) {
  for (at::Tensor& tensor : tensors)
    if (tensor.defined() && tensor.is_inference()) tensor = tensor.clone();
  return tensors;
}

}  // namespace ssl_kernels
