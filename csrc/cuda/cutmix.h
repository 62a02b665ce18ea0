// Plain C interface of the CUDA kernels of `cutmix` (docs/mixing.md). Pointers are device pointers on the
// current device; every call launches on `stream`, never waits for it and can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

// A sample is F consecutive elements. Feature f lies in row (f / row_stride) % H and column (f /
// column_stride) % W, which holds for a sample whose dimensions have any order in memory. Strides are in
// elements.
typedef struct {
  int32_t element_bytes;  // 1, 2, 4 or 8
  int32_t dtype;          // Dtype of the gradient; the forward does not look at it
  int64_t B, F, H, W;
  int64_t row_stride, column_stride;
  const void* x;     // what is mixed; in the backward the gradient of the result
  int64_t x_stride;  // between samples
  void* out;         // the result or the gradient by x; x itself: in place, forward only
  int64_t out_stride;
  const int64_t* boxes;  // (B, 4): y0, y1, x0, x1; clipped to the image
  int64_t box_strides[2];
  const int64_t* permutation;  // (B,)
  int64_t permutation_stride;
  void* workspace;  // cutmix_*_workspace bytes, 16-byte aligned
} CutmixArgs;

// Each returns 0 or a cudaError_t. B and F are at least 1, B, H and W less than 2^30. The workspace is
// scratch memory; asking for its size launches nothing.
int cutmix_fwd_workspace(const CutmixArgs* args, size_t* bytes);
int cutmix_bwd_workspace(const CutmixArgs* args, size_t* bytes);
int cutmix_fwd(const CutmixArgs* args, cudaStream_t stream);
int cutmix_bwd(const CutmixArgs* args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
