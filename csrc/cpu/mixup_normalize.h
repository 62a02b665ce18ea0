// The CPU kernel of `mixup_normalize`. The contract is docs/mixing.md.
#pragma once

#include <ATen/core/Tensor.h>

namespace ssl_kernels::cpu {

at::Tensor mixup_normalize(const at::Tensor& x, const at::Tensor& lam, const at::Tensor& permutation,
                           const at::Tensor& mean, const at::Tensor& std, at::ScalarType dtype);

}  // namespace ssl_kernels::cpu
