// Operators that are differentiated once must not be differentiated again as if their gradients were constants.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <string>

namespace ssl_kernels {

struct NoSecondDerivative : torch::autograd::Function<NoSecondDerivative> {
  using variable_list = torch::autograd::variable_list;

  static variable_list forward(torch::autograd::AutogradContext* ctx, at::TensorList grads, at::TensorList /*origins*/,
                               const std::string& op) {
    ctx->saved_data["op"] = op;
    variable_list passed;
    for (const at::Tensor& grad : grads) passed.push_back(grad.detach());
    return passed;
  }
  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK(false, ctx->saved_data["op"].toStringRef(),
                ": backend \"native\" has no second derivative; backend=\"reference\" has one");
  }
};

// The gradients, which refuse to be differentiated by any of the defined ones among `origins`.
inline torch::autograd::variable_list without_second_derivative(const char* op, torch::autograd::variable_list grads,
                                                                const torch::autograd::variable_list& origins) {
  if (!at::GradMode::is_enabled()) return grads;
  torch::autograd::variable_list defined;
  for (const at::Tensor& origin : origins)
    if (origin.defined()) defined.push_back(origin);
  return NoSecondDerivative::apply(at::TensorList(grads), at::TensorList(defined), std::string(op));
}

}  // namespace ssl_kernels
