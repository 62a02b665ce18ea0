// Launchers of mixup.h.
#include "mixup.h"

#include "launcher.cuh"
#include "mixup.cuh"
#include "walk_parts.cuh"

namespace ssl_kernels {
namespace mixing {
namespace {

template <typename scalar_t>
bool aligned(const void* data, int64_t stride, int64_t count) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (stride * sizeof(scalar_t) % 16 == 0 || count == 1);
}

template <typename acc_t>
Step<acc_t>* order(Launcher& launcher, const MixupArgs& args, bool inverse, bool in_place, bool everything) {
  const OrderMemory memory = order_memory(launcher, args.B);
  auto* steps = launcher.scratch<Step<acc_t>>(args.B);
  const Permutation permutation = {args.permutation, args.permutation_stride, static_cast<int>(args.B)};
  const Shares<acc_t> lam = {static_cast<const acc_t*>(args.lam), args.lam_stride};
  launcher.launch(walk_order_kernel<acc_t>, 1, kOrderThreads, memory.shared, permutation, lam, inverse,
                  in_place, everything, memory.global, steps);
  return steps;
}

// Features [from, F) of the samples, kVec at a time as far as they go; returns where it stopped.
template <int kVec, typename scalar_t, typename acc_t>
int64_t walk_features(Launcher& launcher, const MixupArgs& args, int64_t from, const Step<acc_t>* steps) {
  const int64_t features = (args.F - from) / kVec * kVec;
  if (features == 0) return from;
  const Batch<scalar_t> x = {static_cast<scalar_t*>(const_cast<void*>(args.x)) + from, args.x_stride};
  const Batch<scalar_t> out = {static_cast<scalar_t*>(args.out) + from, args.out_stride};
  const unsigned blocks = blocks_for(features / kVec, kThreads);
  const int count = static_cast<int>(args.B);
  const int parts = pick_parts(args.parts, args.B, int64_t{blocks} * kThreads);
  scalar_t* edges = nullptr;
  if (args.out == args.x && parts > 1) {
    const int rows = 2 * (parts - 1);
    edges = launcher.scratch<scalar_t>(rows * features);
    launcher.launch(mixup_edges_kernel<scalar_t, kVec, acc_t>, dim3(blocks, rows), kThreads, 0, x, features,
                    count, parts, steps, edges);
  }
  launcher.launch(mixup_walk_kernel<scalar_t, kVec, acc_t>, dim3(blocks, parts), kThreads, 0, x, out,
                  features, count, steps, edges);
  return from + features;
}

template <typename scalar_t, typename acc_t>
void mix_all(Launcher& launcher, const MixupArgs& args, bool inverse) {
  const auto* steps = order<acc_t>(launcher, args, inverse, args.out == args.x, false);
  int64_t done = 0;
  if (aligned<scalar_t>(args.x, args.x_stride, args.B) &&
      aligned<scalar_t>(args.out, args.out_stride, args.B)) {
    done = walk_features<16 / sizeof(scalar_t), scalar_t>(launcher, args, done, steps);
  }
  if constexpr (sizeof(scalar_t) < 16) walk_features<1, scalar_t>(launcher, args, done, steps);
}

template <typename scalar_t, typename acc_t>
void run(Launcher& launcher, const MixupArgs& args) {
  mix_all<scalar_t, acc_t>(launcher, args, false);
}

template <typename scalar_t, typename acc_t>
void run(Launcher& launcher, const MixupBwdArgs& args) {
  const MixupArgs& common = args.common;
  if (!args.x) return mix_all<scalar_t, acc_t>(launcher, common, true);
  const auto* steps = order<acc_t>(launcher, common, true, false, true);
  constexpr int kVec = 16 / sizeof(scalar_t);
  const int64_t vectors = aligned<scalar_t>(common.x, common.x_stride, common.B) &&
                                  aligned<scalar_t>(args.x, args.x_stride, common.B) &&
                                  (!common.out || aligned<scalar_t>(common.out, common.out_stride, common.B))
                              ? common.F / kVec
                              : 0;
  const int64_t singles = common.F - vectors * kVec;
  const int64_t vector_warps = blocks_for(vectors, kWarpSize),
                warps = vector_warps + blocks_for(singles, kWarpSize);
  auto* partial = launcher.scratch<acc_t>(warps * common.B);
  const int count = static_cast<int>(common.B);
  const auto launch = [&](auto kernel, int64_t from, int64_t threads, int64_t features, acc_t* sums) {
    const auto batch = [&](const void* data, int64_t stride) {
      auto* start = static_cast<scalar_t*>(const_cast<void*>(data));
      return Batch<scalar_t>{start ? start + from : nullptr, stride};
    };
    if (features == 0) return;
    const unsigned blocks = blocks_for(threads, kThreads);
    launcher.launch(kernel, dim3(blocks, pick_parts(common.parts, common.B, int64_t{blocks} * kThreads)),
                    kThreads, 0, batch(common.x, common.x_stride), batch(args.x, args.x_stride),
                    batch(common.out, common.out_stride), features, count, steps, sums);
  };
  launch(mixup_grad_kernel<scalar_t, kVec, acc_t>, 0, vectors, vectors * kVec, partial);
  launch(mixup_grad_kernel<scalar_t, 1, acc_t>, vectors * kVec, singles, singles,
         partial + vector_warps * common.B);
  launcher.launch(mixup_grad_lam_kernel<acc_t>, blocks_for(common.B, kWarpSize), 1024, 0,
                  static_cast<const acc_t*>(partial), warps, count, static_cast<acc_t*>(args.grad_lam));
}

const MixupArgs& common_of(const MixupArgs& args) {
  return args;
}
const MixupArgs& common_of(const MixupBwdArgs& args) {
  return args.common;
}

template <typename Args>
int dispatch(const Args& args, cudaStream_t stream, size_t* bytes) {
  const MixupArgs& common = common_of(args);
  if (common.B >= kMostSamples) return cudaErrorInvalidValue;
  Launcher launcher(common.workspace, stream, bytes != nullptr);
  switch (common.dtype) {
    case kFloat64: run<double, double>(launcher, args); break;
    case kFloat32: run<float, float>(launcher, args); break;
    case kFloat16: run<__half, float>(launcher, args); break;
    case kBFloat16: run<__nv_bfloat16, float>(launcher, args); break;
    default: return cudaErrorInvalidValue;
  }
  if (bytes) *bytes = launcher.used();
  return launcher.error();
}

}  // namespace
}  // namespace mixing
}  // namespace ssl_kernels

int mixup_fwd_workspace(const MixupArgs* args, size_t* bytes) {
  return ssl_kernels::mixing::dispatch(*args, nullptr, bytes);
}

int mixup_bwd_workspace(const MixupBwdArgs* args, size_t* bytes) {
  return ssl_kernels::mixing::dispatch(*args, nullptr, bytes);
}

int mixup_fwd(const MixupArgs* args, cudaStream_t stream) {
  return ssl_kernels::mixing::dispatch(*args, stream, nullptr);
}

int mixup_bwd(const MixupBwdArgs* args, cudaStream_t stream) {
  return ssl_kernels::mixing::dispatch(*args, stream, nullptr);
}
