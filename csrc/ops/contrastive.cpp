// `contrastive_fwd.native` and `contrastive_bwd.native`: checks and calls of the kernel on the CPU, and on
// every device the node that differentiates the one by the other. In C++ and not in Python, since at small
// batches the interpreter's part of a backward costs more than the kernels; the other backends' is in
// ssl_kernels/ops/operation.py. The schema is defined in ssl_kernels/ops/contrastive.py, so that it exists
// where nothing was compiled.
#include "contrastive.h"

#include <torch/library.h>

#include "../cpu/contrastive.h"
#include "autograd.h"
#include "contrastive_operators.h"

namespace ssl_kernels {
namespace {

const Tensor* pointer_to(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

cpu::ContrastiveFwd forward_on_cpu(const Tensor& rows, const OptionalTensor& columns, const Tensor& scale,
                                   const OptionalTensor& positives, const OptionalTensor& row_ids,
                                   const OptionalTensor& column_ids, bool normalize_rows,
                                   bool normalize_columns, bool keep_diagonal, bool both_directions,
                                   bool keep, bool columns_need_grad, const OptionalTensor& column_bias,
                                   const OptionalTensor& row_bias, const OptionalTensor& row_limit,
                                   const OptionalTensor& exempt, bool only_equal_ids, bool equal_weights) {
  check_contrastive(rows, columns, scale, positives, row_ids, column_ids);
  check_additions(rows, columns, scale, row_ids, both_directions, column_bias, row_bias, row_limit, exempt,
                  only_equal_ids);
  cpu::ContrastiveArgs args{rows, columns, scale, positives, row_ids, column_ids, normalize_rows,
                            normalize_columns, keep_diagonal, both_directions, keep, columns_need_grad};
  args.additions = {pointer_to(column_bias), pointer_to(row_bias), pointer_to(row_limit), pointer_to(exempt),
                    only_equal_ids};
  args.equal_weights = equal_weights;
  return cpu::contrastive_fwd(args);
}

cpu::ContrastiveBwd backward_on_cpu(
    const OptionalTensor& grad_lse, const OptionalTensor& grad_column_lse,
    const OptionalTensor& grad_positive_logits, const Tensor& rows, const OptionalTensor& columns,
    const Tensor& scale, const OptionalTensor& positives, const OptionalTensor& row_ids,
    const OptionalTensor& column_ids, const Tensor& lse, const Tensor& column_lse, const Tensor& row_rnorm,
    const Tensor& column_rnorm, const Tensor& kept, bool normalize_rows, bool normalize_columns,
    bool keep_diagonal, bool both_directions, bool rows_need_grad, bool columns_need_grad,
    const OptionalTensor& column_bias, const OptionalTensor& row_bias, const OptionalTensor& row_limit,
    const OptionalTensor& exempt, bool only_equal_ids, bool column_bias_needs_grad,
    bool row_bias_needs_grad) {
  check_contrastive(rows, columns, scale, positives, row_ids, column_ids);
  check_additions(rows, columns, scale, row_ids, both_directions, column_bias, row_bias, row_limit, exempt,
                  only_equal_ids);
  TORCH_CHECK(lse.scalar_type() == at::kDouble && lse.numel() == rows.size(0),
              "contrastive: lse must be what contrastive_fwd returned");
  TORCH_CHECK(!holds_expectation(kept) ||
                  (kept.sizes() == rows.sizes() && kept.scalar_type() == scale.scalar_type() &&
                   !columns_need_grad && !both_directions && !column_bias_needs_grad),
              "contrastive: kept must be what contrastive_fwd returned");
  cpu::ContrastiveArgs args{rows, columns, scale, positives, row_ids, column_ids, normalize_rows,
                            normalize_columns, keep_diagonal, both_directions};
  args.additions = {pointer_to(column_bias), pointer_to(row_bias), pointer_to(row_limit), pointer_to(exempt),
                    only_equal_ids};
  return cpu::contrastive_bwd(args,
                              {grad_lse, grad_column_lse, grad_positive_logits, lse.contiguous(),
                               column_lse.contiguous(), row_rnorm.contiguous(), column_rnorm.contiguous(),
                               kept.contiguous(), rows_need_grad, columns_need_grad, /*class_weight=*/nullptr,
                               column_bias_needs_grad, row_bias_needs_grad});
}

constexpr size_t kSaved = 11;  // tensors that every call saves; the additions follow

struct Contrastive : Node<Contrastive> {
  static variable_list forward(AutogradContext* ctx, const Tensor& rows, const OptionalTensor& columns,
                               const Tensor& scale, const OptionalTensor& positives,
                               const OptionalTensor& row_ids, const OptionalTensor& column_ids,
                               bool normalize_rows, bool normalize_columns, bool keep_diagonal,
                               bool both_directions, const OptionalTensor& column_bias,
                               const OptionalTensor& row_bias, const OptionalTensor& row_limit,
                               const OptionalTensor& exempt, bool only_equal_ids, bool equal_weights) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const bool columns_need_grad =
        (columns && columns->requires_grad()) || (column_bias && column_bias->requires_grad());
    const bool both_need_grad = rows.requires_grad() && columns && columns->requires_grad();
    auto [lse, column_lse, positive_logits, row_rnorm, column_rnorm, kept] = contrastive_forward_op().call(
        rows, columns, scale, positives, row_ids, column_ids, normalize_rows, normalize_columns,
        keep_diagonal, both_directions, /*keep=*/true, columns_need_grad, column_bias, row_bias, row_limit,
        exempt, only_equal_ids, equal_weights && both_need_grad);
    // With the expectation kept, and no positives to look up, backward reads rows and scale alone.
    variable_list saved;
    if (holds_expectation(kept) && !positives)
      saved = {rows, Tensor(),   scale,     Tensor(),     Tensor(), Tensor(),
               lse,  column_lse, row_rnorm, column_rnorm, kept};
    else
      saved = {rows, or_undefined(columns), scale, or_undefined(positives), or_undefined(row_ids),
               or_undefined(column_ids), lse, column_lse, row_rnorm, column_rnorm, kept};
    if ((column_bias || row_bias || row_limit || only_equal_ids) && !holds_expectation(kept)) {
      for (const OptionalTensor* each : {&column_bias, &row_bias, &row_limit, &exempt})
        saved.push_back(or_undefined(*each));
      ctx->saved_data["only_equal_ids"] = only_equal_ids;
      // Of the first bias among the tensors that were there.
      ctx->saved_data["tensors_before"] = 2 + int64_t{columns.has_value()} + int64_t{positives.has_value()} +
                                          int64_t{row_ids.has_value()} + int64_t{column_ids.has_value()};
    }
    ctx->save_for_backward(savable(std::move(saved)));
    ctx->saved_data["flags"] =
        std::vector<bool>{normalize_rows, normalize_columns, keep_diagonal, both_directions};
    ctx->saved_data["square"] = !columns.has_value();
    ctx->mark_non_differentiable({row_rnorm, column_rnorm, kept});
    ctx->set_materialize_grads(false);
    return {lse, column_lse, positive_logits, row_rnorm, column_rnorm, kept};
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto flags = ctx->saved_data["flags"].toBoolList();
    const bool both_directions = flags[3];
    // needs_input_grad numbers the tensors that were there: rows, columns if any, scale.
    const bool square = ctx->saved_data["square"].toBool();
    const bool rows_need_grad = ctx->needs_input_grad(0),
               columns_need_grad = !square && ctx->needs_input_grad(1);
    const bool scale_needs_grad = ctx->needs_input_grad(square ? 1 : 2);
    OptionalTensor column_bias, row_bias, row_limit, exempt;
    bool only_equal_ids = false, column_bias_needs_grad = false, row_bias_needs_grad = false;
    if (saved.size() > kSaved) {
      column_bias = if_defined(saved[kSaved]), row_bias = if_defined(saved[kSaved + 1]);
      row_limit = if_defined(saved[kSaved + 2]), exempt = if_defined(saved[kSaved + 3]);
      only_equal_ids = ctx->saved_data["only_equal_ids"].toBool();
      const int64_t before = ctx->saved_data["tensors_before"].toInt();
      column_bias_needs_grad = column_bias && ctx->needs_input_grad(before);
      row_bias_needs_grad = row_bias && ctx->needs_input_grad(before + column_bias.has_value());
    }
    variable_list results;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      auto [grad_rows, grad_columns, grad_scale, grad_column_bias, grad_row_bias] =
          contrastive_backward_op().call(
              if_defined(grads[0]), both_directions ? if_defined(grads[1]) : std::nullopt,
              if_defined(grads[2]), saved[0], if_defined(saved[1]), saved[2], if_defined(saved[3]),
              if_defined(saved[4]), if_defined(saved[5]), saved[6], saved[7], saved[8], saved[9], saved[10],
              flags[0], flags[1], flags[2], both_directions, rows_need_grad, columns_need_grad, column_bias,
              row_bias, row_limit, exempt, only_equal_ids, column_bias_needs_grad, row_bias_needs_grad);
      results = {grad_rows, grad_columns, grad_scale};
      if (column_bias_needs_grad || row_bias_needs_grad)
        results.insert(results.end(), {grad_column_bias, grad_row_bias});
    }
    variable_list dependencies = {saved[0], saved[1], saved[2], grads[0], grads[1], grads[2]};
    if (results.size() > 3)
      dependencies.insert(dependencies.end(), {or_undefined(column_bias), or_undefined(row_bias)});
    results = without_second_derivative("contrastive", results, dependencies);
    variable_list by_input(16);
    if (rows_need_grad) by_input[0] = results[0];
    if (columns_need_grad) by_input[1] = results[1];
    if (scale_needs_grad) by_input[2] = results[2];
    if (column_bias_needs_grad) by_input[10] = results[3];
    if (row_bias_needs_grad) by_input[11] = results[4];
    return by_input;
  }
};

ContrastiveForwardResults differentiable_forward(
    const Tensor& rows, const OptionalTensor& columns, const Tensor& scale, const OptionalTensor& positives,
    const OptionalTensor& row_ids, const OptionalTensor& column_ids, bool normalize_rows,
    bool normalize_columns, bool keep_diagonal, bool both_directions, bool keep, bool columns_need_grad,
    const OptionalTensor& column_bias, const OptionalTensor& row_bias, const OptionalTensor& row_limit,
    const OptionalTensor& exempt, bool only_equal_ids, bool equal_weights) {
  refuse_forward_mode("contrastive", {&rows, columns ? &*columns : nullptr, &scale});
  if (column_bias || row_bias)
    refuse_forward_mode("contrastive",
                        {column_bias ? &*column_bias : nullptr, row_bias ? &*row_bias : nullptr, nullptr});
  const auto learns = [](const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); };
  const bool differentiate =
      at::GradMode::is_enabled() && (rows.requires_grad() || scale.requires_grad() || learns(columns) ||
                                     learns(column_bias) || learns(row_bias));
  if (!differentiate) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return contrastive_forward_op().call(rows, columns, scale, positives, row_ids, column_ids, normalize_rows,
                                         normalize_columns, keep_diagonal, both_directions, keep,
                                         columns_need_grad, column_bias, row_bias, row_limit, exempt,
                                         only_equal_ids, equal_weights);
  }
  refuse_torch_func("contrastive");
  const variable_list results = Contrastive::apply(
      rows, columns, scale, positives, row_ids, column_ids, normalize_rows, normalize_columns, keep_diagonal,
      both_directions, column_bias, row_bias, row_limit, exempt, only_equal_ids, equal_weights);
  return {results[0], results[1], results[2], results[3], results[4], results[5]};
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("contrastive_fwd.native", &forward_on_cpu);
  library.impl("contrastive_bwd.native", &backward_on_cpu);
}

TORCH_LIBRARY_IMPL(ssl_kernels, Autograd, library) {
  library.impl("contrastive_fwd.native", &differentiable_forward);
}

}  // namespace
}  // namespace ssl_kernels
