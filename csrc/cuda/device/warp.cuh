// Reductions over the lanes of a warp and over a block, in a fixed order.
#pragma once

#include "math.cuh"

namespace ssl_kernels {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

template <typename T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x = Math<T>::max(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}

// Over all threads of a block of kWarps warps; the result is valid in thread 0. `scratch` holds kWarps
// values.
template <int kWarps, typename T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  x = warp_sum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp == 0 ? warp_sum(lane < kWarps ? scratch[lane] : T(0)) : T(0);
}

template <int kWarps, typename T>
__device__ __forceinline__ T block_max(T x, T* scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  x = warp_max(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp == 0 ? warp_max(lane < kWarps ? scratch[lane] : T(0)) : T(0);
}

}  // namespace ssl_kernels
