// The CPU kernel of `queue_push_`. The contract, with every shape, is docs/moco.md.
#pragma once

#include <ATen/core/Tensor.h>

namespace ssl_kernels::cpu {

void queue_push_(const at::Tensor& storage, const at::Tensor& keys, const at::Tensor& position,
                 const at::Tensor& filled, bool normalize);

}  // namespace ssl_kernels::cpu
