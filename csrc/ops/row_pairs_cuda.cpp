// Registers the CUDA kernels as `row_pairs_fwd.native` and `row_pairs_bwd.native`: allocates results, passes
// plain pointers to the launchers of csrc/cuda/row_pairs.h on the current stream.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "../cuda/row_pairs.h"
#include "cuda_launch.h"
#include "row_pairs.h"

namespace ssl_kernels {
namespace {

using at::Tensor;

RowPairsOperands operands_of(const Tensor& x, const Tensor& y, const OptionalTensor& z, bool normalize,
                             std::string_view measure) {
  RowPairsOperands args = {};
  args.dtype = kernel_dtype("row_pairs: x", x.scalar_type());
  args.pairs = z ? 2 : 1;
  args.normalize = normalize;
  args.distance = measure == "distance";
  args.N = x.size(0);
  args.D = x.size(1);
  const Tensor* operands[] = {&x, &y, z ? &*z : nullptr};
  for (int k = 0; k <= args.pairs; ++k) {
    args.operands[k] = operands[k]->data_ptr();
    args.row_strides[k] = operands[k]->stride(0);
    args.column_strides[k] = operands[k]->stride(1);
  }
  return args;
}

std::tuple<Tensor, Tensor> row_pairs_fwd(const Tensor& x, const Tensor& y, const OptionalTensor& z,
                                         bool normalize, std::string_view measure) {
  check_row_pairs(x, y, z, measure);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor values = at::empty({x.size(0)}, x.options().dtype(at::kDouble));
  const Tensor saved = at::empty({x.size(0), z ? 2 : 1, 4}, x.options().dtype(accumulation_type(x)));
  const RowPairsFwdArgs args = {operands_of(x, y, z, normalize, measure), values.data_ptr<double>(),
                                saved.data_ptr()};
  launch(x, ::row_pairs_fwd, &args);
  return {values, saved};
}

std::tuple<Tensor, Tensor, Tensor> row_pairs_bwd(const Tensor& grad_values, const Tensor& x, const Tensor& y,
                                                 const OptionalTensor& z, const Tensor& saved, bool normalize,
                                                 std::string_view measure, bool x_needs_grad,
                                                 bool y_needs_grad, bool z_needs_grad) {
  check_row_pairs(x, y, z, measure);
  check_row_pairs_grad(grad_values, saved, x, z);
  const c10::cuda::CUDAGuard guard(x.device());
  const bool needed[] = {x_needs_grad, y_needs_grad, z && z_needs_grad};
  const Tensor upstream = grad_values.contiguous(), kept = saved.contiguous();
  RowPairsBwdArgs args = {
      operands_of(x, y, z, normalize, measure), upstream.data_ptr<double>(), kept.data_ptr(), {}};
  Tensor grads[3];
  for (int k = 0; k < 3; ++k) {
    grads[k] = at::empty(needed[k] ? x.sizes() : at::IntArrayRef({0}), x.options());
    args.grads[k] = pointer(grads[k]);
  }
  launch(x, ::row_pairs_bwd, &args);
  return {grads[0], grads[1], grads[2]};
}

TORCH_LIBRARY_IMPL(ssl_kernels, CUDA, library) {
  library.impl("row_pairs_fwd.native", &row_pairs_fwd);
  library.impl("row_pairs_bwd.native", &row_pairs_bwd);
}

}  // namespace
}  // namespace ssl_kernels
