// Registers the CPU kernel as `sigmoid_pairs_fwd.native` and `sigmoid_pairs_bwd.native`. The schema is defined in
// ssl_kernels/ops/sigmoid_pairs.py, so that it exists where nothing was compiled.
#include "sigmoid_pairs.h"

#include <torch/library.h>

#include "../cpu/sigmoid_pairs.h"

namespace ssl_kernels {
namespace {

cpu::SigmoidPairsFwd sigmoid_pairs_fwd(const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& scale,
                                       const at::Tensor& bias, int64_t diagonal, bool normalize_rows,
                                       bool normalize_columns, bool total, bool keep, bool rows_need_grad,
                                       bool columns_need_grad) {
  check_sigmoid_pairs(rows, columns, scale, bias);
  return cpu::sigmoid_pairs_fwd({rows, columns, scale, bias, diagonal, normalize_rows, normalize_columns,
                                 rows_need_grad, columns_need_grad},
                                total, keep);
}

cpu::SigmoidPairsBwd sigmoid_pairs_bwd(const at::Tensor& grad_losses, const at::Tensor& rows,
                                       const at::Tensor& columns, const at::Tensor& scale, const at::Tensor& bias,
                                       int64_t diagonal, bool normalize_rows, bool normalize_columns,
                                       bool rows_need_grad, bool columns_need_grad) {
  check_sigmoid_pairs(rows, columns, scale, bias);
  check_sigmoid_pairs_grad(grad_losses, rows);
  return cpu::sigmoid_pairs_bwd({rows, columns, scale, bias, diagonal, normalize_rows, normalize_columns,
                                 rows_need_grad, columns_need_grad},
                                grad_losses);
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("sigmoid_pairs_fwd.native", &sigmoid_pairs_fwd);
  library.impl("sigmoid_pairs_bwd.native", &sigmoid_pairs_bwd);
}

}  // namespace
}  // namespace ssl_kernels
