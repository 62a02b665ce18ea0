// The CPU kernel of `contrastive`. The contract, with every shape, is docs/contrastive.md.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ssl_kernels::cpu {

class Classes;
struct ClassSums;

// What is added to the logits of the sums, and what is left out of them beyond equal ids. All in acc_t but
// `exempt`.
struct ContrastiveAdditions {
  const at::Tensor* column_bias = nullptr;  // (M,): s_ij + column_bias_j in the sum of row i
  const at::Tensor* row_bias = nullptr;     // (N,): s_ij + row_bias_i in the sum of column j
  // (N,): s_ij above it is left out, unless j is a positive of i or exempt.
  const at::Tensor* row_limit = nullptr;
  const at::Tensor* exempt = nullptr;       // (M,) bool
  bool only_equal_ids = false;              // other ids are left out instead of equal ones
};

// Whether logits of the sums are other numbers than those of the products, or not the same in both sums.
inline bool changes_logits(const ContrastiveAdditions& additions) {
  return additions.column_bias || additions.row_bias || additions.row_limit;
}

struct ContrastiveArgs {
  const at::Tensor& rows;
  const std::optional<at::Tensor>& columns;
  const at::Tensor& scale;
  const std::optional<at::Tensor>& positives;
  const std::optional<at::Tensor>& row_ids;
  const std::optional<at::Tensor>& column_ids;
  bool normalize_rows, normalize_columns, keep_diagonal, both_directions;
  bool keep = false;  // whether forward keeps for backward what spares it work
  bool columns_need_grad = false;
  // Below `rows`, where there are no columns; of the same dtype and width.
  const at::Tensor* more_rows = nullptr;
  // Of the square case: which pairs `class_sums` and `class_weight` are about.
  const Classes* classes = nullptr;
  ClassSums* class_sums = nullptr;        // forward adds up the positives' logits here
  // Of classes that are labels: lse is over rows of other classes, column_lse over the others of a row's own.
  bool classes_apart = false;
  ContrastiveAdditions additions = {};
  // In place of `positives`: the positive of row i is column (i + partner) mod M, in the square case with i
  // its partner's own; where it is left out, it is in no sum.
  int64_t partner = -1;
  bool leaves_partner_out = false;
  // Whether all rows' lse are expected to get the same gradient, and rows and columns to need theirs.
  bool equal_weights = false;

  bool has_positives() const { return partner >= 0 || positives.has_value(); }
  int64_t row_count() const { return rows.size(0) + (more_rows ? more_rows->size(0) : 0); }
};

struct ContrastiveSaved {
  const std::optional<at::Tensor>& grad_lse;
  const std::optional<at::Tensor>& grad_column_lse;
  const std::optional<at::Tensor>& grad_positive_logits;
  const at::Tensor& lse;
  const at::Tensor& column_lse;
  const at::Tensor& row_rnorm;
  const at::Tensor& column_rnorm;
  const at::Tensor& kept;
  bool rows_need_grad, columns_need_grad;
  const double* class_weight = nullptr;  // (N,): A_ij less class_weight_i for each positive j of row i
  bool column_bias_needs_grad = false, row_bias_needs_grad = false;
  bool scale_needs_grad = true;  // or else what backward gives for it may be anything
};

// lse, column_lse, positive_logits, row_rnorm, column_rnorm, kept
using ContrastiveFwd = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// grad_rows, grad_columns, grad_scale, grad_column_bias, grad_row_bias
using ContrastiveBwd = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ContrastiveFwd contrastive_fwd(const ContrastiveArgs& args);
ContrastiveBwd contrastive_bwd(const ContrastiveArgs& args, const ContrastiveSaved& saved);

// losses, counts, lse, row_rnorm, kept
using ClassContrastiveFwd = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// `contrastive` of the square case less the mean logit of each row's positives, 0 where it has none; how many
// they are. docs/contrastive.md has the contract.
ClassContrastiveFwd class_contrastive_fwd(const at::Tensor& rows, const at::Tensor& scale,
                                          const at::Tensor& positives, bool normalize, bool keep);
// grad_rows, grad_scale
std::tuple<at::Tensor, at::Tensor> class_contrastive_bwd(const at::Tensor& grad_losses,
                                                         const at::Tensor& rows, const at::Tensor& scale,
                                                         const at::Tensor& positives,
                                                         const at::Tensor& counts, const at::Tensor& lse,
                                                         const at::Tensor& row_rnorm, const at::Tensor& kept,
                                                         bool normalize, bool rows_need_grad);

// `contrastive` of the square case with two sums of each row: lse is over the rows of other classes, and
// column_lse over the others of its own; -inf where there are none. `classes` are labels, (N,) int64.
ContrastiveFwd contrastive_apart_fwd(const at::Tensor& rows, const at::Tensor& scale,
                                     const at::Tensor& classes, bool normalize, bool keep);
// grad_rows, grad_scale
std::tuple<at::Tensor, at::Tensor> contrastive_apart_bwd(
    const at::Tensor& grad_lse, const at::Tensor& grad_column_lse, const at::Tensor& rows,
    const at::Tensor& scale, const at::Tensor& classes, const at::Tensor& lse, const at::Tensor& column_lse,
    const at::Tensor& row_rnorm, const at::Tensor& kept, bool normalize, bool rows_need_grad);

}  // namespace ssl_kernels::cpu
