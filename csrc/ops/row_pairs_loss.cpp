// `row_pairs_loss.native`: the losses that are little more than the values v of row_pairs, as one node of
// autograd on the CPU; of a few hundred rows the operators after the kernel, and their nodes, cost more than
// it does.
//
//   loss_i = factor v_i + offset,   with a hinge max(0, that), of which the derivative at 0 is 0
//
// for each row, added up or averaged. ssl_kernels/losses/_rows.py has the same composed of torch's operators,
// and says which reduced losses of float32 and float64 rows are the node of pair_loss.cpp instead, which
// makes the gradients in the forward.
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "../cpu/pool.h"
#include "autograd.h"
#include "readable.h"
#include "row_pairs_operators.h"

namespace ssl_kernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct Rule {
  double factor, offset;
  bool hinge;

  double operator()(double value) const {
    const double loss = factor * value + offset;
    return hinge && loss <= 0 ? 0 : loss;  // NaN stays
  }
  double derivative(double value) const {
    return hinge && factor * value + offset <= 0 ? 0 : factor;
  }
};

at::ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <class T>
Tensor losses_of(const double* values, int64_t n, const Rule& rule, const at::TensorOptions& options) {
  const Tensor losses = cpu::pooled({n}, options);
  T* out = losses.mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(rule(values[i]));
  return losses;
}

Tensor reduced(const Tensor& values, const Rule& rule, const std::string& reduction, at::ScalarType acc) {
  const int64_t n = values.size(0);
  const double* v = values.const_data_ptr<double>();
  const auto options = values.options().dtype(acc);
  if (reduction == "none" && acc == at::kDouble) return losses_of<double>(v, n, rule, options);
  if (reduction == "none") return losses_of<float>(v, n, rule, options);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += rule(v[i]);
  if (reduction == "mean") sum /= static_cast<double>(n);
  return acc == at::kDouble ? cpu::number<double>(sum) : cpu::number<float>(sum);
}

// The derivative by the values, of `grad` of one loss or of each row's.
template <class T>
Tensor by_values(const Tensor& grad, const Tensor& values, const Rule& rule, bool mean) {
  const int64_t n = values.size(0), step = grad.dim() > 0 ? grad.stride(0) : 0;
  const T* g = grad.const_data_ptr<T>();
  const double* v = values.const_data_ptr<double>();
  const Tensor result = cpu::pooled({n}, values.options());
  double* out = result.mutable_data_ptr<double>();
  const double share = mean ? 1 / static_cast<double>(n) : 1;
  for (int64_t i = 0; i < n; ++i) out[i] = share * static_cast<double>(g[i * step]) * rule.derivative(v[i]);
  return result;
}

struct RowPairsLoss : Function<RowPairsLoss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const OptionalTensor& z,
                        bool normalize, std::string_view measure, const Rule& rule,
                        const std::string& reduction) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [values, saved] = row_pairs_forward_op().call(x, y, z, normalize, measure);
    TORCH_CHECK(can_be_read(values), "row_pairs_loss: the values of row_pairs must be readable on the cpu");
    if (ctx) {
      ctx->save_for_backward(savable({x, y, or_undefined(z), saved, values}));
      ctx->saved_data["measure"] = std::string(measure);
      ctx->saved_data["normalize"] = normalize;
      ctx->saved_data["mean"] = reduction == "mean";
      ctx->saved_data["factor"] = rule.factor;
      ctx->saved_data["offset"] = rule.offset;
      ctx->saved_data["hinge"] = rule.hinge;
    }
    return reduced(values, rule, reduction, accumulation_type(x));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor z = if_defined(saved[2]);
    auto& data = ctx->saved_data;
    const Rule rule{data["factor"].toDouble(), data["offset"].toDouble(), data["hinge"].toBool()};
    const bool mean = data["mean"].toBool();
    const bool needed[] = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), z && ctx->needs_input_grad(2)};
    TORCH_CHECK(can_be_read(grads[0]), "row_pairs_loss: the loss's gradient must be readable on the cpu");
    variable_list results(3);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const auto differentiate = saved[0].scalar_type() == at::kDouble ? by_values<double> : by_values<float>;
      std::tie(results[0], results[1], results[2]) = row_pairs_backward_op().call(
          differentiate(grads[0], saved[4], rule, mean), saved[0], saved[1], z, saved[3],
          data["normalize"].toBool(), data["measure"].toStringRef(), needed[0], needed[1], needed[2]);
    }
    results = without_second_derivative("row_pairs", results, {grads[0], saved[0], saved[1], saved[2]});
    variable_list by_input(7);
    for (int k = 0; k < 3; ++k)
      if (needed[k]) by_input[k] = results[k];
    return by_input;
  }
};

Tensor row_pairs_loss(const Tensor& x, const Tensor& y, const OptionalTensor& z, bool normalize,
                      c10::string_view measure, double factor, double offset, bool hinge,
                      c10::string_view reduction) {
  refuse_forward_mode("row_pairs", {&x, &y, z ? &*z : nullptr});
  const Rule rule{factor, offset, hinge};
  const std::string how(reduction);
  if (!at::GradMode::is_enabled() || !(x.requires_grad() || y.requires_grad() || (z && z->requires_grad())))
    return RowPairsLoss::forward(nullptr, x, y, z, normalize, measure, rule, how);
  refuse_torch_func("row_pairs");
  return RowPairsLoss::apply(x, y, z, normalize, measure, rule, how);
}

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  // A reduced loss and losses of rows ("none") are in the accumulation dtype of x.
  library.def(
      "row_pairs_loss.native(Tensor x, Tensor y, Tensor? z, bool normalize, str measure, float factor, "
      "float offset, bool hinge, str reduction) -> Tensor",
      &row_pairs_loss);
}

}  // namespace
}  // namespace ssl_kernels
