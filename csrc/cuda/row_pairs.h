// Plain C interface of the CUDA kernels of `row_pairs` (docs/row_pairs.md). Pointers are device pointers on
// the current device; the calls launch on `stream`, never wait for it and can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int32_t dtype;             // Dtype, of operands and gradients
  int32_t pairs;             // 1, or 2 with z
  int32_t normalize;         // the boolean of the operator
  int32_t distance;          // the measure: distance, or product
  int64_t N, D;              // at least 1
  const void* operands[3];   // x, y, z: (N, D)
  int64_t row_strides[3];    // in elements
  int64_t column_strides[3];
} RowPairsOperands;

typedef struct {
  RowPairsOperands common;
  double* values;  // (N,)
  void* saved;     // (N, pairs, 4) acc_t
} RowPairsFwdArgs;

typedef struct {
  RowPairsOperands common;
  const double* grad_values;  // (N,)
  const void* saved;
  void* grads[3];  // (N, D) contiguous, null where none is needed
} RowPairsBwdArgs;

// Return 0 or a cudaError_t.
int row_pairs_fwd(const RowPairsFwdArgs* args, cudaStream_t stream);
int row_pairs_bwd(const RowPairsBwdArgs* args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
