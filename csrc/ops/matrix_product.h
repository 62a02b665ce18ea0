// The matrix product of csrc/cuda/matrix_product.h by ATen, which is cuBLAS on a GPU: on the current stream,
// obeying torch's settings for TF32, float16 and bfloat16 operands into float32.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include "../cuda/dtype.h"
#include "../cuda/matrix_product.h"
#include "operands.h"

namespace ssl_kernels {

inline at::ScalarType scalar_type_of(int32_t dtype) {
  switch (dtype) {
    case kFloat64:
      return at::kDouble;
    case kFloat16:
      return at::kHalf;
    case kBFloat16:
      return at::kBFloat16;
    default:
      return at::kFloat;
  }
}

// Of matrices in the memory of `device`.
inline void multiply_on(at::Device device, const MatrixProduct& product) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::ScalarType dtype = scalar_type_of(product.dtype);
  const at::ScalarType acc = accumulation_type(dtype);
  const auto matrix = [&](const void* data, int64_t rows, int64_t columns, int64_t stride,
                          at::ScalarType type) {
    return at::for_blob(const_cast<void*>(data), {rows, columns})
        .strides({stride, 1})
        .target_device(device)
        .options(at::TensorOptions().dtype(type).device(device))
        .make_tensor();
  };
  const at::Tensor a = product.transposed
                           ? matrix(product.a, product.K, product.M, product.a_stride, dtype).t()
                           : matrix(product.a, product.M, product.K, product.a_stride, dtype);
  const at::Tensor b = matrix(product.b, product.K, product.N, product.b_stride, dtype);
  at::Tensor result = matrix(product.result, product.M, product.N, product.result_stride, acc);
  if (dtype == acc) {
    product.add ? at::addmm_out(result, result, a, b) : at::mm_out(result, a, b);
  } else {
    product.add ? at::addmm_out(result, result, a, b, acc) : at::mm_out(result, a, b, acc);
  }
}

}  // namespace ssl_kernels
