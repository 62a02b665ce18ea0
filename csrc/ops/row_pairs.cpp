// Registers the CPU kernel as `row_pairs_fwd.native` and `row_pairs_bwd.native`. The schema is defined in
// ssl_kernels/ops/row_pairs.py, so that it exists where nothing was compiled.
#include "row_pairs.h"

#include <torch/library.h>

#include <tuple>

#include "../cpu/row_pairs.h"

namespace ssl_kernels {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> row_pairs_fwd(const Tensor& x, const Tensor& y, const OptionalTensor& z, bool normalize,
                                        std::string_view measure) {
  check_row_pairs(x, y, z, measure);
  return cpu::row_pairs_fwd(x, y, z, normalize, measure == "distance");
}

std::tuple<Tensor, Tensor, Tensor> row_pairs_bwd(const Tensor& grad_values, const Tensor& x, const Tensor& y,
                                                 const OptionalTensor& z, const Tensor& saved, bool normalize,
                                                 std::string_view measure, bool x_needs_grad, bool y_needs_grad,
                                                 bool z_needs_grad) {
  check_row_pairs(x, y, z, measure);
  check_row_pairs_grad(grad_values, saved, x, z);
  return cpu::row_pairs_bwd(grad_values, x, y, z, saved.contiguous(), normalize, measure == "distance",
                            {x_needs_grad, y_needs_grad, z_needs_grad});
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("row_pairs_fwd.native", &row_pairs_fwd);
  library.impl("row_pairs_bwd.native", &row_pairs_bwd);
}

}  // namespace
}  // namespace ssl_kernels
