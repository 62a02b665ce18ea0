// Registers the CUDA kernels of mixup: results and scratch memory, then csrc/cuda/mixup.h on the current
// stream.
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../cuda/mixup.h"
#include "mixing.h"
#include "mixing_cuda.h"

namespace ssl_kernels {
namespace {

// `out` may be absent (backward). x and out have dense samples of one layout.
MixupArgs arguments(const at::Tensor& x, const at::Tensor& out, const at::Tensor& lam,
                    const at::Tensor& permutation) {
  MixupArgs args = {};
  args.dtype = kernel_dtype("mixup: the dtype", x.scalar_type());
  args.B = x.size(0);
  args.F = sample_size(x);
  args.x = x.data_ptr();
  args.x_stride = x.stride(0);
  if (out.defined()) {
    args.out = out.data_ptr();
    args.out_stride = out.stride(0);
  }
  args.lam = lam.data_ptr();
  args.lam_stride = lam.stride(0);
  args.permutation = permutation.data_ptr<int64_t>();
  args.permutation_stride = permutation.stride(0);
  return args;
}

void mix(const at::Tensor& x, const at::Tensor& out, const at::Tensor& lam, const at::Tensor& permutation) {
  MixupArgs args = arguments(x, out, lam, permutation);
  launch_with_workspace(args, args.workspace, x, mixup_fwd_workspace, ::mixup_fwd);
}

void mixup_(const at::Tensor& x, const at::Tensor& lam, const at::Tensor& permutation) {
  check_mixup("mixup_", x, lam, permutation);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor dense = has_dense_samples(x) ? x : x.contiguous();
  mix(dense, dense, lam, permutation);
  copy_back(x, dense);
}

at::Tensor mixup_fwd(const at::Tensor& x, const at::Tensor& lam, const at::Tensor& permutation) {
  check_mixup("mixup", x, lam, permutation);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor out = at::empty_like(x), dense = dense_result(out);
  mix(samples_like(x, dense), dense, lam, permutation);
  copy_back(out, dense);
  return out;
}

std::tuple<at::Tensor, at::Tensor> mixup_bwd(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                                             const at::Tensor& lam, const at::Tensor& permutation,
                                             bool x_needs_grad) {
  check_mixup("mixup", grad, lam, permutation);
  if (x) check_like("mixup", "x", *x, grad);
  const c10::cuda::CUDAGuard guard(grad.device());
  const at::Tensor grad_x = x_needs_grad ? at::empty_like(grad) : at::empty({0}, grad.options());
  const at::Tensor grad_lam = at::empty({x ? lam.size(0) : 0}, lam.options());
  if (!x_needs_grad && !x) return {grad_x, grad_lam};
  const at::Tensor dense = x_needs_grad ? dense_result(grad_x) : at::Tensor();
  const at::Tensor layout = x_needs_grad ? dense : has_dense_samples(grad) ? grad : grad.contiguous();
  const at::Tensor g = samples_like(grad, layout);
  MixupBwdArgs args = {};
  args.common = arguments(g, dense, lam, permutation);
  const at::Tensor mixed = x ? samples_like(*x, layout) : at::Tensor();
  if (x) {
    args.x = mixed.data_ptr();
    args.x_stride = mixed.stride(0);
    args.grad_lam = grad_lam.data_ptr();
  }
  launch_with_workspace(args, args.common.workspace, grad, mixup_bwd_workspace, ::mixup_bwd);
  if (x_needs_grad) copy_back(grad_x, dense);
  return {grad_x, grad_lam};
}

TORCH_LIBRARY_IMPL(ssl_kernels, CUDA, library) {
  library.impl("mixup_.native", &mixup_);
  library.impl("mixup_fwd.native", &mixup_fwd);
  library.impl("mixup_bwd.native", &mixup_bwd);
}

}  // namespace
}  // namespace ssl_kernels
