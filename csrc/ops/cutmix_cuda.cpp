// Registers the CUDA kernels of cutmix: results and scratch memory, then csrc/cuda/cutmix.h on the current
// stream.
#include <torch/library.h>

#include "../cuda/cutmix.h"
#include "mixing.h"
#include "mixing_cuda.h"

namespace ssl_kernels {
namespace {

using Workspace = int (*)(const CutmixArgs*, size_t*);
using Launcher = int (*)(const CutmixArgs*, cudaStream_t);

// x and out have dense samples of one layout, or are the same.
void paste(const at::Tensor& x, const at::Tensor& out, const at::Tensor& boxes, const at::Tensor& permutation,
           int32_t dtype, Workspace workspace, Launcher launcher) {
  CutmixArgs args = {};
  args.element_bytes = static_cast<int32_t>(x.element_size());
  args.dtype = dtype;
  args.B = x.size(0);
  args.F = sample_size(x);
  args.H = x.size(-2);
  args.W = x.size(-1);
  args.row_stride = out.stride(-2);
  args.column_stride = out.stride(-1);
  args.x = x.data_ptr();
  args.x_stride = x.stride(0);
  args.out = out.data_ptr();
  args.out_stride = out.stride(0);
  args.boxes = boxes.data_ptr<int64_t>();
  for (int i = 0; i < 2; ++i) args.box_strides[i] = boxes.stride(i);
  args.permutation = permutation.data_ptr<int64_t>();
  args.permutation_stride = permutation.stride(0);
  launch_with_workspace(args, args.workspace, x, workspace, launcher);
}

void cutmix_(const at::Tensor& x, const at::Tensor& boxes, const at::Tensor& permutation) {
  check_cutmix("cutmix_", x, boxes, permutation);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor dense = has_dense_samples(x) ? x : x.contiguous();
  paste(dense, dense, boxes, permutation, 0, cutmix_fwd_workspace, ::cutmix_fwd);
  copy_back(x, dense);
}

at::Tensor into_new(const at::Tensor& x, const at::Tensor& boxes, const at::Tensor& permutation,
                    int32_t dtype, Workspace workspace, Launcher launcher) {
  check_cutmix("cutmix", x, boxes, permutation);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor out = at::empty_like(x), dense = dense_result(out);
  paste(samples_like(x, dense), dense, boxes, permutation, dtype, workspace, launcher);
  copy_back(out, dense);
  return out;
}

at::Tensor cutmix_fwd(const at::Tensor& x, const at::Tensor& boxes, const at::Tensor& permutation) {
  return into_new(x, boxes, permutation, 0, cutmix_fwd_workspace, ::cutmix_fwd);
}

at::Tensor cutmix_bwd(const at::Tensor& grad, const at::Tensor& boxes, const at::Tensor& permutation) {
  return into_new(grad, boxes, permutation, kernel_dtype("cutmix: the dtype", grad.scalar_type()),
                  cutmix_bwd_workspace, ::cutmix_bwd);
}

TORCH_LIBRARY_IMPL(ssl_kernels, CUDA, library) {
  library.impl("cutmix_.native", &cutmix_);
  library.impl("cutmix_fwd.native", &cutmix_fwd);
  library.impl("cutmix_bwd.native", &cutmix_bwd);
}

}  // namespace
}  // namespace ssl_kernels
