// Registers the CUDA kernels as `contrastive_fwd.native` and `contrastive_bwd.native`: allocates results and
// scratch memory, passes plain pointers to the launchers of csrc/cuda/contrastive.h on the current stream.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "../cuda/contrastive.h"
#include "contrastive.h"
#include "cuda_launch.h"

namespace ssl_kernels {
namespace {

using Fwd = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Bwd = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The index tensors are contiguous; those and the operands outlive the launches.
ContrastiveArgs common_args(const at::Tensor& rows, const OptionalTensor& columns, const at::Tensor& scale,
                            const OptionalTensor& positives, const OptionalTensor& row_ids,
                            const OptionalTensor& column_ids, bool normalize_rows, bool normalize_columns,
                            bool keep_diagonal, bool both_directions) {
  const at::Tensor& other = columns ? *columns : rows;
  ContrastiveArgs args = {};
  args.dtype = kernel_dtype("contrastive: rows", rows.scalar_type());
  args.column_dtype = kernel_dtype("contrastive: columns", other.scalar_type());
  args.normalize_rows = normalize_rows;
  args.normalize_columns = normalize_columns;
  args.keep_diagonal = keep_diagonal;
  args.both_directions = both_directions;
  args.allow_tf32 = allow_tf32();
  args.N = rows.size(0);
  args.M = other.size(0);
  args.D = rows.size(1);
  args.P = !positives ? 0 : positives->dim() == 1 ? 1 : positives->size(1);
  for (int i = 0; i < 2; ++i) {
    args.row_strides[i] = rows.stride(i);
    args.column_strides[i] = other.stride(i);
  }
  args.rows = rows.data_ptr();
  args.columns = columns ? columns->data_ptr() : nullptr;
  args.scale = scale.data_ptr();
  args.positives = pointer<int64_t>(positives);
  args.row_ids = pointer<int64_t>(row_ids);
  args.column_ids = pointer<int64_t>(column_ids);
  args.multiply = multiply_by_aten;
  return args;
}

// Columns in another dtype than rows: float16 or bfloat16 beside float32, and none of them gets a gradient.
void check_column_dtype(const at::Tensor& rows, const OptionalTensor& columns, bool both_directions,
                        bool columns_need_grad) {
  if (!columns || columns->scalar_type() == rows.scalar_type()) return;
  TORCH_CHECK(rows.scalar_type() == at::kFloat && !both_directions && !columns_need_grad,
              "contrastive: on cuda rows of ", rows.scalar_type(), " and columns of ", columns->scalar_type(),
              " cannot go together in this call");
}

// The additions of a call, contiguous; they outlive the launches.
struct Additions {
  OptionalTensor column_bias, row_bias, row_limit, exempt;
  bool only_equal_ids;

  bool any() const { return column_bias || row_bias || row_limit || only_equal_ids; }

  ContrastiveAdditions pointers() const {
    return {pointer(column_bias), pointer(row_bias), pointer(row_limit), pointer<uint8_t>(exempt),
            only_equal_ids};
  }
};

Additions additions_of(const OptionalTensor& column_bias, const OptionalTensor& row_bias,
                       const OptionalTensor& row_limit, const OptionalTensor& exempt, bool only_equal_ids) {
  return {contiguous(column_bias), contiguous(row_bias), contiguous(row_limit), contiguous(exempt),
          only_equal_ids};
}

Fwd contrastive_fwd(const at::Tensor& rows, const OptionalTensor& columns, const at::Tensor& scale,
                    const OptionalTensor& positives, const OptionalTensor& row_ids,
                    const OptionalTensor& column_ids, bool normalize_rows, bool normalize_columns,
                    bool keep_diagonal, bool both_directions, bool keep, bool columns_need_grad,
                    const OptionalTensor& column_bias, const OptionalTensor& row_bias,
                    const OptionalTensor& row_limit, const OptionalTensor& exempt, bool only_equal_ids,
                    bool /*equal_weights*/) {
  check_contrastive(rows, columns, scale, positives, row_ids, column_ids);
  check_additions(rows, columns, scale, row_ids, both_directions, column_bias, row_bias, row_limit, exempt,
                  only_equal_ids);
  const Additions additions = additions_of(column_bias, row_bias, row_limit, exempt, only_equal_ids);
  check_column_dtype(rows, columns, both_directions || additions.any(), keep && columns_need_grad);
  const c10::cuda::CUDAGuard guard(rows.device());
  const auto index = contiguous(positives), row_index = contiguous(row_ids),
             column_index = contiguous(column_ids);
  ContrastiveFwdArgs args = {};
  args.common = common_args(rows, columns, scale, index, row_index, column_index, normalize_rows,
                            normalize_columns, keep_diagonal, both_directions);
  const int64_t n = args.common.N, m = args.common.M;
  const auto wide = rows.options().dtype(at::kDouble), acc = rows.options().dtype(accumulation_type(rows));
  const at::Tensor lse = at::empty({n}, wide);
  const at::Tensor column_lse = at::empty({both_directions ? m : 0}, wide);
  const at::Tensor positive_logits = index ? at::empty(index->sizes(), wide) : at::empty({0}, wide);
  const at::Tensor row_rnorm = at::empty({normalize_rows ? n : 0}, acc);
  const at::Tensor column_rnorm = at::empty({normalize_columns && columns ? m : 0}, acc);
  const bool expectation = keep && columns && !columns_need_grad && !both_directions;
  const at::Tensor kept = at::empty(expectation ? rows.sizes() : at::IntArrayRef({0}), acc);
  args.lse = pointer<double>(lse);
  args.column_lse = pointer<double>(column_lse);
  args.positive_logits = pointer<double>(positive_logits);
  args.row_rnorm = pointer(row_rnorm);
  args.column_rnorm = pointer(column_rnorm);
  args.expectation = pointer(kept);
  args.common.additions = additions.pointers();
  if (additions.any()) {
    launch_with_workspace(args, args.common.workspace, rows, contrastive_additions_fwd_workspace,
                          contrastive_additions_fwd);
  } else {
    launch_with_workspace(args, args.common.workspace, rows, contrastive_fwd_workspace, ::contrastive_fwd);
  }
  return {lse, column_lse, positive_logits, row_rnorm, column_rnorm, kept};
}

Bwd contrastive_bwd(const OptionalTensor& grad_lse, const OptionalTensor& grad_column_lse,
                    const OptionalTensor& grad_positive_logits, const at::Tensor& rows,
                    const OptionalTensor& columns, const at::Tensor& scale, const OptionalTensor& positives,
                    const OptionalTensor& row_ids, const OptionalTensor& column_ids, const at::Tensor& lse,
                    const at::Tensor& column_lse, const at::Tensor& row_rnorm, const at::Tensor& column_rnorm,
                    const at::Tensor& kept, bool normalize_rows, bool normalize_columns, bool keep_diagonal,
                    bool both_directions, bool rows_need_grad, bool columns_need_grad,
                    const OptionalTensor& column_bias, const OptionalTensor& row_bias,
                    const OptionalTensor& row_limit, const OptionalTensor& exempt, bool only_equal_ids,
                    bool column_bias_needs_grad, bool row_bias_needs_grad) {
  check_contrastive(rows, columns, scale, positives, row_ids, column_ids);
  check_additions(rows, columns, scale, row_ids, both_directions, column_bias, row_bias, row_limit, exempt,
                  only_equal_ids);
  const Additions additions = additions_of(column_bias, row_bias, row_limit, exempt, only_equal_ids);
  check_column_dtype(rows, columns, both_directions || additions.any(), !holds_expectation(kept));
  TORCH_CHECK(lse.scalar_type() == at::kDouble && lse.numel() == rows.size(0),
              "contrastive: lse must be what contrastive_fwd returned");
  const bool expectation = holds_expectation(kept);
  TORCH_CHECK(!expectation || (kept.sizes() == rows.sizes() &&
                               kept.scalar_type() == accumulation_type(rows) && !columns_need_grad &&
                               !column_bias_needs_grad && !row_bias_needs_grad && (columns || !positives)),
              "contrastive: kept must be what contrastive_fwd returned");
  const c10::cuda::CUDAGuard guard(rows.device());
  const auto index = contiguous(positives), row_index = contiguous(row_ids),
             column_index = contiguous(column_ids);
  const auto g = contiguous(grad_lse), h = contiguous(grad_column_lse), q = contiguous(grad_positive_logits);
  const at::Tensor row_sums = lse.contiguous(), column_sums = column_lse.contiguous(),
                   row_norms = row_rnorm.contiguous(), column_norms = column_rnorm.contiguous(),
                   expected = kept.contiguous();
  ContrastiveBwdArgs args = {};
  args.common = common_args(rows, columns, scale, index, row_index, column_index, normalize_rows,
                            normalize_columns, keep_diagonal, both_directions);
  const bool columns_too = columns && columns_need_grad;
  const at::Tensor grad_rows =
      at::empty(rows_need_grad ? rows.sizes() : at::IntArrayRef({0}), rows.options());
  const at::Tensor grad_columns =
      at::empty(columns_too ? columns->sizes() : at::IntArrayRef({0}), rows.options());
  const at::Tensor grad_scale = at::empty({}, rows.options().dtype(accumulation_type(rows)));
  args.grad_lse = pointer<double>(g);
  args.grad_column_lse = both_directions ? pointer<double>(h) : nullptr;
  args.grad_positive_logits = pointer<double>(q);
  args.lse = pointer<double>(row_sums);
  args.column_lse = pointer<double>(column_sums);
  args.row_rnorm = pointer(row_norms);
  args.column_rnorm = pointer(column_norms);
  args.expectation = expectation ? pointer(expected) : nullptr;
  args.grad_rows = pointer(grad_rows);
  args.grad_columns = pointer(grad_columns);
  args.grad_scale = pointer(grad_scale);
  args.common.additions = additions.pointers();
  const at::Tensor grad_column_bias =
      at::empty({column_bias_needs_grad ? args.common.M : 0}, grad_scale.options());
  const at::Tensor grad_row_bias = at::empty({row_bias_needs_grad ? args.common.N : 0}, grad_scale.options());
  args.grad_column_bias = pointer(grad_column_bias);
  args.grad_row_bias = pointer(grad_row_bias);
  if (additions.any() && !expectation) {
    launch_with_workspace(args, args.common.workspace, rows, contrastive_additions_bwd_workspace,
                          contrastive_additions_bwd);
  } else {
    launch_with_workspace(args, args.common.workspace, rows, contrastive_bwd_workspace, ::contrastive_bwd);
  }
  return {grad_rows, grad_columns, grad_scale, grad_column_bias, grad_row_bias};
}

TORCH_LIBRARY_IMPL(ssl_kernels, CUDA, library) {
  library.impl("contrastive_fwd.native", &contrastive_fwd);
  library.impl("contrastive_bwd.native", &contrastive_bwd);
}

}  // namespace
}  // namespace ssl_kernels
