// Plain C interface of the CUDA kernels of `mixup` (docs/mixing.md). Pointers are device pointers on the
// current device; every call launches on `stream`, never waits for it and can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

// A sample is F consecutive elements. acc_t is float, or double for float64. Strides are in elements.
typedef struct {
  int32_t dtype;  // Dtype of x and out
  int32_t parts;  // pieces the samples are walked in at once; 0 picks from the card and the sizes
  int64_t B, F;   // samples, elements of one
  const void* x;
  int64_t x_stride;  // between samples
  void* out;         // x itself: in place
  int64_t out_stride;
  const void* lam;  // (B,) acc_t
  int64_t lam_stride;
  const int64_t* permutation;  // (B,)
  int64_t permutation_stride;
  void* workspace;  // mixup_*_workspace bytes, 16-byte aligned
} MixupArgs;

typedef struct {
  MixupArgs common;  // x is the gradient of the result; out is grad_x, or null where it is not needed
  const void* x;     // what was mixed, or null: no gradient by lam
  int64_t x_stride;
  void* grad_lam;  // (B,) acc_t contiguous, needed with x
} MixupBwdArgs;

// Each returns 0 or a cudaError_t. B and F are at least 1, B less than 2^30. The workspace is scratch memory;
// asking for its size launches nothing.
int mixup_fwd_workspace(const MixupArgs* args, size_t* bytes);
int mixup_bwd_workspace(const MixupBwdArgs* args, size_t* bytes);
int mixup_fwd(const MixupArgs* args, cudaStream_t stream);
int mixup_bwd(const MixupBwdArgs* args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
