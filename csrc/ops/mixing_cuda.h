// What the CUDA glue of the mixing operations shares: samples as the kernels take them, scratch memory, the
// stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/dtype.h"

namespace ssl_kernels {

inline int32_t dtype_code(const char* op, at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return ::kFloat64;
    case at::kFloat: return ::kFloat32;
    case at::kHalf: return ::kFloat16;
    case at::kBFloat16: return ::kBFloat16;
    default: TORCH_CHECK(false, op, ": the dtype must be float64, float32, float16 or bfloat16, got ", dtype);
  }
}

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

// Calls launcher(args, stream) with as much scratch memory in `workspace` as workspace_bytes asks for.
template <typename Args>
void launch_with_workspace(Args& args, void*& workspace, const at::Tensor& x,
                           int (*workspace_bytes)(const Args*, size_t*),
                           int (*launcher)(const Args*, cudaStream_t)) {
  size_t bytes = 0;
  C10_CUDA_CHECK(static_cast<cudaError_t>(workspace_bytes(&args, &bytes)));
  const at::Tensor memory = at::empty({static_cast<int64_t>(bytes)}, x.options().dtype(at::kByte));
  workspace = memory.data_ptr();
  C10_CUDA_CHECK(
      static_cast<cudaError_t>(launcher(&args, c10::cuda::getCurrentCUDAStream(x.get_device()).stream())));
}

}  // namespace ssl_kernels
