// Registers the CPU kernel as `contrastive_fwd.native` and `contrastive_bwd.native`. The schema is defined in
// ssl_kernels/ops/contrastive.py, so that it exists where nothing was compiled.
#include "contrastive.h"

#include <torch/library.h>

#include "../cpu/contrastive.h"

namespace ssl_kernels {
namespace {

const at::Tensor* pointer_to(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

cpu::ContrastiveFwd contrastive_fwd(const at::Tensor& rows, const OptionalTensor& columns, const at::Tensor& scale,
                                    const OptionalTensor& positives, const OptionalTensor& row_ids,
                                    const OptionalTensor& column_ids, bool normalize_rows, bool normalize_columns,
                                    bool keep_diagonal, bool both_directions, bool keep, bool columns_need_grad,
                                    const OptionalTensor& column_bias,
                                    const OptionalTensor& row_bias, const OptionalTensor& row_limit,
                                    const OptionalTensor& exempt, bool only_equal_ids) {
  check_contrastive(rows, columns, scale, positives, row_ids, column_ids);
  check_additions(rows, columns, scale, row_ids, both_directions, column_bias, row_bias, row_limit, exempt, only_equal_ids);
  cpu::ContrastiveArgs args{rows, columns, scale, positives, row_ids, column_ids, normalize_rows,
                            normalize_columns, keep_diagonal, both_directions, keep, columns_need_grad};
  args.additions = {pointer_to(column_bias), pointer_to(row_bias), pointer_to(row_limit), pointer_to(exempt), only_equal_ids};
  return cpu::contrastive_fwd(args);
}

cpu::ContrastiveBwd contrastive_bwd(const OptionalTensor& grad_lse, const OptionalTensor& grad_column_lse,
                                    const OptionalTensor& grad_positive_logits, const at::Tensor& rows,
                                    const OptionalTensor& columns, const at::Tensor& scale,
                                    const OptionalTensor& positives, const OptionalTensor& row_ids,
                                    const OptionalTensor& column_ids, const at::Tensor& lse,
                                    const at::Tensor& column_lse, const at::Tensor& row_rnorm,
                                    const at::Tensor& column_rnorm, const at::Tensor& kept,
                                    bool normalize_rows, bool normalize_columns, bool keep_diagonal,
                                    bool both_directions, bool rows_need_grad, bool columns_need_grad,
                                    const OptionalTensor& column_bias,
                                    const OptionalTensor& row_bias, const OptionalTensor& row_limit,
                                    const OptionalTensor& exempt, bool only_equal_ids, bool column_bias_needs_grad, bool row_bias_needs_grad) {
  check_contrastive(rows, columns, scale, positives, row_ids, column_ids);
  check_additions(rows, columns, scale, row_ids, both_directions, column_bias, row_bias, row_limit, exempt, only_equal_ids);
  TORCH_CHECK(lse.scalar_type() == at::kDouble && lse.numel() == rows.size(0),
              "contrastive: lse must be what contrastive_fwd returned");
  TORCH_CHECK(kept.dim() != 2 || (kept.sizes() == rows.sizes() && kept.scalar_type() == scale.scalar_type() &&
                                  !columns_need_grad && !both_directions && !column_bias_needs_grad),
              "contrastive: kept must be what contrastive_fwd returned");
  cpu::ContrastiveArgs args{rows, columns, scale, positives, row_ids, column_ids, normalize_rows,
                            normalize_columns, keep_diagonal, both_directions};
  args.additions = {pointer_to(column_bias), pointer_to(row_bias), pointer_to(row_limit), pointer_to(exempt), only_equal_ids};
  return cpu::contrastive_bwd(args,
                              {grad_lse, grad_column_lse, grad_positive_logits, lse.contiguous(),
                               column_lse.contiguous(), row_rnorm.contiguous(), column_rnorm.contiguous(),
                               kept.contiguous(), rows_need_grad, columns_need_grad, /*class_weight=*/nullptr,
                               column_bias_needs_grad, row_bias_needs_grad});
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("contrastive_fwd.native", &contrastive_fwd);
  library.impl("contrastive_bwd.native", &contrastive_bwd);
}

}  // namespace
}  // namespace ssl_kernels
