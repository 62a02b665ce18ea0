// Operators that are differentiated in reverse only must not drop the tangent of a dual tensor.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>

namespace ssl_kernels {

inline void refuse_forward_mode(const char* op, std::initializer_list<const at::Tensor*> inputs) {
  for (const at::Tensor* input : inputs)
    TORCH_CHECK_NOT_IMPLEMENTED(!input || !input->defined() || !input->_fw_grad(/*level=*/0).defined(), op,
                                ": backend \"native\" has no forward-mode derivative; backend=\"reference\" has one");
}

}  // namespace ssl_kernels
