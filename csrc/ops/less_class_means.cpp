// `less_class_means.native`: the function of that name in ssl_kernels/losses/_rows.py as one node of autograd, on every
// device. At small batches the interpreter and the nodes of the composed form cost more than the kernels.
//
//   loss_i = lse_i − scale r_i <x̂_i, S_i>,  S_i = Σ x̂_j over the other rows j of i's group
//
// With w_i = −scale g_i r_i:  dx̂_i = w_i S_i + Σ_j w_j x̂_j;  dlse_i = g_i;  dscale = −Σ_i g_i r_i <x̂_i, S_i>.
// The sum over j is over the rows of S_i, so that with equal weights in a group ("even") dx̂_i = 2 w_i S_i.
#include <ATen/ops/addcmul.h>
#include <ATen/ops/embedding_bag.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "no_second_derivative.h"
#include "saved.h"
#include "transforms.h"
#include "unit_rows.h"

namespace ssl_kernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct Groups {
  const Tensor &group, &order, &starts;
};

// For each row the sum of the rows of its group. A bag a group has no atomics, and on the CPU beats index_add_.
Tensor class_sums(const Tensor& rows, const Groups& groups) {
  return std::get<0>(at::embedding_bag(rows, groups.order, groups.starts)).index_select(0, groups.group);
}

struct LessClassMeans : Function<LessClassMeans> {
  static Tensor forward(AutogradContext* ctx, const Tensor& lse, const Tensor& scale, const Tensor& x,
                        const Tensor& group, const Tensor& order, const Tensor& starts, const Tensor& inverse_count,
                        bool normalize, bool even) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Tensor rows = x.to(accumulation_type(x));
    Tensor rnorm, unit = rows;
    if (normalize) {
      rnorm = reciprocal_norms(rows);
      unit = rows.mul(rnorm.unsqueeze(1));
    }
    const Tensor others = class_sums(unit, {group, order, starts}).sub_(unit);
    const Tensor dots = unit.mul(others).sum(1);
    const Tensor factor = inverse_count.mul(scale).neg_();
    ctx->save_for_backward(
        savable({lse, scale, x, group, order, starts, inverse_count, unit, others, dots, factor, rnorm}));
    ctx->saved_data["even"] = even;
    return at::addcmul(lse, dots, factor);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad = grads[0], &scale = saved[1], &x = saved[2], &unit = saved[7], &others = saved[8];
    const Tensor &dots = saved[9], &factor = saved[10], &rnorm = saved[11];
    variable_list results(2, at::empty({0}, scale.options()));  // where not wanted
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      if (ctx->needs_input_grad(1)) results[0] = grad.mul(saved[6]).mul_(dots).sum().neg_().to(scale.scalar_type());
      if (ctx->needs_input_grad(2)) {
        const Tensor weight = grad.mul(factor).to(unit.scalar_type());
        Tensor grad_unit, radial;  // radial_i = <x̂_i, dx̂_i>
        if (ctx->saved_data["even"].toBool()) {
          weight.mul_(2);
          grad_unit = others.mul(weight.unsqueeze(1));
          radial = dots.mul(weight);
        } else {
          const Tensor weighted = unit.mul(weight.unsqueeze(1));
          grad_unit = class_sums(weighted, {saved[3], saved[4], saved[5]}).sub_(weighted);
          grad_unit.addcmul_(others, weight.unsqueeze(1));
          radial = unit.mul(grad_unit).sum(1);
        }
        if (rnorm.defined()) grad_unit = through_normalization_(grad_unit, unit, rnorm, radial);
        results[1] = grad_unit.to(x.scalar_type());
      }
    }
    variable_list by_input(9);
    if (ctx->needs_input_grad(0)) by_input[0] = grad;
    results = without_second_derivative("less_class_means", results, {grad, scale, x});
    if (ctx->needs_input_grad(1)) by_input[1] = results[0];
    if (ctx->needs_input_grad(2)) by_input[2] = results[1];
    return by_input;
  }
};

Tensor less_class_means(const Tensor& lse, const Tensor& scale, const Tensor& x, const Tensor& group,
                        const Tensor& order, const Tensor& starts, const Tensor& inverse_count, bool normalize,
                        bool even) {
  refuse_forward_mode("less_class_means", {&lse, &scale, &x});
  refuse_torch_func("less_class_means");
  return LessClassMeans::apply(lse, scale, x, group, order, starts, inverse_count, normalize, even);
}

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  library.def("less_class_means.native(Tensor lse, Tensor scale, Tensor x, Tensor group, Tensor order, Tensor starts, "
              "Tensor inverse_count, bool normalize, bool even) -> Tensor",
              &less_class_means);
}

}  // namespace
}  // namespace ssl_kernels
