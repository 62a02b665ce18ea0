// Plain C interface of the CUDA kernels of `contrastive` (docs/contrastive.md). Pointers are device pointers
// on the current device; every call launches on `stream`, never waits for it and can be captured in a CUDA
// graph.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "dtype.h"
#include "matrix_product.h"

#ifdef __cplusplus
extern "C" {
#endif

// Biases and limits of the logits, contiguous acc_t or null: what contrastive_additions_* take besides.
typedef struct {
  const void* column_bias;  // (M,)
  const void* row_bias;     // (N,), only with both_directions
  const void* row_limit;    // (N,)
  const uint8_t* exempt;    // (M,) of 0 and 1, only with row_limit
  int32_t only_equal_ids;   // pairs of equal ids are those that stay
} ContrastiveAdditions;

// What both directions share. acc_t is float, or double for float64.
typedef struct {
  int32_t dtype;           // Dtype of rows
  int32_t normalize_rows;  // the booleans of the operator
  int32_t normalize_columns;
  int32_t keep_diagonal;
  int32_t both_directions;
  int32_t allow_tf32;  // float32 products may round their operands to TF32
  int32_t splits;      // parts the columns are walked in at once; 0 picks from the card and the sizes
  // Dtype of columns: that of rows, or float16 or bfloat16 beside float32 rows (see columns).
  int32_t column_dtype;
  // Rows and columns of a block of coefficients of wide rows, rounded up to whole tiles; 0 picks from the
  // sizes.
  int64_t block_rows, block_columns;
  int64_t N, M, D, P;      // rows, columns (N in the square case), width, positives per row
  int64_t row_strides[2];  // in elements
  int64_t column_strides[2];
  const void* rows;           // (N, D)
  // (M, D), or null: the square case. Of another dtype than rows only without both_directions, and in the
  // backward only with the expectation.
  const void* columns;
  const void* scale;          // one acc_t
  const int64_t* positives;   // (N, P) contiguous, negative ones count from the end, or null
  const int64_t* row_ids;     // (N,) contiguous, or null
  const int64_t* column_ids;  // (M,) contiguous, or null
  MultiplyMatrices multiply;  // of wide rows' gradients and expectation
  void* workspace;            // contrastive_*_workspace bytes, 16-byte aligned
  ContrastiveAdditions additions;
} ContrastiveArgs;

// Results are contiguous; null stands for what the operator returns empty.
typedef struct {
  ContrastiveArgs common;
  double* lse;              // (N,)
  double* column_lse;       // (M,), needed if both_directions
  double* positive_logits;  // (N, P), needed if positives
  void* row_rnorm;          // (N,) acc_t, needed if normalize_rows
  void* column_rnorm;       // (M,) acc_t, needed if normalize_columns and not square
  // (N, D) acc_t, or null: also the expectation of the columns, with which the backward needs no walk. Only
  // in the rectangular case without both_directions.
  void* expectation;
} ContrastiveFwdArgs;

typedef struct {
  ContrastiveArgs common;
  const double* grad_lse;              // (N,) contiguous as all of these, or null: zero
  const double* grad_column_lse;       // (M,) or null
  const double* grad_positive_logits;  // (N, P) or null
  const double* lse;                   // (N,), as the forward wrote it and the next three
  const double* column_lse;            // (M,), needed with grad_column_lse
  const void* row_rnorm;
  const void* column_rnorm;
  const void* expectation;  // or null. With it grad_columns and grad_column_lse are null
  void* grad_rows;     // (N, D) contiguous, or null where not needed
  void* grad_columns;  // (M, D) contiguous, or null where not needed; null in the square case
  void* grad_scale;    // one acc_t, always written
  void* grad_column_bias;  // (M,) acc_t, or null where not needed
  void* grad_row_bias;     // (N,) acc_t, or null where not needed
} ContrastiveBwdArgs;

// Each returns 0 or a cudaError_t. Sizes N, M and D are at least 1. The first two tell the bytes of scratch
// memory that a call with these arguments needs, whose workspace is not set yet; they launch nothing.
int contrastive_fwd_workspace(const ContrastiveFwdArgs* args, size_t* bytes);
int contrastive_bwd_workspace(const ContrastiveBwdArgs* args, size_t* bytes);
int contrastive_fwd(const ContrastiveFwdArgs* args, cudaStream_t stream);
int contrastive_bwd(const ContrastiveBwdArgs* args, cudaStream_t stream);

// The same of calls with additions: rows and columns of one dtype, and the backward without the expectation,
// from which contrastive_bwd works as it is.
int contrastive_additions_fwd_workspace(const ContrastiveFwdArgs* args, size_t* bytes);
int contrastive_additions_bwd_workspace(const ContrastiveBwdArgs* args, size_t* bytes);
int contrastive_additions_fwd(const ContrastiveFwdArgs* args, cudaStream_t stream);
int contrastive_additions_bwd(const ContrastiveBwdArgs* args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
