// `row_pairs_loss.native` as a function, for callers that need none of what the dispatcher does:
// row_pairs_loss.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace ssl_kernels {

at::Tensor row_pairs_loss(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& z,
                          bool normalize, std::string_view measure, std::string_view rule, double factor,
                          double constant, std::string_view reduction, std::string_view caller);

}  // namespace ssl_kernels
