// The CPU kernel of `momentum_update_`. The contract, with every shape, is docs/moco.md.
#pragma once

#include <ATen/core/Tensor.h>

namespace ssl_kernels::cpu {

void momentum_update_(at::TensorList masters, at::TensorList shadows, at::TensorList sources, float weight);

}  // namespace ssl_kernels::cpu
