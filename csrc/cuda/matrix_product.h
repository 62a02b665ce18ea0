// A matrix product that a launcher leaves to a library: the caller hands it in, so that the kernels stay free
// of cuBLAS and torch.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;  // cudaStream_t points to it; the CUDA headers are not needed here

// result = A B, or result += A B with `add`. Matrices have unit column stride; strides are those of rows, in
// elements.
typedef struct {
  int32_t dtype;       // Dtype of A and B; result is float, or double for float64
  int32_t transposed;  // `a` holds the transpose of A, (K, M)
  int32_t add;
  int64_t M, N, K;
  int64_t a_stride, b_stride, result_stride;
  const void* a;  // (M, K)
  const void* b;  // (K, N)
  void* result;   // (M, N)
} MatrixProduct;

// Launches the product on the stream, sums in the type of the result, and returns 0 or a cudaError_t. What
// float32 operands are rounded to is the library's own affair.
typedef int (*MultiplyMatrices)(const MatrixProduct* product, struct CUstream_st* stream);

#ifdef __cplusplus
}
#endif
