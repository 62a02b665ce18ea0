// Plain C interface of the CUDA kernels of `sigmoid_pairs` (docs/sigmoid_pairs.md). Pointers are device
// pointers on the current device; every call launches on `stream`, never waits for it and can be captured in
// a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "dtype.h"
#include "matrix_product.h"

#ifdef __cplusplus
extern "C" {
#endif

// acc_t is float, or double for float64.
typedef struct {
  int32_t dtype;           // Dtype of rows and columns
  int32_t normalize_rows;  // the booleans of the operator
  int32_t normalize_columns;
  int32_t allow_tf32;  // float32 products may round their operands to TF32
  int32_t splits;      // parts the other side is walked in at once; 0 picks from the card and the sizes
  int32_t equal_ids_are_positive;  // else pairs of equal ids are left out, but for those on the diagonal
  // Rows and columns of a block of coefficients of wide rows, rounded up to whole tiles; 0 picks from the
  // sizes.
  int64_t block_rows, block_columns;
  int64_t N, M, D, diagonal;
  int64_t row_strides[2];  // in elements
  int64_t column_strides[2];
  const void* rows;     // (N, D)
  const void* columns;  // (M, D)
  const void* scale;    // one acc_t
  const void* bias;     // one acc_t
  const int64_t* row_ids;     // (N,) contiguous, or null
  const int64_t* column_ids;  // (M,) contiguous, null with row_ids
  MultiplyMatrices multiply;  // of wide rows' gradients
  void* workspace;      // sigmoid_pairs_*_workspace bytes, 16-byte aligned
} SigmoidPairsArgs;

// Results are contiguous.
typedef struct {
  SigmoidPairsArgs common;
  double* losses;      // (N,), or one with `total`
  int32_t total;       // losses is the sum over rows
  int32_t keep;        // with `total`: also the gradients of it, for g = 1
  void* grad_rows;     // (N, D) acc_t, or null where not needed
  void* grad_columns;  // (M, D) acc_t, or null where not needed
  void* grad_scale;    // one acc_t, with `keep`
  void* grad_bias;     // one acc_t, with `keep`
} SigmoidPairsFwdArgs;

typedef struct {
  SigmoidPairsArgs common;
  const double* grad_losses;  // (N,) contiguous
  void* grad_rows;            // (N, D) dtype of rows, or null where not needed
  void* grad_columns;         // (M, D) dtype of rows, or null where not needed
  void* grad_scale;           // one acc_t
  void* grad_bias;            // one acc_t
} SigmoidPairsBwdArgs;

// Each returns 0 or a cudaError_t. Sizes N, M and D are at least 1. The first two tell the bytes of scratch
// memory that a call with these arguments needs, whose workspace is not set yet; they launch nothing.
int sigmoid_pairs_fwd_workspace(const SigmoidPairsFwdArgs* args, size_t* bytes);
int sigmoid_pairs_bwd_workspace(const SigmoidPairsBwdArgs* args, size_t* bytes);
int sigmoid_pairs_fwd(const SigmoidPairsFwdArgs* args, cudaStream_t stream);
int sigmoid_pairs_bwd(const SigmoidPairsBwdArgs* args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
