// `row_losses.native`: what some losses do with the sums and logits of each row, and the reduction, as one
// node of autograd on the CPU. At small batches the dozen operators that it stands for, and their nodes, cost
// more than the kernels. ssl_kernels/losses/ has each rule composed of torch's operators, for every other
// backend and device. row_rules.h has the rules.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <vector>

#include "autograd.h"
#include "operands.h"
#include "row_rules.h"

namespace ssl_kernels {
namespace {

using namespace row_rules;

Rule rule_of(const c10::string_view name) {
  if (name == "beside") return beside;
  if (name == "debiased") return debiased;
  if (name == "softmax") return softmax;
  TORCH_CHECK(name == "mixed", "row_losses: unknown rule ", name);
  return mixed;
}

// A tensor of one, N or N × P numbers, read as one or P values of each row.
struct Input {
  const void* data;
  int64_t row_stride, stride;
  int count;
  bool wide;

  explicit Input(const Tensor& x)
      : data(x.const_data_ptr()),
        row_stride(x.dim() > 0 ? x.stride(0) : 0),
        stride(x.dim() > 1 ? x.stride(1) : 0),
        count(x.dim() > 1 ? static_cast<int>(x.size(1)) : 1),
        wide(x.scalar_type() == at::kDouble) {}

  double at(int64_t row, int k) const {
    const int64_t offset = row * row_stride + k * stride;
    return wide ? static_cast<const double*>(data)[offset] : static_cast<const float*>(data)[offset];
  }
};

std::vector<Input> readers(const variable_list& inputs) { return {inputs.begin(), inputs.end()}; }

Values values_of(const std::vector<Input>& inputs, int64_t row) {
  Values values = {};
  int filled = 0;
  for (const Input& input : inputs)
    for (int k = 0; k < input.count; ++k) values[filled++] = input.at(row, k);
  return values;
}

// -1 where no input has rows.
int64_t rows_of(at::TensorList inputs) {
  for (const Tensor& input : inputs)
    if (input.dim() > 0) return input.size(0);
  return -1;
}

Tensor forward(const variable_list& inputs, Rule rule, const std::vector<double>& constants,
               const c10::string_view reduction, bool wide) {
  const auto read = readers(inputs);
  const int64_t n = rows_of(inputs);
  const auto options = inputs[0].options().dtype(at::kDouble);
  const bool each = reduction == "none";
  const Tensor losses = each ? at::empty({n}, options) : Tensor();
  double* out = each ? losses.mutable_data_ptr<double>() : nullptr;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double loss = rule(values_of(read, i), constants.data(), nullptr);
    if (each)
      out[i] = loss;
    else
      sum += loss;
  }
  if (each) return losses;
  return at::scalar_tensor(reduction == "mean" ? sum / n : sum,
                           options.dtype(wide ? at::kDouble : at::kFloat));
}

struct RowLosses : Node<RowLosses> {
  static Tensor forward(AutogradContext* ctx, at::TensorList inputs, std::string name,
                        std::vector<double> constants, std::string reduction, bool wide) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const variable_list saved = inputs.vec();
    const Tensor loss = ssl_kernels::forward(saved, rule_of(name), constants, reduction, wide);
    ctx->save_for_backward(savable(saved));
    ctx->saved_data["name"] = name;
    ctx->saved_data["constants"] = constants;
    ctx->saved_data["reduction"] = reduction;
    return loss;
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    const variable_list inputs = ctx->get_saved_variables();
    const std::string reduction = ctx->saved_data["reduction"].toStringRef();
    variable_list results;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      results = gradients(inputs, rule_of(ctx->saved_data["name"].toStringRef()),
                          ctx->saved_data["constants"].toDoubleVector(), without_negation(grads[0]),
                          reduction == "mean");
    }
    variable_list origins = inputs;
    origins.push_back(grads[0]);
    results = without_second_derivative("row_losses", results, origins);
    variable_list by_input(inputs.size() + 4);
    for (size_t k = 0; k < inputs.size(); ++k)
      if (ctx->needs_input_grad(k)) by_input[k] = results[k];
    return by_input;
  }

  static variable_list gradients(const variable_list& inputs, Rule rule, const std::vector<double>& constants,
                                 const Tensor& grad, bool mean) {
    const auto read = readers(inputs);
    const int64_t n = rows_of(inputs);
    const Input by_loss(grad);
    variable_list results;
    std::vector<double*> out;  // contiguous float64, of one element that is added up or one for each value
    for (const Tensor& input : inputs) {
      results.push_back(at::empty(input.sizes(), input.options().dtype(at::kDouble)));
      out.push_back(results.back().mutable_data_ptr<double>());
      if (input.dim() == 0) *out.back() = 0;
    }
    for (int64_t i = 0; i < n; ++i) {
      Values partial;
      rule(values_of(read, i), constants.data(), &partial);
      const double g = by_loss.at(i, 0) / (mean ? n : 1);
      int taken = 0;
      for (size_t k = 0; k < inputs.size(); ++k)
        if (inputs[k].dim() == 0)
          *out[k] += g * partial[taken++];
        else
          for (int v = 0; v < read[k].count; ++v) out[k][i * read[k].count + v] = g * partial[taken++];
    }
    for (size_t k = 0; k < inputs.size(); ++k) results[k] = results[k].to(inputs[k].scalar_type());
    return results;
  }
};

Tensor row_losses(c10::string_view name, at::TensorList inputs, at::ArrayRef<double> constants,
                  c10::string_view reduction, bool wide) {
  int values = 0;
  const int64_t n = rows_of(inputs);
  TORCH_CHECK(n > 0, "row_losses: inputs must have rows");
  for (const Tensor& input : inputs) {
    TORCH_CHECK(can_be_read(input) && input.dim() <= 2 && (input.dim() == 0 || input.size(0) == n) &&
                    (input.scalar_type() == at::kDouble || input.scalar_type() == at::kFloat),
                "row_losses: inputs must be float tensors on cpu with a number for each row");
    values += input.dim() > 1 ? static_cast<int>(input.size(1)) : 1;
    refuse_forward_mode("row_losses", {&input});
  }
  const bool fits = name == "softmax" ? values == 2 || values == 3 : values == (name == "mixed" ? 4 : 3);
  TORCH_CHECK(fits && constants.size() == (name == "debiased" ? 3 : 0),
              "row_losses: rule ", name, " does not take ", values, " values and ", constants.size(),
              " constants");
  bool differentiate = false;
  for (const Tensor& input : inputs) differentiate |= input.requires_grad();
  if (!differentiate || !at::GradMode::is_enabled())
    return forward(inputs.vec(), rule_of(name), constants.vec(), reduction, wide);
  refuse_torch_func("row_losses");
  return RowLosses::apply(inputs, std::string(name), constants.vec(), std::string(reduction), wide);
}

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  // `wide`: whether a reduced loss is float64, float32 else; losses of rows ("none") are float64.
  library.def(
      "row_losses.native(str name, Tensor[] inputs, float[] constants, str reduction, bool wide) -> Tensor",
      &row_losses);
}

}  // namespace
}  // namespace ssl_kernels
