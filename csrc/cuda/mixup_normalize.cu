// Launchers of mixup_normalize.h.
#include "mixup_normalize.h"

#include "launcher.cuh"
#include "mixup_normalize.cuh"
#include "walk_parts.cuh"

namespace ssl_kernels {
namespace mixing {
namespace {

template <typename scalar_t, int kVec>
void normalize_features(Launcher& launcher, const MixupNormalizeArgs& args, int64_t first, int64_t features,
                        const Step<float>* steps) {
  if (features == 0) return;
  const unsigned blocks = blocks_for(features / kVec, kNormalizeThreads);
  const Channels channels = {args.mean, args.std, args.mean_stride, args.std_stride, args.C,
                             std::max<int64_t>(args.channel_stride, 1)};
  const int parts = pick_parts(args.parts, args.B, int64_t{blocks} * kNormalizeThreads);
  launcher.launch(mixup_normalize_kernel<scalar_t, kVec>, dim3(blocks, parts), kNormalizeThreads, 0, args.x,
                  args.x_stride, static_cast<scalar_t*>(args.out), args.out_stride, first, features,
                  static_cast<int>(args.B), channels, steps);
}

template <typename scalar_t>
void run(Launcher& launcher, const MixupNormalizeArgs& args) {
  const OrderMemory memory = order_memory(launcher, args.B);
  auto* steps = launcher.scratch<Step<float>>(args.B);
  const Permutation permutation = {args.permutation, args.permutation_stride, static_cast<int>(args.B)};
  launcher.launch(walk_order_kernel<float>, 1, kOrderThreads, memory.shared, permutation,
                  Shares<float>{args.lam, args.lam_stride}, false, false, false, memory.global, steps);
  constexpr int kVec = 16 / sizeof(scalar_t);
  const bool aligned = reinterpret_cast<uintptr_t>(args.x) % kVec == 0 &&
                       reinterpret_cast<uintptr_t>(args.out) % 16 == 0 &&
                       (args.B == 1 || (args.x_stride % kVec == 0 && args.out_stride % kVec == 0));
  const int64_t whole = aligned ? args.F / kVec * kVec : 0;
  normalize_features<scalar_t, kVec>(launcher, args, 0, whole, steps);
  normalize_features<scalar_t, 1>(launcher, args, whole, args.F - whole, steps);
}

int dispatch(const MixupNormalizeArgs& args, cudaStream_t stream, size_t* bytes) {
  if (args.B >= kMostSamples) return cudaErrorInvalidValue;
  Launcher launcher(args.workspace, stream, bytes != nullptr);
  switch (args.dtype) {
    case kFloat32: run<float>(launcher, args); break;
    case kFloat16: run<__half>(launcher, args); break;
    case kBFloat16: run<__nv_bfloat16>(launcher, args); break;
    default: return cudaErrorInvalidValue;
  }
  if (bytes) *bytes = launcher.used();
  return launcher.error();
}

}  // namespace
}  // namespace mixing
}  // namespace ssl_kernels

int mixup_normalize_workspace(const MixupNormalizeArgs* args, size_t* bytes) {
  return ssl_kernels::mixing::dispatch(*args, nullptr, bytes);
}

int mixup_normalize(const MixupNormalizeArgs* args, cudaStream_t stream) {
  return ssl_kernels::mixing::dispatch(*args, stream, nullptr);
}
