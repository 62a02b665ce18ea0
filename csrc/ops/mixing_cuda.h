// What the CUDA glue of the mixing operations shares: samples as the kernels take them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>

#include "cuda_launch.h"

namespace ssl_kernels {

inline int64_t sample_size(const at::Tensor& x) {
  return x.numel() / x.size(0);
}

// Whether each sample is F consecutive elements, in any order of its dimensions.
inline bool has_dense_samples(const at::Tensor& x) {
  return x.dim() == 1 || x.select(0, 0).is_non_overlapping_and_dense();
}

// x as it is where its samples lie in memory as those of `layout` do, else a copy.
inline at::Tensor samples_like(const at::Tensor& x, const at::Tensor& layout) {
  bool same = true;
  for (int64_t d = 1; d < x.dim(); ++d) same = same && (x.size(d) == 1 || x.stride(d) == layout.stride(d));
  if (same) return x;
  return at::empty_like(layout, layout.options().dtype(x.scalar_type())).copy_(x);
}

// `result` itself where its samples are dense, else contiguous memory whose contents are to be copied to it.
inline at::Tensor dense_result(const at::Tensor& result) {
  return has_dense_samples(result) ? result : at::empty_like(result, at::MemoryFormat::Contiguous);
}

inline void copy_back(const at::Tensor& result, const at::Tensor& dense) {
  if (!result.is_same(dense)) result.copy_(dense);
}

}  // namespace ssl_kernels
