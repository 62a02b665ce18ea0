// Plain C interface of the CUDA kernel of `momentum_update_` (docs/moco.md). Pointers are device pointers on
// the current device; the call launches on `stream`, never waits for it and can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

// Three tensors of one shape, dense and of the same strides.
typedef struct {
  float* master;
  void* shadow;
  const void* source;
  int64_t count;         // elements
  int32_t shadow_dtype;  // Dtype: float16 or bfloat16
  int32_t source_dtype;  // Dtype: float32, float16 or bfloat16
} MomentumTriple;

// Returns 0 or a cudaError_t. `triples` is host memory, read before the call returns; `weight`, 1 - momentum,
// lies on the device and is read when the kernel runs.
int momentum_update(const MomentumTriple* triples, int64_t count, const float* weight, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
