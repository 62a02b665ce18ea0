// The CPU kernel of `patch_errors`. The contract is ssl_kernels/ops/patch_errors.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace ssl_kernels::cpu {

// losses (P,), mean and rstd (P, 1), or (0,) unless `normalize`; target in the accumulation dtype or
// narrower.
std::tuple<at::Tensor, at::Tensor, at::Tensor> patch_errors_fwd(const at::Tensor& prediction,
                                                                const at::Tensor& target, double eps,
                                                                bool normalize);

at::Tensor patch_errors_bwd(const at::Tensor& grad, const at::Tensor& prediction, const at::Tensor& target,
                            const at::Tensor& mean, const at::Tensor& rstd);

}  // namespace ssl_kernels::cpu
