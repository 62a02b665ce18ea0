// Plain C interface of the CUDA kernels of `batch_hard` (docs/batch_hard.md). Pointers are device pointers on
// the current device; the call launches on `stream`, never waits for it and can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int32_t dtype;       // Dtype of embeddings
  int32_t normalize;   // the boolean of the operator
  int32_t cosine;      // distance is "cosine", else "euclidean"
  int32_t allow_tf32;  // float32 products may round their operands to TF32
  int32_t splits;      // parts the columns are walked in at once; 0 picks from the card and the sizes
  int32_t reserved;
  int64_t N, D;
  int64_t strides[2];      // of embeddings, in elements
  const void* embeddings;  // (N, D)
  const int64_t* labels;   // (N,) contiguous
  void* workspace;         // batch_hard_workspace bytes, 16-byte aligned
} BatchHardCommon;

typedef struct {
  BatchHardCommon common;
  int64_t* positive_index;  // (N,)
  int64_t* negative_index;  // (N,)
} BatchHardArgs;

// Each returns 0 or a cudaError_t. N and D are at least 1, N under 2^31. The first tells the bytes of scratch
// memory that a call with these arguments needs, whose workspace is not set yet; it launches nothing.
int batch_hard_workspace(const BatchHardArgs* args, size_t* bytes);
int batch_hard(const BatchHardArgs* args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
