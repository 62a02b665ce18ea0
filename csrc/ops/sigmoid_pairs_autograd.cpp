// Differentiates `sigmoid_pairs_fwd.native`: by the gradients that the forward made of a total, else by
// `sigmoid_pairs_bwd.native`. In C++ for the sake of small batches; the other backends' node is
// in ssl_kernels/ops/operation.py.
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include "autograd.h"
#include "sigmoid_pairs.h"

namespace ssl_kernels {
namespace {

using ForwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using ForwardOp = ForwardResults(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, bool,
                                 bool, bool, bool, bool, bool, const OptionalTensor&, const OptionalTensor&,
                                 bool);
using BackwardOp = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                              const Tensor&, const Tensor&, int64_t, bool,
                                                              bool, bool, bool, const OptionalTensor&,
                                                              const OptionalTensor&, bool);

const auto& forward_op() {
  static const auto op = native_overload<ForwardOp>("ssl_kernels::sigmoid_pairs_fwd");
  return op;
}

const auto& backward_op() {
  static const auto op = native_overload<BackwardOp>("ssl_kernels::sigmoid_pairs_bwd");
  return op;
}

struct SigmoidPairs : Node<SigmoidPairs> {
  static variable_list forward(AutogradContext* ctx, const Tensor& rows, const Tensor& columns,
                               const Tensor& scale, const Tensor& bias, int64_t diagonal, bool normalize_rows,
                               bool normalize_columns, bool total, bool rows_need_grad,
                               bool columns_need_grad, const OptionalTensor& row_ids,
                               const OptionalTensor& column_ids, bool equal_ids_are_positive) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [losses, grad_rows, grad_columns, grad_scale, grad_bias] = forward_op().call(
        rows, columns, scale, bias, diagonal, normalize_rows, normalize_columns, total,
        /*keep=*/true, rows_need_grad, columns_need_grad, row_ids, column_ids, equal_ids_are_positive);
    variable_list saved{rows, columns, scale, bias, grad_rows, grad_columns, grad_scale, grad_bias};
    if (row_ids && !total) saved.insert(saved.end(), {*row_ids, *column_ids});
    ctx->save_for_backward(savable(std::move(saved)));
    ctx->saved_data["diagonal"] = diagonal;
    ctx->saved_data["flags"] =
        std::vector<bool>{normalize_rows, normalize_columns, total, equal_ids_are_positive};
    ctx->mark_non_differentiable({grad_rows, grad_columns, grad_scale, grad_bias});
    ctx->set_materialize_grads(false);
    return {losses, grad_rows, grad_columns, grad_scale, grad_bias};
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    variable_list by_input(13);
    if (!grads[0].defined()) return by_input;
    const variable_list saved = ctx->get_saved_variables();
    const auto flags = ctx->saved_data["flags"].toBoolList();
    const bool needed[] = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                           ctx->needs_input_grad(3)};
    variable_list results(4);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      if (flags[2]) {
        for (int k = 0; k < 4; ++k)
          results[k] = needed[k] ? at::mul(saved[4 + k], grads[0]).to(saved[k].scalar_type()) : saved[4 + k];
      } else {
        OptionalTensor row_ids, column_ids;
        if (saved.size() > 8) row_ids = saved[8], column_ids = saved[9];
        std::tie(results[0], results[1], results[2], results[3]) = backward_op().call(
            grads[0], saved[0], saved[1], saved[2], saved[3], ctx->saved_data["diagonal"].toInt(), flags[0],
            flags[1], needed[0], needed[1], row_ids, column_ids, flags[3]);
      }
    }
    results = without_second_derivative("sigmoid_pairs", results,
                                        {saved[0], saved[1], saved[2], saved[3], grads[0]});
    for (int k = 0; k < 4; ++k)
      if (needed[k]) by_input[k] = results[k];
    return by_input;
  }
};

ForwardResults sigmoid_pairs_fwd(const Tensor& rows, const Tensor& columns, const Tensor& scale,
                                 const Tensor& bias, int64_t diagonal, bool normalize_rows,
                                 bool normalize_columns, bool total, bool keep, bool rows_need_grad,
                                 bool columns_need_grad, const OptionalTensor& row_ids,
                                 const OptionalTensor& column_ids, bool equal_ids_are_positive) {
  refuse_forward_mode("sigmoid_pairs", {&rows, &columns, &scale, &bias});
  const bool differentiate = at::GradMode::is_enabled() && (rows.requires_grad() || columns.requires_grad() ||
                                                            scale.requires_grad() || bias.requires_grad());
  if (!differentiate) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return forward_op().call(rows, columns, scale, bias, diagonal, normalize_rows, normalize_columns, total,
                             keep, rows_need_grad, columns_need_grad, row_ids, column_ids,
                             equal_ids_are_positive);
  }
  refuse_torch_func("sigmoid_pairs");
  const variable_list results = SigmoidPairs::apply(
      rows, columns, scale, bias, diagonal, normalize_rows, normalize_columns, total, rows.requires_grad(),
      columns.requires_grad(), row_ids, column_ids, equal_ids_are_positive);
  return {results[0], results[1], results[2], results[3], results[4]};
}

TORCH_LIBRARY_IMPL(ssl_kernels, Autograd, library) {
  library.impl("sigmoid_pairs_fwd.native", &sigmoid_pairs_fwd);
}

}  // namespace
}  // namespace ssl_kernels
