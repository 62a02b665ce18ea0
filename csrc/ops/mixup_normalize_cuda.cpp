// Registers the CUDA kernel of mixup_normalize: the result and scratch memory, then
// csrc/cuda/mixup_normalize.h on the current stream.
#include <torch/library.h>

#include "../cuda/mixup_normalize.h"
#include "mixing.h"
#include "mixing_cuda.h"

namespace ssl_kernels {
namespace {

at::Tensor mixup_normalize(const at::Tensor& x, const at::Tensor& lam, const at::Tensor& permutation,
                           const at::Tensor& mean, const at::Tensor& std, at::ScalarType dtype) {
  check_mixup_normalize(x, lam, permutation, mean, std, dtype);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor out = at::empty_like(x, x.options().dtype(dtype)), dense = dense_result(out);
  const at::Tensor bytes = samples_like(x, dense);
  MixupNormalizeArgs args = {};
  args.dtype = kernel_dtype("mixup_normalize: the dtype", dtype);
  args.B = x.size(0);
  args.F = sample_size(x);
  args.C = x.size(1);
  args.channel_stride = dense.stride(1);
  args.x = bytes.data_ptr<uint8_t>();
  args.x_stride = bytes.stride(0);
  args.out = dense.data_ptr();
  args.out_stride = dense.stride(0);
  args.lam = lam.data_ptr<float>();
  args.lam_stride = lam.stride(0);
  args.permutation = permutation.data_ptr<int64_t>();
  args.permutation_stride = permutation.stride(0);
  args.mean = mean.data_ptr<float>();
  args.std = std.data_ptr<float>();
  args.mean_stride = mean.stride(0);
  args.std_stride = std.stride(0);
  launch_with_workspace(args, args.workspace, x, mixup_normalize_workspace, ::mixup_normalize);
  copy_back(out, dense);
  return out;
}

TORCH_LIBRARY_IMPL(ssl_kernels, CUDA, library) {
  library.impl("mixup_normalize.native", &mixup_normalize);
}

}  // namespace
}  // namespace ssl_kernels
