// Plain C interface of the CUDA kernels of `queue_push_` (docs/moco.md). Pointers are device pointers on the
// current device; the call launches on `stream`, never waits for it and can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int32_t storage_dtype;  // Dtype
  int32_t key_dtype;      // Dtype
  int32_t normalize;      // the boolean of the operator
  int32_t reserved;
  int64_t K, B, D;         // rows of storage, keys, width
  int64_t key_strides[2];  // in elements
  void* storage;           // (K, D) contiguous
  const void* keys;        // (B, D)
  int64_t* position;       // one, taken modulo K
  int64_t* filled;         // one
} QueuePushArgs;

// Returns 0 or a cudaError_t. K and D are at least 1.
int queue_push(const QueuePushArgs* args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
