// `pair_loss.native`: a reduced loss of paired rows, with its derivative, as one node of autograd on the CPU.
// The weights of the rows are known in the forward, which makes the gradients while each row is in the cache:
// an operator and its backward read all operands twice, and of many rows their traffic is the time.
#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <string>

#include "../cpu/row_pairs.h"
#include "autograd.h"
#include "readable.h"
#include "row_pairs.h"

namespace ssl_kernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

cpu::PairRule rule_of(std::string_view name) {
  if (name == "hinge") return cpu::PairRule::kHinge;
  if (name == "cosine") return cpu::PairRule::kCosine;
  if (name == "logarithm") return cpu::PairRule::kLogarithm;
  TORCH_CHECK(name == "power", "pair_loss: unknown rule ", name);
  return cpu::PairRule::kPower;
}

struct PairLoss : Function<PairLoss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& z,
                        bool normalize, bool distance, const std::string& rule, double constant, bool mean,
                        const std::string& caller) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const double share = mean ? 1 / static_cast<double>(x.size(0)) : 1;
    const auto made =
        cpu::pair_loss(x, y, z, normalize, distance, rule_of(rule), constant, share,
                       {ctx && x.requires_grad(), ctx && y.requires_grad(), ctx && z && z->requires_grad()});
    if (ctx) {
      ctx->save_for_backward(
          savable({x, y, z.value_or(Tensor()), made.grads[0], made.grads[1], made.grads[2]}));
      ctx->saved_data["caller"] = caller;
    }
    return at::scalar_tensor(made.sum, x.options());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list kept = ctx->get_saved_variables();
    variable_list made(3);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const double grad = grads[0].item<double>();
      for (int k = 0; k < 3; ++k) made[k] = made_weighted(kept[3 + k], grad);
    }
    made = without_second_derivative(ctx->saved_data["caller"].toStringRef().c_str(), made,
                                     {grads[0], kept[0], kept[1], kept[2]});
    variable_list by_input(9);
    for (int k = 0; k < 3; ++k)
      if (made[k].numel()) by_input[k] = made[k];
    return by_input;
  }
};

Tensor pair_loss(const Tensor& x, const Tensor& y, const OptionalTensor& z, bool normalize,
                 std::string_view measure, std::string_view rule, double constant, bool mean,
                 std::string_view caller) {
  check_row_pairs(x, y, z, measure);
  TORCH_CHECK(can_be_read(x) && can_be_read(y) && (!z || can_be_read(*z)) &&
                  (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
              "pair_loss: x, y and z must be on cpu, float32 or float64");
  const std::string name(caller);
  refuse_forward_mode(name.c_str(), {&x, &y, z ? &*z : nullptr});
  const bool distance = measure == "distance";
  if (!at::GradMode::is_enabled() || !(x.requires_grad() || y.requires_grad() || (z && z->requires_grad())))
    return PairLoss::forward(nullptr, x, y, z, normalize, distance, std::string(rule), constant, mean, name);
  refuse_torch_func(name.c_str());
  return PairLoss::apply(x, y, z, normalize, distance, std::string(rule), constant, mean, name);
}

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  // rule: "hinge", "cosine", "power" or "logarithm" of the values of row_pairs; caller: named in errors.
  library.def(
      "pair_loss.native(Tensor x, Tensor y, Tensor? z, bool normalize, str measure, str rule, float constant,"
      " bool mean, str caller) -> Tensor",
      &pair_loss);
}

}  // namespace
}  // namespace ssl_kernels
