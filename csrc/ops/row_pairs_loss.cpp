// `row_pairs_loss.native`: the losses that are made of the values of row_pairs alone, as one node of autograd
// on the CPU; of a few hundred rows the operators after the kernel, and their nodes, cost more than it does.
// A reduced loss knows the weight of each row in the forward, which makes the gradients while the row is in
// the cache: an operator and its backward read all operands twice, and the traffic of many rows is the time.
// Only float32 and float64 rows do so: narrower gradients are rounded once, with the loss's gradient in them.
// ssl_kernels/losses/_rows.py has the same composed of torch's operators.
#include <ATen/record_function.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "../cpu/pool.h"
#include "../cpu/row_pairs.h"
#include "autograd.h"
#include "operands.h"
#include "row_pairs_loss.h"

namespace ssl_kernels {
namespace {

cpu::PairRule rule_of(std::string_view name, double factor, double constant) {
  using Rule = cpu::PairRule;
  if (name == "linear") return {Rule::kLinear, factor, constant};
  if (name == "hinge") return {Rule::kHinge, factor, constant};
  if (name == "power") return {Rule::kPower, factor, constant};
  TORCH_CHECK(name == "logarithm", "row_pairs_loss: unknown rule ", name);
  return {Rule::kLogarithm, factor, constant};
}

bool is_wide(const Tensor& x) { return x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble; }

// slopes (N,) float64, times the gradient of each row's loss or of their sum.
template <class T>
Tensor weighted(const Tensor& slopes, const Tensor& grad) {
  const int64_t n = slopes.size(0), step = grad.dim() ? grad.stride(0) : 0;
  const T* g = grad.const_data_ptr<T>();
  const double* slope = slopes.const_data_ptr<double>();
  const Tensor result = cpu::pooled({n}, slopes.options());
  double* out = result.mutable_data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) out[i] = slope[i] * static_cast<double>(g[i * step]);
  return result;
}

struct RowPairsLoss : Node<RowPairsLoss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& z,
                        bool normalize, const std::string& measure, const cpu::PairRule& rule,
                        const std::string& reduction, const std::string& caller) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const int64_t n = x.size(0);
    const double share = reduction == "mean" ? 1 / static_cast<double>(n) : 1;
    if (ctx) ctx->saved_data["caller"] = caller;
    if (reduction != "none" && is_wide(x)) {
      const auto [sum, grads] =
          cpu::row_pairs_loss(x, y, z, normalize, measure == "distance", rule, share,
                              {ctx && x.requires_grad(), ctx && y.requires_grad(),
                               ctx && z && z->requires_grad()});
      if (ctx) ctx->save_for_backward(savable({x, y, or_undefined(z), grads[0], grads[1], grads[2]}));
      return cpu::number(sum, accumulation_type(x));
    }
    // The losses in the place of the values, and the slopes.
    const auto [losses, saved] = cpu::row_pairs_fwd(x, y, z, normalize, measure);
    const Tensor slopes = cpu::pooled({n}, losses.options());
    double *loss = losses.mutable_data_ptr<double>(), *slope = slopes.mutable_data_ptr<double>(), sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const auto made = rule(loss[i]);
      sum += loss[i] = made.value;
      slope[i] = made.slope * share;
    }
    if (ctx) {
      ctx->save_for_backward(savable({x, y, or_undefined(z), saved, slopes}));
      ctx->saved_data["normalize"] = normalize;
      ctx->saved_data["measure"] = measure;
    }
    if (reduction != "none") return cpu::number(sum * share, accumulation_type(x));
    if (x.scalar_type() == at::kDouble) return losses;
    const Tensor narrow = cpu::pooled({n}, losses.options().dtype(at::kFloat));
    std::copy_n(loss, n, narrow.mutable_data_ptr<float>());
    return narrow;
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    const variable_list kept = ctx->get_saved_variables();
    const Tensor grad = without_negation(grads[0]);
    const Tensor& x = kept[0];
    TORCH_CHECK(can_be_read(grad), "row_pairs_loss: the loss's gradient must be readable on the cpu");
    auto& data = ctx->saved_data;
    const OptionalTensor z = if_defined(kept[2]);
    const bool needed[] = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), z && ctx->needs_input_grad(2)};
    variable_list made(3);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      if (grad.dim() == 0 && is_wide(x)) {
        for (int k = 0; k < 3; ++k)
          if (kept[3 + k].defined()) made[k] = made_weighted(kept[3 + k], grad.item<double>());
      } else {
        const auto by_values = x.scalar_type() == at::kDouble ? weighted<double> : weighted<float>;
        std::tie(made[0], made[1], made[2]) = cpu::row_pairs_bwd(
            by_values(kept[4], grad), x, kept[1], z, kept[3], data["normalize"].toBool(),
            data["measure"].toStringRef(), needed[0], needed[1], needed[2]);
      }
    }
    made = without_second_derivative(data["caller"].toStringRef().c_str(), made, {grad, x, kept[1], kept[2]});
    variable_list by_input(8);
    for (int k = 0; k < 3; ++k)
      if (needed[k]) by_input[k] = made[k];
    return by_input;
  }
};

}  // namespace

Tensor row_pairs_loss(const Tensor& x, const Tensor& y, const OptionalTensor& z, bool normalize,
                      std::string_view measure, std::string_view rule, double factor, double constant,
                      std::string_view reduction, std::string_view caller) {
  RECORD_FUNCTION("ssl_kernels::row_pairs_loss", std::vector<c10::IValue>());
  const bool by_index = y.scalar_type() == at::kLong;
  check_row_pairs(x, by_index ? x : y, z, measure);
  TORCH_CHECK(can_be_read(x) && can_be_read(y) && (!z || can_be_read(*z)),
              "row_pairs_loss: x, y and z must be readable on the cpu");
  TORCH_CHECK(!by_index || (is_wide(x) && reduction != "none" && !z && y.dim() == 1 && y.is_contiguous() &&
                            y.size(0) == x.size(0)),
              "row_pairs_loss: y of indices must be (N,), for a reduced loss of float32 or float64 rows");
  const std::string name(caller), of(measure), how(reduction);
  refuse_forward_mode(name.c_str(), {&x, &y, z ? &*z : nullptr});
  const auto by = rule_of(rule, factor, constant);
  const bool differentiate = x.requires_grad() || y.requires_grad() || (z && z->requires_grad());
  return as_node<RowPairsLoss>(name.c_str(), differentiate, x, y, z, normalize, of, by, how, name);
}

namespace {

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  // y: also of indices (cpu/row_pairs.h, which has the rules "linear", "hinge", "power" and "logarithm" too).
  // caller: named in errors. The result is in the accumulation dtype of x, (N,) for the reduction "none".
  library.def(
      "row_pairs_loss.native(Tensor x, Tensor y, Tensor? z, bool normalize, str measure, str rule,"
      " float factor, float constant, str reduction, str caller) -> Tensor",
      &row_pairs_loss);
}

}  // namespace
}  // namespace ssl_kernels
