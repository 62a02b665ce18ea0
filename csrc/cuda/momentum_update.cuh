// Device code of `momentum_update_`, over many tensors in one launch.
//
//   average = shadow = round(master) ? master : shadow    what was written into a shadow replaces its master
//   master = average + w (source - average)               w = 1 - momentum; for w >= 1/2
//   master = source + (w - 1) (source - average)
//   shadow = round(master)
//
// Tiling: a block owns kChunk neighbouring elements of one tensor; the tensors' addresses and the block each
//   begins at are a kernel parameter, in which a block looks for its own by bisection. Each thread has
//   kGroups groups of kGroup elements, all loaded before the first is stored; single elements where addresses
//   allow no groups, and at the end.
// Launches: one for every kMaxTensors tensors of a pair of dtypes.
// Traffic: reads 4 bytes of master, 2 of shadow and 4 or 2 of source an element, writes 4 of master and 2 of
//   shadow; one pass. Every warp reads w. No shared memory.
// Numerics: float32, rounded to the nearest, ties to even, into the shadow.
#pragma once

#include <cstdint>

#include "device/math.cuh"
#include "device/vector_access.cuh"

namespace ssl_kernels {
namespace momentum_update {

constexpr int kThreads = 256;
constexpr int kGroup = 4;
constexpr int kGroups = 4;
constexpr int kChunk = kThreads * kGroup * kGroups;
constexpr int kMaxTensors = 100;  // what fits into the 4 KB of a kernel's parameters

struct Batch {
  float* masters[kMaxTensors];
  void* shadows[kMaxTensors];
  const void* sources[kMaxTensors];
  int64_t counts[kMaxTensors];
  int first_block[kMaxTensors];
  int tensors;
};

template <typename shadow_t, typename source_t>
struct Update {
  float factor;
  bool from_source;

  __device__ __forceinline__ explicit Update(float weight)
      : factor(weight < 0.5f ? weight : weight - 1.0f), from_source(!(weight < 0.5f)) {}

  __device__ __forceinline__ void operator()(float& master, shadow_t& shadow, source_t source) const {
    const float written = to_acc(shadow), to = to_acc(source);
    const float average = to_acc(from_acc<shadow_t>(master)) == written ? master : written;
    master = (from_source ? to : average) + factor * (to - average);
    shadow = from_acc<shadow_t>(master);
  }
};

template <typename T>
__device__ __forceinline__ bool in_groups(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Chunk<T, kGroup>) == 0;
}

template <typename shadow_t, typename source_t>
__global__ void __launch_bounds__(kThreads)
    momentum_update_kernel(const __grid_constant__ Batch batch, const float* __restrict__ weight) {
  const int block = blockIdx.x;
  int tensor = 0, end = batch.tensors;
  while (end - tensor > 1) {
    const int middle = (tensor + end) / 2;
    if (batch.first_block[middle] <= block) tensor = middle;
    else end = middle;
  }
  const int64_t begin = static_cast<int64_t>(block - batch.first_block[tensor]) * kChunk;
  const int64_t count = batch.counts[tensor] - begin;
  float* master = batch.masters[tensor] + begin;
  shadow_t* shadow = static_cast<shadow_t*>(batch.shadows[tensor]) + begin;
  const source_t* source = static_cast<const source_t*>(batch.sources[tensor]) + begin;
  const Update<shadow_t, source_t> update(__ldg(weight));

  if (count >= kChunk && in_groups(master) && in_groups(shadow) && in_groups(source)) {
    Chunk<float, kGroup> m[kGroups];
    Chunk<shadow_t, kGroup> h[kGroups];
    Chunk<source_t, kGroup> s[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int i = (g * kThreads + threadIdx.x) * kGroup;
      m[g] = load_streaming(reinterpret_cast<const Chunk<float, kGroup>*>(master + i));
      h[g] = load_streaming(reinterpret_cast<const Chunk<shadow_t, kGroup>*>(shadow + i));
      s[g] = load_streaming(reinterpret_cast<const Chunk<source_t, kGroup>*>(source + i));
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int i = (g * kThreads + threadIdx.x) * kGroup;
#pragma unroll
      for (int e = 0; e < kGroup; ++e) update(m[g].value[e], h[g].value[e], s[g].value[e]);
      store_streaming(reinterpret_cast<Chunk<float, kGroup>*>(master + i), m[g]);
      store_streaming(reinterpret_cast<Chunk<shadow_t, kGroup>*>(shadow + i), h[g]);
    }
  } else {
    for (int i = threadIdx.x; i < kChunk && i < count; i += kThreads) update(master[i], shadow[i], source[i]);
  }
}

}  // namespace momentum_update
}  // namespace ssl_kernels
