// The CPU kernel of `row_pairs`. The contract, with every shape, is docs/row_pairs.md.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace ssl_kernels::cpu {

// values, saved
std::tuple<at::Tensor, at::Tensor> row_pairs_fwd(const at::Tensor& x, const at::Tensor& y,
                                                 const std::optional<at::Tensor>& z, bool normalize, bool distance);

// grad_x, grad_y, grad_z; (0,) where none is needed
std::tuple<at::Tensor, at::Tensor, at::Tensor> row_pairs_bwd(const at::Tensor& grad_values, const at::Tensor& x,
                                                             const at::Tensor& y, const std::optional<at::Tensor>& z,
                                                             const at::Tensor& saved, bool normalize, bool distance,
                                                             std::array<bool, 3> needs_grad);

}  // namespace ssl_kernels::cpu
