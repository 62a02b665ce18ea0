// `paired_logits.native`: the function of that name in ssl_kernels/losses/_rows.py as one node of autograd,
// on every device. At small batches the interpreter and the nodes of the composed form cost more than the
// products.
//
//   logits_ij = scale <x̂_i, ŷ_ij>;  with w_ij = scale g_ij / ‖y_ij‖ and c_ij = scale g_ij <x̂_i, ŷ_ij>:
//   dx̂_i = Σ_j w_ij y_ij,  <x̂_i, dx̂_i> = Σ_j c_ij;  dy_ij = w_ij x̂_i − c_ij / ‖y_ij‖² y_ij;
//   dscale = Σ_ij g_ij <x̂_i, ŷ_ij>
#include <ATen/ops/bmm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "autograd.h"
#include "unit_rows.h"

namespace ssl_kernels {
namespace {

struct PairedLogits : Node<PairedLogits> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const Tensor& scale,
                        bool normalize) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // bmm would be cast
    const Tensor rows = x.to(accumulation_type(x)), others = y.to(accumulation_type(y));
    Tensor unit = rows, x_rnorm, y_rnorm;
    if (normalize) {
      x_rnorm = reciprocal_norms(rows);
      y_rnorm = reciprocal_norms(others);
      unit = rows.mul(x_rnorm.unsqueeze(1));
    }
    const Tensor products = at::bmm(unit.unsqueeze(1), others.mT()).squeeze(1).to(at::kDouble);
    if (normalize) products.mul_(y_rnorm);
    ctx->save_for_backward(savable({x, y, scale, unit, products, x_rnorm, y_rnorm}));
    return products.mul(scale);
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad = grads[0], &x = saved[0], &y = saved[1], &scale = saved[2], &unit = saved[3];
    const Tensor &products = saved[4], &x_rnorm = saved[5], &y_rnorm = saved[6];
    const bool normalize = x_rnorm.defined();
    variable_list by_input(4);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      const Tensor weighted = grad.mul(products);
      if (ctx->needs_input_grad(2)) by_input[2] = weighted.sum().to(scale.scalar_type());
      const Tensor turn = weighted.mul_(scale).to(unit.scalar_type());  // c
      Tensor weight = grad.mul(scale).to(unit.scalar_type());
      if (normalize) weight.mul_(y_rnorm);
      if (ctx->needs_input_grad(0)) {
        Tensor grad_x = at::bmm(weight.unsqueeze(1), y.to(unit.scalar_type())).squeeze(1);
        if (normalize) grad_x = through_normalization_(grad_x, unit, x_rnorm, turn.sum(1));
        by_input[0] = grad_x.to(x.scalar_type());
      }
      if (ctx->needs_input_grad(1)) {
        Tensor grad_y = weight.unsqueeze(2).mul(unit.unsqueeze(1));
        if (normalize) {
          const Tensor factor = without_short_rows_(turn.mul(y_rnorm).mul_(y_rnorm), y_rnorm);
          grad_y.addcmul_(y.to(unit.scalar_type()), factor.unsqueeze(2), -1);
        }
        by_input[1] = grad_y.to(y.scalar_type());
      }
    }
    return without_second_derivative("paired_logits", by_input, {grad, x, y, scale});
  }
};

Tensor paired_logits(const Tensor& x, const Tensor& y, const Tensor& scale, bool normalize) {
  refuse_forward_mode("paired_logits", {&x, &y, &scale});
  refuse_torch_func("paired_logits");
  return PairedLogits::apply(x, y, scale, normalize);
}

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  library.def("paired_logits.native(Tensor x, Tensor y, Tensor scale, bool normalize) -> Tensor",
              &paired_logits);
}

}  // namespace
}  // namespace ssl_kernels
