// `contrastive_loss.native` as a function, for callers that need none of what the dispatcher does:
// contrastive_loss.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ssl_kernels {

std::tuple<at::Tensor, int64_t> contrastive_loss(
    const at::Tensor& rows, const std::optional<at::Tensor>& others, const std::optional<at::Tensor>& scale,
    double constant, const std::optional<at::Tensor>& classes, const std::optional<at::Tensor>& row_ids,
    const std::optional<at::Tensor>& column_ids, const std::optional<at::Tensor>& positives,
    const std::optional<at::Tensor>& numbers, const std::optional<at::Tensor>& column_bias,
    std::optional<double> positive_prior, bool are_views, bool leaves_partner_out, bool both_directions,
    bool joint, bool classes_apart, bool normalize, bool normalize_others, double divisor);

}  // namespace ssl_kernels
