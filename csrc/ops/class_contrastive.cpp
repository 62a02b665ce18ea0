// Registers the CPU kernel as `class_contrastive_fwd.native` and `class_contrastive_bwd.native`, and
// differentiates the one by the other. The schema is in ssl_kernels/ops/class_contrastive.py.
#include <torch/library.h>

#include "../cpu/contrastive.h"
#include "autograd.h"
#include "contrastive.h"

namespace ssl_kernels {
namespace {

using ForwardOp = cpu::ClassContrastiveFwd(const Tensor& rows, const Tensor& scale, const Tensor& positives,
                                           bool normalize, bool keep);
using BackwardOp = std::tuple<Tensor, Tensor>(const Tensor& grad_losses, const Tensor& rows,
                                              const Tensor& scale, const Tensor& positives,
                                              const Tensor& counts, const Tensor& lse,
                                              const Tensor& row_rnorm, const Tensor& kept, bool normalize,
                                              bool rows_need_grad);

const auto& forward_op() {
  static const auto op = native_overload<ForwardOp>("ssl_kernels::class_contrastive_fwd");
  return op;
}

const auto& backward_op() {
  static const auto op = native_overload<BackwardOp>("ssl_kernels::class_contrastive_bwd");
  return op;
}

cpu::ClassContrastiveFwd forward(const Tensor& rows, const Tensor& scale, const Tensor& positives,
                                 bool normalize, bool keep) {
  check_contrastive(rows, std::nullopt, scale, std::nullopt, std::nullopt, std::nullopt);
  return cpu::class_contrastive_fwd(rows, scale, positives, normalize, keep);
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_losses, const Tensor& rows, const Tensor& scale,
                                    const Tensor& positives, const Tensor& counts, const Tensor& lse,
                                    const Tensor& row_rnorm, const Tensor& kept, bool normalize,
                                    bool rows_need_grad) {
  check_contrastive(rows, std::nullopt, scale, std::nullopt, std::nullopt, std::nullopt);
  for (const Tensor* each : {&grad_losses, &counts, &lse})
    TORCH_CHECK(each->scalar_type() == at::kDouble && each->numel() == rows.size(0) && each->dim() == 1,
                "class_contrastive: grad_losses, counts and lse must be (N,) float64");
  return cpu::class_contrastive_bwd(grad_losses, rows, scale, positives, counts, lse.contiguous(), row_rnorm,
                                    kept, normalize, rows_need_grad);
}

struct ClassContrastive : Node<ClassContrastive> {
  static variable_list forward(AutogradContext* ctx, const Tensor& rows, const Tensor& scale,
                               const Tensor& positives, bool normalize) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [losses, counts, lse, row_rnorm, kept] =
        forward_op().call(rows, scale, positives, normalize, /*keep=*/true);
    ctx->save_for_backward(savable({rows, scale, positives, counts, lse, row_rnorm, kept}));
    ctx->saved_data["normalize"] = normalize;
    ctx->mark_non_differentiable({counts, lse, row_rnorm, kept});
    ctx->set_materialize_grads(false);
    return {losses, counts, lse, row_rnorm, kept};
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    variable_list by_input(4);
    if (!grads[0].defined()) return by_input;
    const variable_list saved = ctx->get_saved_variables();
    const bool rows_need_grad = ctx->needs_input_grad(0), scale_needs_grad = ctx->needs_input_grad(1);
    variable_list results;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      auto [grad_rows, grad_scale] =
          backward_op().call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6],
                             ctx->saved_data["normalize"].toBool(), rows_need_grad);
      results = {grad_rows, grad_scale};
    }
    results = without_second_derivative("class_contrastive", results, {saved[0], saved[1], grads[0]});
    if (rows_need_grad) by_input[0] = results[0];
    if (scale_needs_grad) by_input[1] = results[1];
    return by_input;
  }
};

cpu::ClassContrastiveFwd class_contrastive_fwd(const Tensor& rows, const Tensor& scale,
                                               const Tensor& positives, bool normalize, bool keep) {
  refuse_forward_mode("class_contrastive", {&rows, &scale});
  if (!at::GradMode::is_enabled() || !(rows.requires_grad() || scale.requires_grad())) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return forward_op().call(rows, scale, positives, normalize, keep);
  }
  refuse_torch_func("class_contrastive");
  const variable_list results = ClassContrastive::apply(rows, scale, positives, normalize);
  return {results[0], results[1], results[2], results[3], results[4]};
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("class_contrastive_fwd.native", &forward);
  library.impl("class_contrastive_bwd.native", &backward);
}

TORCH_LIBRARY_IMPL(ssl_kernels, Autograd, library) {
  library.impl("class_contrastive_fwd.native", &class_contrastive_fwd);
}

}  // namespace
}  // namespace ssl_kernels
