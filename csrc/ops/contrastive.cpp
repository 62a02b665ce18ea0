// Registers the CPU kernel as `contrastive_fwd.native` and `contrastive_bwd.native`. The schema is defined in
// ssl_kernels/ops/contrastive.py, so that it exists where nothing was compiled.
#include "contrastive.h"

#include <torch/library.h>

#include "../cpu/contrastive.h"

namespace ssl_kernels {
namespace {

cpu::ContrastiveFwd contrastive_fwd(const at::Tensor& rows, const OptionalTensor& columns, const at::Tensor& scale,
                                    const OptionalTensor& positives, const OptionalTensor& row_ids,
                                    const OptionalTensor& column_ids, bool normalize_rows, bool normalize_columns,
                                    bool keep_diagonal, bool both_directions, bool keep, bool columns_need_grad) {
  check_contrastive(rows, columns, scale, positives, row_ids, column_ids);
  return cpu::contrastive_fwd({rows, columns, scale, positives, row_ids, column_ids, normalize_rows,
                               normalize_columns, keep_diagonal, both_directions, keep, columns_need_grad});
}

cpu::ContrastiveBwd contrastive_bwd(const OptionalTensor& grad_lse, const OptionalTensor& grad_column_lse,
                                    const OptionalTensor& grad_positive_logits, const at::Tensor& rows,
                                    const OptionalTensor& columns, const at::Tensor& scale,
                                    const OptionalTensor& positives, const OptionalTensor& row_ids,
                                    const OptionalTensor& column_ids, const at::Tensor& lse,
                                    const at::Tensor& column_lse, const at::Tensor& row_rnorm,
                                    const at::Tensor& column_rnorm, const at::Tensor& kept,
                                    bool normalize_rows, bool normalize_columns, bool keep_diagonal,
                                    bool both_directions, bool rows_need_grad, bool columns_need_grad) {
  check_contrastive(rows, columns, scale, positives, row_ids, column_ids);
  TORCH_CHECK(lse.scalar_type() == at::kDouble && lse.numel() == rows.size(0),
              "contrastive: lse must be what contrastive_fwd returned");
  TORCH_CHECK(kept.dim() != 2 || (kept.sizes() == rows.sizes() && kept.scalar_type() == scale.scalar_type() &&
                                  !columns_need_grad && !both_directions),
              "contrastive: kept must be what contrastive_fwd returned");
  return cpu::contrastive_bwd({rows, columns, scale, positives, row_ids, column_ids, normalize_rows,
                               normalize_columns, keep_diagonal, both_directions},
                              {grad_lse, grad_column_lse, grad_positive_logits, lse.contiguous(),
                               column_lse.contiguous(), row_rnorm.contiguous(), column_rnorm.contiguous(),
                               kept.contiguous(), rows_need_grad, columns_need_grad});
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("contrastive_fwd.native", &contrastive_fwd);
  library.impl("contrastive_bwd.native", &contrastive_bwd);
}

}  // namespace
}  // namespace ssl_kernels
