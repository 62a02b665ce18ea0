// Plain C interface of the CUDA kernels of `mixup_normalize` (docs/mixing.md). Pointers are device pointers
// on the current device; a call launches on `stream`, never waits for it and can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

// A sample is F consecutive elements; feature f lies in channel (f / channel_stride) % C. Strides are in
// elements.
typedef struct {
  int32_t dtype;  // Dtype of out: float32, float16 or bfloat16
  int32_t parts;  // pieces the samples are walked in at once; 0 picks from the card and the sizes
  int64_t B, F, C;
  int64_t channel_stride;
  const uint8_t* x;
  int64_t x_stride;  // between samples
  void* out;
  int64_t out_stride;
  const float* lam;  // (B,)
  int64_t lam_stride;
  const int64_t* permutation;  // (B,)
  int64_t permutation_stride;
  const float* mean;  // (C,)
  const float* std;   // (C,)
  int64_t mean_stride, std_stride;
  void* workspace;  // mixup_normalize_workspace bytes, 16-byte aligned
} MixupNormalizeArgs;

// Each returns 0 or a cudaError_t. B and F are at least 1, B less than 2^30. The workspace is scratch memory;
// asking for its size launches nothing.
int mixup_normalize_workspace(const MixupNormalizeArgs* args, size_t* bytes);
int mixup_normalize(const MixupNormalizeArgs* args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
