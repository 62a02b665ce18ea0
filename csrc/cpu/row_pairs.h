// Reduced losses of pairs of rows: `row_pairs` on the CPU with its gradients in one pass.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace ssl_kernels::cpu {

// With the value v of row_pairs and a constant c: max(0, v + c), 2 - 2 v, v^c (0 at v = 0), or -log(v + c).
enum class PairRule { kHinge, kCosine, kPower, kLogarithm };

struct PairLoss {
  double sum;                        // of the losses, times share
  std::array<at::Tensor, 3> grads;  // by x, y and z, (0,) where none is needed
};

// x, y and z (N, D) float32 or float64, of one dtype; distance: the measure.
PairLoss pair_loss(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& z,
                   bool normalize, bool distance, PairRule rule, double constant, double share,
                   std::array<bool, 3> needs_grad);

}  // namespace ssl_kernels::cpu
