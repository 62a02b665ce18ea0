// What every kernel and node asks of a tensor.
#pragma once

#include <ATen/core/Tensor.h>

namespace ssl_kernels {

// Whether its numbers can be read here and now: on the CPU and not a stand-in. A loop over a few hundred
// numbers is cheaper than the operators that it replaces.
inline bool can_be_read(const at::Tensor& tensor) {
  return tensor.is_cpu() && !tensor.key_set().has_any(c10::python_ks) && tensor.has_storage() &&
         !tensor.is_meta() && !tensor.is_neg();
}

// With its numbers as they lie in memory: torch may hold a tensor that is to be read with its sign turned.
inline at::Tensor without_negation(const at::Tensor& tensor) {
  return tensor.is_neg() ? tensor.resolve_neg() : tensor;
}

// What numbers of `storage` are computed in.
inline at::ScalarType accumulation_type(at::ScalarType storage) {
  return storage == at::kDouble ? at::kDouble : at::kFloat;
}

inline at::ScalarType accumulation_type(const at::Tensor& x) { return accumulation_type(x.scalar_type()); }

// (N, D) with neighbouring elements of a row side by side: `rows`, or a copy.
inline at::Tensor with_neighbours(const at::Tensor& rows) {
  return rows.size(1) == 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}

}  // namespace ssl_kernels
