// What every node of autograd in C++ needs: the operators that it calls, what it keeps for its backward, and
// refusals of what it has no derivative for.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/mul.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "batches.h"

namespace ssl_kernels {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using OptionalTensor = std::optional<Tensor>;

// The `native` overload of an operator, or another, through the dispatcher. To be looked up once:
//   static const auto op = native_overload<Op>("ssl_kernels::row_pairs_fwd");
template <class Op>
c10::TypedOperatorHandle<Op> overload_of(const char* name, const char* overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Op>();
}
template <class Op>
c10::TypedOperatorHandle<Op> native_overload(const char* name) {
  return overload_of<Op>(name, "native");
}

inline OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline Tensor or_undefined(const OptionalTensor& tensor) { return tensor ? *tensor : Tensor(); }

// Inference tensors, which autograd refuses to save, as clones; the others as they are. A teacher's features
// are made under inference_mode and get no gradient.
inline variable_list savable(variable_list tensors) {
  for (Tensor& tensor : tensors)
    if (tensor.defined() && tensor.is_inference()) tensor = tensor.clone();
  return tensors;
}

using Backward = variable_list (*)(AutogradContext*, const variable_list&);

// Whether the backward that runs here is one of several that share what the forward made.
inline thread_local bool is_one_of_several = false;

// `backward` of the gradients, or where they come as a batch, of each in turn.
inline variable_list in_turn(Backward backward, AutogradContext* ctx, const variable_list& grads) {
  const Batches batches(grads);
  if (batches.size() == 0) return backward(ctx, grads);
  struct Shared {
    const bool before = std::exchange(is_one_of_several, true);
    ~Shared() { is_one_of_several = before; }
  } const shared;
  std::vector<variable_list> made;
  for (int64_t i = 0; i < batches.size(); ++i) made.push_back(in_turn(backward, ctx, batches[i]));
  variable_list result = made[0];
  for (size_t k = 0; k < result.size(); ++k) {
    if (!result[k].defined()) continue;
    variable_list parts;
    for (const variable_list& one : made) parts.push_back(one[k]);
    result[k] = batches.together(parts);
  }
  return result;
}

// A node of autograd: its class has `forward`, and as its backward `differentiate`.
template <class Class>
struct Node : Function<Class> {
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return in_turn(&Class::differentiate, ctx, grads);
  }
};

// Operators that are differentiated once must not be differentiated again as if their gradients were
// constants.
struct NoSecondDerivative : Function<NoSecondDerivative> {
  static variable_list forward(AutogradContext* ctx, at::TensorList grads, at::TensorList /*origins*/,
                               const std::string& op) {
    ctx->saved_data["op"] = op;
    variable_list passed;
    for (const Tensor& grad : grads) passed.push_back(grad.detach());
    return passed;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK(false, ctx->saved_data["op"].toStringRef(),
                ": backend \"native\" has no second derivative; backend=\"reference\" has one");
  }
};

// A gradient that the forward made of a loss, times that of the loss: in place if nobody asks for it again.
inline Tensor made_weighted(const Tensor& made, double grad) {
  if (is_one_of_several || torch::autograd::get_current_graph_task_keep_graph()) return made.mul(grad);
  return grad == 1 ? made : made.mul_(grad);
}

// The gradients, which refuse to be differentiated by any of `origins`; of both some may be undefined.
inline variable_list without_second_derivative(const char* op, variable_list grads,
                                               const variable_list& origins) {
  if (!at::GradMode::is_enabled()) return grads;
  const auto defined = [](const variable_list& tensors) {
    variable_list found;
    for (const Tensor& tensor : tensors)
      if (tensor.defined()) found.push_back(tensor);
    return found;
  };
  const variable_list present = defined(grads), of = defined(origins);
  const variable_list refusing =
      NoSecondDerivative::apply(at::TensorList(present), at::TensorList(of), std::string(op));
  auto next = refusing.begin();
  for (Tensor& grad : grads)
    if (grad.defined()) grad = *next++;
  return grads;
}

// The tangent of a dual tensor must not be dropped.
inline void refuse_forward_mode(const char* op, std::initializer_list<const Tensor*> inputs) {
  for (const Tensor* input : inputs)
    TORCH_CHECK_NOT_IMPLEMENTED(
        !input || !input->defined() || !input->_fw_grad(/*level=*/0).defined(), op,
        ": backend \"native\" has no forward-mode derivative; backend=\"reference\" has one");
}

// torch.func.grad, vjp and vmap of them take no node of autograd in C++. Called where there would be one.
inline void refuse_torch_func(const char* op) {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (!transforms) return;
  try {
    transforms->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, op, ": backend \"native\" has no derivative inside torch.func; backend=\"reference\" has one");
  }
}

// What a node makes of `args`: by its forward alone, without a context, where there is nothing to
// differentiate by. `op` stands in errors.
template <class Class, class... Args>
Tensor as_node(const char* op, bool needs_grad, const Args&... args) {
  if (!needs_grad || !at::GradMode::is_enabled()) return Class::forward(nullptr, args...);
  refuse_torch_func(op);
  return Class::apply(args...);
}

}  // namespace ssl_kernels
