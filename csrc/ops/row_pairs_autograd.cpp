// Differentiates `row_pairs_fwd.native` by `row_pairs_bwd.native`, on every device. In C++ for the sake of
// small batches; the other backends' Function is in ssl_kernels/ops/row_pairs.py.
#include <torch/library.h>

#include <tuple>

#include "autograd.h"
#include "row_pairs.h"

namespace ssl_kernels {
namespace {

const auto& forward_op() {
  using Op = std::tuple<Tensor, Tensor>(const Tensor& x, const Tensor& y, const OptionalTensor& z,
                                        bool normalize, std::string_view measure);
  static const auto op = native_overload<Op>("ssl_kernels::row_pairs_fwd");
  return op;
}

const auto& backward_op() {
  using Op = std::tuple<Tensor, Tensor, Tensor>(const Tensor& grad_values, const Tensor& x, const Tensor& y,
                                                const OptionalTensor& z, const Tensor& saved, bool normalize,
                                                std::string_view measure, bool x_needs_grad,
                                                bool y_needs_grad, bool z_needs_grad);
  static const auto op = native_overload<Op>("ssl_kernels::row_pairs_bwd");
  return op;
}

struct RowPairs : Node<RowPairs> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y,
                               const OptionalTensor& z, bool normalize, std::string_view measure) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [values, saved] = forward_op().call(x, y, z, normalize, measure);
    ctx->save_for_backward(savable({x, y, z.value_or(Tensor()), saved}));
    ctx->saved_data["normalize"] = normalize;
    ctx->saved_data["measure"] = std::string(measure);
    ctx->mark_non_differentiable({saved});
    ctx->set_materialize_grads(false);
    return {values, saved};
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    variable_list by_input(5);
    if (!grads[0].defined()) return by_input;
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor z = if_defined(saved[2]);
    const bool needed[] = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), z && ctx->needs_input_grad(2)};
    variable_list results(3);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      std::tie(results[0], results[1], results[2]) = backward_op().call(
          grads[0], saved[0], saved[1], z, saved[3], ctx->saved_data["normalize"].toBool(),
          ctx->saved_data["measure"].toStringRef(), needed[0], needed[1], needed[2]);
    }
    results = without_second_derivative("row_pairs", results, {grads[0], saved[0], saved[1], saved[2]});
    for (int k = 0; k < 3; ++k)
      if (needed[k]) by_input[k] = results[k];
    return by_input;
  }
};

std::tuple<Tensor, Tensor> row_pairs_fwd(const Tensor& x, const Tensor& y, const OptionalTensor& z,
                                         bool normalize, std::string_view measure) {
  refuse_forward_mode("row_pairs", {&x, &y, z ? &*z : nullptr});
  const bool differentiate =
      at::GradMode::is_enabled() && (x.requires_grad() || y.requires_grad() || (z && z->requires_grad()));
  if (!differentiate) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return forward_op().call(x, y, z, normalize, measure);
  }
  refuse_torch_func("row_pairs");
  const variable_list results = RowPairs::apply(x, y, z, normalize, measure);
  return {results[0], results[1]};
}

TORCH_LIBRARY_IMPL(ssl_kernels, Autograd, library) { library.impl("row_pairs_fwd.native", &row_pairs_fwd); }

}  // namespace
}  // namespace ssl_kernels
