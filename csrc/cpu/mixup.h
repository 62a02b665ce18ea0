// The CPU kernels of `mixup_`, `mixup_fwd` and `mixup_bwd`. The contract is docs/mixing.md.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ssl_kernels::cpu {

void mixup_(const at::Tensor& x, const at::Tensor& lam, const at::Tensor& permutation);
at::Tensor mixup_fwd(const at::Tensor& x, const at::Tensor& lam, const at::Tensor& permutation);
std::tuple<at::Tensor, at::Tensor> mixup_bwd(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                                             const at::Tensor& lam, const at::Tensor& permutation, bool x_needs_grad);

}  // namespace ssl_kernels::cpu
