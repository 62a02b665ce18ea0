// The CPU kernels of `mixup_cross_entropy_fwd` and `mixup_cross_entropy_bwd`. The contract is docs/mixing.md.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace ssl_kernels::cpu {

std::tuple<at::Tensor, at::Tensor> mixup_cross_entropy_fwd(const at::Tensor& logits, const at::Tensor& target,
                                                           const at::Tensor& permutation, const at::Tensor& lam,
                                                           double label_smoothing);
at::Tensor mixup_cross_entropy_bwd(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                                   const at::Tensor& permutation, const at::Tensor& lam, const at::Tensor& lse,
                                   double label_smoothing);

}  // namespace ssl_kernels::cpu
