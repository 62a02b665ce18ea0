// Whether the numbers of a tensor can be read here and now.
#pragma once

#include <ATen/core/Tensor.h>

namespace ssl_kernels {

// On the CPU and not a stand-in: a loop over a few hundred numbers is cheaper than the operators that it
// replaces.
inline bool can_be_read(const at::Tensor& tensor) {
  return tensor.is_cpu() && !tensor.key_set().has_any(c10::python_ks) && tensor.has_storage() &&
         !tensor.is_meta();
}

}  // namespace ssl_kernels
