// The CPU kernels of `cluster_rows_` and `view_cross_entropy`. The contracts are
// ssl_kernels/ops/cluster_cross_entropy.py and ssl_kernels/ops/view_cross_entropy.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace ssl_kernels::cpu {

// (N,) float64 sums over the pairs, of logits (V, N, K) and those of the teacher, codes (A, N, K), which
// become its probabilities; with `differentiate` the logits become the gradient by them. biases: (A, K) or
// (1, K). less_entropy: less the entropies of the teacher's probabilities, which makes the sums divergences.
at::Tensor cluster_rows_(const at::Tensor& logits, const at::Tensor& codes,
                         const std::optional<at::Tensor>& biases, at::IntArrayRef pairs, bool differentiate,
                         bool less_entropy);

// The logits of views as their users have them: V and A tensors (N, K), scale * student and steepness *
// teacher + bias.
struct ViewLogits {
  std::vector<at::Tensor> student, teacher;
  double scale, steepness;
  at::Tensor bias;  // (K,) in the accumulation dtype, or undefined
  std::vector<int64_t> pairs;
};

at::Tensor view_cross_entropy_fwd(const ViewLogits& views);

// Gradients of the views that need one, else (0,), and last the one by scale.
std::vector<at::Tensor> view_cross_entropy_bwd(const at::Tensor& weights, const ViewLogits& views,
                                               const std::vector<bool>& needs);

}  // namespace ssl_kernels::cpu
