// Differentiates `contrastive_fwd.native` by `contrastive_bwd.native`, on every device. In C++ and not in Python, since
// at small batches the interpreter's part of a backward costs more than the kernels; the other backends' Function
// is in ssl_kernels/ops/contrastive.py.
#include <torch/library.h>

#include "contrastive_autograd.h"
#include "no_second_derivative.h"
#include "saved.h"
#include "transforms.h"

namespace ssl_kernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

Tensor or_undefined(const OptionalTensor& tensor) { return tensor ? *tensor : Tensor(); }

struct Contrastive : Function<Contrastive> {
  static variable_list forward(AutogradContext* ctx, const Tensor& rows, const OptionalTensor& columns,
                               const Tensor& scale, const OptionalTensor& positives, const OptionalTensor& row_ids,
                               const OptionalTensor& column_ids, bool normalize_rows, bool normalize_columns,
                               bool keep_diagonal, bool both_directions) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [lse, column_lse, positive_logits, row_rnorm, column_rnorm, kept] = contrastive_forward_op().call(
        rows, columns, scale, positives, row_ids, column_ids, normalize_rows, normalize_columns, keep_diagonal,
        both_directions, /*keep=*/true, /*columns_need_grad=*/columns && columns->requires_grad());
    // With the expectation kept, and no positives to look up, backward reads rows and scale alone.
    if (kept.dim() == 2 && !positives)
      ctx->save_for_backward(savable({rows, Tensor(), scale, Tensor(), Tensor(), Tensor(), lse, column_lse, row_rnorm,
                                      column_rnorm, kept}));
    else
      ctx->save_for_backward(savable({rows, or_undefined(columns), scale, or_undefined(positives), or_undefined(row_ids),
                                      or_undefined(column_ids), lse, column_lse, row_rnorm, column_rnorm, kept}));
    ctx->saved_data["flags"] = std::vector<bool>{normalize_rows, normalize_columns, keep_diagonal, both_directions};
    ctx->saved_data["square"] = !columns.has_value();
    ctx->mark_non_differentiable({row_rnorm, column_rnorm, kept});
    ctx->set_materialize_grads(false);
    return {lse, column_lse, positive_logits, row_rnorm, column_rnorm, kept};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto flags = ctx->saved_data["flags"].toBoolList();
    const bool both_directions = flags[3];
    // needs_input_grad numbers the tensors that were there: rows, columns if any, scale.
    const bool square = ctx->saved_data["square"].toBool();
    const bool rows_need_grad = ctx->needs_input_grad(0), columns_need_grad = !square && ctx->needs_input_grad(1);
    const bool scale_needs_grad = ctx->needs_input_grad(square ? 1 : 2);
    variable_list results;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      auto [grad_rows, grad_columns, grad_scale] = contrastive_backward_op().call(
          if_defined(grads[0]), both_directions ? if_defined(grads[1]) : std::nullopt, if_defined(grads[2]), saved[0],
          if_defined(saved[1]), saved[2], if_defined(saved[3]), if_defined(saved[4]), if_defined(saved[5]), saved[6],
          saved[7], saved[8], saved[9], saved[10], flags[0], flags[1], flags[2], both_directions, rows_need_grad,
          columns_need_grad);
      results = {grad_rows, grad_columns, grad_scale};
    }
    results = without_second_derivative("contrastive", results,
                                        {saved[0], saved[1], saved[2], grads[0], grads[1], grads[2]});
    variable_list by_input(10);
    if (rows_need_grad) by_input[0] = results[0];
    if (columns_need_grad) by_input[1] = results[1];
    if (scale_needs_grad) by_input[2] = results[2];
    return by_input;
  }
};

ContrastiveForwardResults contrastive_fwd(const Tensor& rows, const OptionalTensor& columns, const Tensor& scale,
                               const OptionalTensor& positives, const OptionalTensor& row_ids,
                               const OptionalTensor& column_ids, bool normalize_rows, bool normalize_columns,
                               bool keep_diagonal, bool both_directions, bool keep, bool columns_need_grad) {
  refuse_forward_mode("contrastive", {&rows, columns ? &*columns : nullptr, &scale});
  const bool differentiate = at::GradMode::is_enabled() &&
                             (rows.requires_grad() || scale.requires_grad() || (columns && columns->requires_grad()));
  if (!differentiate) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return contrastive_forward_op().call(rows, columns, scale, positives, row_ids, column_ids, normalize_rows, normalize_columns,
                             keep_diagonal, both_directions, keep, columns_need_grad);
  }
  refuse_torch_func("contrastive");
  const variable_list results =
      Contrastive::apply(rows, columns, scale, positives, row_ids, column_ids, normalize_rows, normalize_columns,
                         keep_diagonal, both_directions);
  return {results[0], results[1], results[2], results[3], results[4], results[5]};
}

TORCH_LIBRARY_IMPL(ssl_kernels, Autograd, library) { library.impl("contrastive_fwd.native", &contrastive_fwd); }

}  // namespace
}  // namespace ssl_kernels
