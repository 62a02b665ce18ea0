// Plain C interface of the CUDA kernels of `mixup_cross_entropy` (docs/mixing.md). Pointers are device
// pointers on the current device; every call launches on `stream`, never waits for it and can be captured in
// a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

// acc_t is float, or double for float64. Strides are in elements.
typedef struct {
  int32_t dtype;         // Dtype of the logits
  int32_t warps_per_row;  // 1 or 8; 0 picks from the sizes
  int64_t N, C;
  double label_smoothing;
  const void* logits;  // (N, C), unit column stride
  int64_t row_stride;
  const int64_t* target;   // (N,) contiguous
  const int64_t* partner;  // (N,): the partner's row or, with partner_is_class, its class
  int64_t partner_stride;
  const void* lam;  // (N,) acc_t
  int64_t lam_stride;
  const void* weight;        // of the classes, (C,) acc_t contiguous, or null: 1
  const double* weight_sum;  // one number, read where there are weights and smoothing
  int64_t ignore_index;
  int32_t partner_is_class;
} MixupCrossEntropyArgs;

typedef struct {
  MixupCrossEntropyArgs common;
  double* loss;     // (N,) contiguous
  double* lse;      // (N,) contiguous
  double* counted;  // (N,) contiguous: the rows' weights in the mean
} MixupCrossEntropyFwdArgs;

typedef struct {
  MixupCrossEntropyArgs common;
  const double* grad_loss;  // (N,)
  int64_t grad_loss_stride;
  const double* lse;  // (N,) contiguous, as the forward wrote it
  void* grad_logits;  // (N, C) contiguous
} MixupCrossEntropyBwdArgs;

// Each returns 0 or a cudaError_t. N and C are at least 1.
int mixup_cross_entropy_fwd(const MixupCrossEntropyFwdArgs* args, cudaStream_t stream);
int mixup_cross_entropy_bwd(const MixupCrossEntropyBwdArgs* args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
