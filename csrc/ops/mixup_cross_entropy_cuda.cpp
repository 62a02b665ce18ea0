// Registers the CUDA kernels of mixup_cross_entropy: results, then csrc/cuda/mixup_cross_entropy.h on the current
// stream.
#include <torch/library.h>

#include <tuple>

#include "../cuda/mixup_cross_entropy.h"
#include "mixing.h"
#include "mixing_cuda.h"

namespace ssl_kernels {
namespace {

// The logits have unit column stride, the target is contiguous.
MixupCrossEntropyArgs arguments(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& permutation,
                                const at::Tensor& lam, double label_smoothing) {
  MixupCrossEntropyArgs args = {};
  args.dtype = dtype_code("mixup_cross_entropy", logits.scalar_type());
  args.N = logits.size(0);
  args.C = logits.size(1);
  args.label_smoothing = label_smoothing;
  args.logits = logits.data_ptr();
  args.row_stride = logits.stride(0);
  args.target = target.data_ptr<int64_t>();
  args.permutation = permutation.data_ptr<int64_t>();
  args.permutation_stride = permutation.stride(0);
  args.lam = lam.data_ptr();
  args.lam_stride = lam.stride(0);
  return args;
}

at::Tensor with_unit_columns(const at::Tensor& logits) {
  return logits.stride(1) == 1 || logits.size(1) == 1 ? logits : logits.contiguous();
}

cudaStream_t stream_of(const at::Tensor& logits) {
  return c10::cuda::getCurrentCUDAStream(logits.get_device()).stream();
}

std::tuple<at::Tensor, at::Tensor> mixup_cross_entropy_fwd(const at::Tensor& logits, const at::Tensor& target,
                                                           const at::Tensor& permutation, const at::Tensor& lam,
                                                           double label_smoothing) {
  check_mixup_cross_entropy(logits, target, permutation, lam);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor rows = with_unit_columns(logits), labels = target.contiguous();
  const at::Tensor loss = at::empty({logits.size(0)}, logits.options().dtype(at::kDouble)), lse = at::empty_like(loss);
  const MixupCrossEntropyFwdArgs args = {arguments(rows, labels, permutation, lam, label_smoothing),
                                         loss.data_ptr<double>(), lse.data_ptr<double>()};
  C10_CUDA_CHECK(static_cast<cudaError_t>(::mixup_cross_entropy_fwd(&args, stream_of(logits))));
  return {loss, lse};
}

at::Tensor mixup_cross_entropy_bwd(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                                   const at::Tensor& permutation, const at::Tensor& lam, const at::Tensor& lse,
                                   double label_smoothing) {
  check_mixup_cross_entropy(logits, target, permutation, lam);
  check_row_numbers("grad_loss", grad_loss, logits);
  check_row_numbers("lse", lse, logits);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor rows = with_unit_columns(logits), labels = target.contiguous(), row_lse = lse.contiguous();
  const at::Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  const MixupCrossEntropyBwdArgs args = {arguments(rows, labels, permutation, lam, label_smoothing),
                                         grad_loss.data_ptr<double>(), grad_loss.stride(0), row_lse.data_ptr<double>(),
                                         grad_logits.data_ptr()};
  C10_CUDA_CHECK(static_cast<cudaError_t>(::mixup_cross_entropy_bwd(&args, stream_of(logits))));
  return grad_logits;
}

TORCH_LIBRARY_IMPL(ssl_kernels, CUDA, library) {
  library.impl("mixup_cross_entropy_fwd.native", &mixup_cross_entropy_fwd);
  library.impl("mixup_cross_entropy_bwd.native", &mixup_cross_entropy_bwd);
}

}  // namespace
}  // namespace ssl_kernels
