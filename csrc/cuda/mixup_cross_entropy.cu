// Launchers of mixup_cross_entropy.h.
#include "mixup_cross_entropy.h"

#include "launcher.cuh"
#include "mixup_cross_entropy.cuh"

namespace ssl_kernels {
namespace mixing {
namespace {

constexpr int64_t kLongRowBytes = 8192;  // from here on eight warps own a row

template <typename scalar_t, typename acc_t>
MixedTargets<scalar_t, acc_t> problem_of(const MixupCrossEntropyArgs& args) {
  return {static_cast<const scalar_t*>(args.logits),
          args.row_stride,
          args.N,
          args.C,
          args.target,
          args.partner,
          args.partner_stride,
          args.partner_is_class != 0,
          args.ignore_index,
          static_cast<const acc_t*>(args.lam),
          args.lam_stride,
          args.label_smoothing,
          static_cast<const acc_t*>(args.weight),
          args.weight_sum};
}

template <typename scalar_t, typename acc_t, int kWarps, bool kWeighted>
void run(Launcher& launcher, const MixupCrossEntropyFwdArgs& args, unsigned blocks) {
  launcher.launch(mixup_cross_entropy_loss_kernel<scalar_t, acc_t, kWarps, kWeighted>, blocks,
                  kCrossEntropyThreads<kWarps>, 0, problem_of<scalar_t, acc_t>(args.common), args.loss,
                  args.lse, args.counted);
}

template <typename scalar_t, typename acc_t, int kWarps, bool kWeighted>
void run(Launcher& launcher, const MixupCrossEntropyBwdArgs& args, unsigned blocks) {
  launcher.launch(mixup_cross_entropy_grad_kernel<scalar_t, acc_t, kWarps, kWeighted>, blocks,
                  kCrossEntropyThreads<kWarps>, 0, problem_of<scalar_t, acc_t>(args.common), args.grad_loss,
                  args.grad_loss_stride, args.lse, static_cast<scalar_t*>(args.grad_logits));
}

template <typename scalar_t, typename acc_t, bool kWeighted, typename Args>
void run_rows(Launcher& launcher, const Args& args) {
  const MixupCrossEntropyArgs& common = args.common;
  const bool is_long = common.C * static_cast<int64_t>(sizeof(scalar_t)) > kLongRowBytes;
  if (common.warps_per_row == 8 || (common.warps_per_row == 0 && is_long)) {
    run<scalar_t, acc_t, 8, kWeighted>(launcher, args, static_cast<unsigned>(common.N));
  } else {
    run<scalar_t, acc_t, 1, kWeighted>(launcher, args, blocks_for(common.N, kRowsOfWarps));
  }
}

template <typename scalar_t, typename acc_t, typename Args>
void run_rows(Launcher& launcher, const Args& args) {
  if (args.common.weight && args.common.label_smoothing != 0) {
    run_rows<scalar_t, acc_t, true>(launcher, args);
  } else {
    run_rows<scalar_t, acc_t, false>(launcher, args);
  }
}

template <typename Args>
int dispatch(const Args& args, cudaStream_t stream) {
  if (args.common.N > INT32_MAX) return cudaErrorInvalidValue;
  Launcher launcher(nullptr, stream, false);
  switch (args.common.dtype) {
    case kFloat64: run_rows<double, double>(launcher, args); break;
    case kFloat32: run_rows<float, float>(launcher, args); break;
    case kFloat16: run_rows<__half, float>(launcher, args); break;
    case kBFloat16: run_rows<__nv_bfloat16, float>(launcher, args); break;
    default: return cudaErrorInvalidValue;
  }
  return launcher.error();
}

}  // namespace
}  // namespace mixing
}  // namespace ssl_kernels

int mixup_cross_entropy_fwd(const MixupCrossEntropyFwdArgs* args, cudaStream_t stream) {
  return ssl_kernels::mixing::dispatch(*args, stream);
}

int mixup_cross_entropy_bwd(const MixupCrossEntropyBwdArgs* args, cudaStream_t stream) {
  return ssl_kernels::mixing::dispatch(*args, stream);
}
