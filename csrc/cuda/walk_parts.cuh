// Into how many pieces launchers cut the walk of permutation_walk.cuh.
#pragma once

#include "launcher.cuh"

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

}  // namespace mixing
}  // namespace ssl_kernels
