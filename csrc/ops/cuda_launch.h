// What the torch side of every CUDA operation shares: tensors as plain pointers, scratch memory, the current
// stream, products by ATen.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>

#include "../cuda/dtype.h"
#include "allow_tf32.h"
#include "matrix_product.h"

namespace ssl_kernels {

// `what` begins the error message: "contrastive: rows".
inline Dtype kernel_dtype(const char* what, at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return kFloat64;
    case at::kFloat: return kFloat32;
    case at::kHalf: return kFloat16;
    case at::kBFloat16: return kBFloat16;
    default: TORCH_CHECK(false, what, " must be float64, float32, float16 or bfloat16, got ", dtype);
  }
}

inline std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional<at::Tensor>(tensor->contiguous()) : std::nullopt;
}

// Null for an absent or empty tensor.
template <typename T = void>
T* pointer(const at::Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

template <typename T = void>
T* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

// A MultiplyMatrices for a launcher that runs on the current stream of the current device.
inline int multiply_by_aten(const MatrixProduct* product, cudaStream_t) {
  multiply_on({at::kCUDA, c10::cuda::current_device()}, *product);
  return 0;
}

// Runs a launcher on the current stream of the device of `operand`, which is the current device.
template <typename Launcher, typename... Args>
void launch(const at::Tensor& operand, Launcher* launcher, const Args&... args) {
  const auto stream = c10::cuda::getCurrentCUDAStream(operand.get_device());
  C10_CUDA_CHECK(static_cast<cudaError_t>(launcher(args..., stream.stream())));
}

// The same with as much scratch memory in `workspace`, a member of `args`, as workspace_bytes asks for.
template <typename Args>
void launch_with_workspace(Args& args, void*& workspace, const at::Tensor& operand,
                           int (*workspace_bytes)(const Args*, size_t*),
                           int (*launcher)(const Args*, cudaStream_t)) {
  size_t bytes = 0;
  C10_CUDA_CHECK(static_cast<cudaError_t>(workspace_bytes(&args, &bytes)));
  const at::Tensor memory = at::empty({static_cast<int64_t>(bytes)}, operand.options().dtype(at::kByte));
  workspace = memory.data_ptr();
  launch(operand, launcher, &args);
}

}  // namespace ssl_kernels
