// The CPU kernel of `sigmoid_pairs`. The contract, with every shape, is docs/sigmoid_pairs.md.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace ssl_kernels::cpu {

struct SigmoidPairsArgs {
  const at::Tensor& rows;
  const at::Tensor& columns;
  const at::Tensor& scale;
  const at::Tensor& bias;
  int64_t diagonal;
  bool normalize_rows, normalize_columns;
  bool rows_need_grad, columns_need_grad;
};

// losses, grad_rows, grad_columns, grad_scale, grad_bias
using SigmoidPairsFwd = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// grad_rows, grad_columns, grad_scale, grad_bias
using SigmoidPairsBwd = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

SigmoidPairsFwd sigmoid_pairs_fwd(const SigmoidPairsArgs& args, bool total, bool keep);
SigmoidPairsBwd sigmoid_pairs_bwd(const SigmoidPairsArgs& args, const at::Tensor& grad_losses);

}  // namespace ssl_kernels::cpu
