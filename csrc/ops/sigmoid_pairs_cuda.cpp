// Registers the CUDA kernels as `sigmoid_pairs_fwd.native` and `sigmoid_pairs_bwd.native`: allocates results
// and scratch memory, passes plain pointers to the launchers of csrc/cuda/sigmoid_pairs.h on the current
// stream.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "../cuda/sigmoid_pairs.h"
#include "cuda_launch.h"
#include "sigmoid_pairs.h"

namespace ssl_kernels {
namespace {

using at::Tensor;

SigmoidPairsArgs common_args(const Tensor& rows, const Tensor& columns, const Tensor& scale,
                             const Tensor& bias, int64_t diagonal, bool normalize_rows,
                             bool normalize_columns, const PairIds& ids) {
  SigmoidPairsArgs args = {};
  args.dtype = kernel_dtype("sigmoid_pairs: rows", rows.scalar_type());
  args.normalize_rows = normalize_rows;
  args.normalize_columns = normalize_columns;
  args.allow_tf32 = allow_tf32();
  args.N = rows.size(0);
  args.M = columns.size(0);
  args.D = rows.size(1);
  args.diagonal = diagonal;
  for (int i = 0; i < 2; ++i) {
    args.row_strides[i] = rows.stride(i);
    args.column_strides[i] = columns.stride(i);
  }
  args.rows = rows.data_ptr();
  args.columns = columns.data_ptr();
  args.scale = scale.data_ptr();
  args.bias = bias.data_ptr();
  args.row_ids = pointer<int64_t>(ids.rows);
  args.column_ids = pointer<int64_t>(ids.columns);
  args.equal_ids_are_positive = ids.equal_are_positive;
  args.multiply = multiply_by_aten;
  return args;
}

Tensor empty_if(bool needed, const Tensor& like, at::ScalarType dtype) {
  return at::empty(needed ? like.sizes() : at::IntArrayRef({0}), like.options().dtype(dtype));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_pairs_fwd(
    const Tensor& rows, const Tensor& columns, const Tensor& scale, const Tensor& bias, int64_t diagonal,
    bool normalize_rows, bool normalize_columns, bool total, bool keep, bool rows_need_grad,
    bool columns_need_grad, const std::optional<Tensor>& row_ids, const std::optional<Tensor>& column_ids,
    bool equal_ids_are_positive) {
  const auto own_ids = contiguous(row_ids), other_ids = contiguous(column_ids);
  const PairIds ids{own_ids, other_ids, equal_ids_are_positive};
  check_sigmoid_pairs(rows, columns, scale, bias, ids);
  const c10::cuda::CUDAGuard guard(rows.device());
  const bool with_gradients = total && keep;
  const auto acc = accumulation_type(rows);
  SigmoidPairsFwdArgs args = {};
  args.common = common_args(rows, columns, scale, bias, diagonal, normalize_rows, normalize_columns, ids);
  args.total = total;
  args.keep = keep;
  const auto wide = rows.options().dtype(at::kDouble);
  const Tensor losses = total ? at::empty({}, wide) : at::empty({rows.size(0)}, wide);
  const Tensor grad_rows = empty_if(with_gradients && rows_need_grad, rows, acc);
  const Tensor grad_columns = empty_if(with_gradients && columns_need_grad, columns, acc);
  const Tensor grad_scale = empty_if(with_gradients, scale, acc);
  const Tensor grad_bias = empty_if(with_gradients, scale, acc);
  args.losses = pointer<double>(losses);
  args.grad_rows = pointer(grad_rows);
  args.grad_columns = pointer(grad_columns);
  args.grad_scale = pointer(grad_scale);
  args.grad_bias = pointer(grad_bias);
  launch_with_workspace(args, args.common.workspace, rows, sigmoid_pairs_fwd_workspace, ::sigmoid_pairs_fwd);
  return {losses, grad_rows, grad_columns, grad_scale, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sigmoid_pairs_bwd(const Tensor& grad_losses, const Tensor& rows,
                                                             const Tensor& columns, const Tensor& scale,
                                                             const Tensor& bias, int64_t diagonal,
                                                             bool normalize_rows, bool normalize_columns,
                                                             bool rows_need_grad, bool columns_need_grad,
                                                             const std::optional<Tensor>& row_ids,
                                                             const std::optional<Tensor>& column_ids,
                                                             bool equal_ids_are_positive) {
  const auto own_ids = contiguous(row_ids), other_ids = contiguous(column_ids);
  const PairIds ids{own_ids, other_ids, equal_ids_are_positive};
  check_sigmoid_pairs(rows, columns, scale, bias, ids);
  check_sigmoid_pairs_grad(grad_losses, rows);
  const c10::cuda::CUDAGuard guard(rows.device());
  const Tensor g = grad_losses.contiguous();
  SigmoidPairsBwdArgs args = {};
  args.common = common_args(rows, columns, scale, bias, diagonal, normalize_rows, normalize_columns, ids);
  const Tensor grad_rows = empty_if(rows_need_grad, rows, rows.scalar_type());
  const Tensor grad_columns = empty_if(columns_need_grad, columns, rows.scalar_type());
  const Tensor grad_scale = at::empty({}, scale.options()), grad_bias = at::empty({}, scale.options());
  args.grad_losses = pointer<double>(g);
  args.grad_rows = pointer(grad_rows);
  args.grad_columns = pointer(grad_columns);
  args.grad_scale = pointer(grad_scale);
  args.grad_bias = pointer(grad_bias);
  launch_with_workspace(args, args.common.workspace, rows, sigmoid_pairs_bwd_workspace, ::sigmoid_pairs_bwd);
  return {grad_rows, grad_columns, grad_scale, grad_bias};
}

TORCH_LIBRARY_IMPL(ssl_kernels, CUDA, library) {
  library.impl("sigmoid_pairs_fwd.native", &sigmoid_pairs_fwd);
  library.impl("sigmoid_pairs_bwd.native", &sigmoid_pairs_bwd);
}

}  // namespace
}  // namespace ssl_kernels
