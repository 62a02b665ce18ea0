// Operators that are differentiated in reverse, by the engine, must say so to other ways of differentiating.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>

namespace ssl_kernels {

// The tangent of a dual tensor must not be dropped.
inline void refuse_forward_mode(const char* op, std::initializer_list<const at::Tensor*> inputs) {
  for (const at::Tensor* input : inputs)
    TORCH_CHECK_NOT_IMPLEMENTED(!input || !input->defined() || !input->_fw_grad(/*level=*/0).defined(), op,
                                ": backend \"native\" has no forward-mode derivative; backend=\"reference\" has one");
}

// torch.func.grad, vjp and vmap of them take no node of autograd in C++. Called where there would be one.
inline void refuse_torch_func(const char* op) {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (!transforms) return;
  try {
    transforms->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, op,
                                ": backend \"native\" has no derivative inside torch.func; backend=\"reference\" has one");
  }
}

}  // namespace ssl_kernels
