// The CPU kernels of `cutmix_`, `cutmix_fwd` and `cutmix_bwd`. The contract is docs/mixing.md.
#pragma once

#include <ATen/core/Tensor.h>

namespace ssl_kernels::cpu {

void cutmix_(const at::Tensor& x, const at::Tensor& boxes, const at::Tensor& permutation);
at::Tensor cutmix_fwd(const at::Tensor& x, const at::Tensor& boxes, const at::Tensor& permutation);
at::Tensor cutmix_bwd(const at::Tensor& grad, const at::Tensor& boxes, const at::Tensor& permutation);

}  // namespace ssl_kernels::cpu
