// What launchers decide of the walk of permutation_walk.cuh: into how many pieces they cut it, and where its
// order is made.
#pragma once

#include "launcher.cuh"
#include "permutation_walk.cuh"

namespace ssl_kernels {
namespace mixing {

// Threads a multiprocessor should have for its share of the memory's bandwidth.
constexpr int64_t kThreadsPerMultiprocessor = 512;
// A cut costs two samples more: 3 % of a piece's.
constexpr int64_t kMinPart = 64;

// Pieces of `samples` that fill the card where one walk has only `threads` threads; `requested` if not 0.
inline int pick_parts(int requested, int64_t samples, int64_t threads) {
  if (requested > 0) return static_cast<int>(std::min<int64_t>(requested, samples));
  const int64_t wanted = blocks_for(multiprocessors() * kThreadsPerMultiprocessor, threads);
  return static_cast<int>(std::min(wanted, std::max<int64_t>(1, samples / kMinPart)));
}

// Where the arrays of order_walk lie: in shared memory, then `global` is null, or in scratch memory.
struct OrderMemory {
  int* global;
  SharedBytes shared;
};

inline OrderMemory order_memory(Launcher& launcher, int64_t count) {
  constexpr int kBytes = OrderScratch::kArrays * sizeof(int), kOthers = 1024;
  int device = 0, bytes = 48 * 1024;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int64_t most = std::min<int64_t>(kMostSharedSamples, (bytes - kOthers) / kBytes);
  if (count > most) return {launcher.scratch<int>(OrderScratch::kArrays * count), {0, 0}};
  return {nullptr, {static_cast<int>(count * kBytes), static_cast<int>(most * kBytes)}};
}

}  // namespace mixing
}  // namespace ssl_kernels
