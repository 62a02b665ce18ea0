// Device code of `queue_push_`.
//
//   storage[(P + b) mod K] = k^_b for the last min(B, K) keys b      k^ = k / max(|k|, 1e-12), or k
//   P = (P + B) mod K      filled = min(K, filled + B)
//
// Tiling: one warp per key, 8 warps per block, each lane 4 neighbouring elements at a time where addresses
//   allow. Every warp reads the position from device memory, so a second launch advances it.
// Traffic: reads min(B, K) D keys once from memory (for normalised ones again from cache), writes as many
//   elements of storage. No shared memory.
// Occupancy: 4 blocks of 256 threads per multiprocessor, at most 64 registers, on sm_80, sm_90 and sm_100.
// Numerics: norm and product in acc_t of the keys, rounded to the type of storage.
#pragma once

#include <cstdint>

#include "device/math.cuh"
#include "device/warp.cuh"

namespace ssl_kernels {
namespace queue_push {

constexpr int kWarps = 8;
constexpr int kGroup = 4;  // elements that a lane moves at once

template <typename T>
struct alignas(kGroup * sizeof(T)) Group {
  T value[kGroup];
};

// The row that `index` names in a ring of `size`, for any index.
__device__ __forceinline__ int64_t wrap(int64_t index, int64_t size) {
  index %= size;
  return index < 0 ? index + size : index;
}

template <typename storage_t, typename acc_t>
__device__ __forceinline__ storage_t to_storage(acc_t x) {
  if constexpr (std::is_same_v<storage_t, __half>) {
    if constexpr (sizeof(acc_t) == 8) return __double2half(x);
    else return __float2half_rn(x);
  } else if constexpr (std::is_same_v<storage_t, __nv_bfloat16>) {
    if constexpr (sizeof(acc_t) == 8) return __double2bfloat16(x);
    else return __float2bfloat16_rn(x);
  } else {
    return static_cast<storage_t>(x);
  }
}

// `grouped`: rows of both are contiguous, D and all addresses are multiples of a group.
template <typename key_t, typename storage_t, typename acc_t>
__global__ void __launch_bounds__(kWarps* kWarpSize, 4)
    queue_push_kernel(storage_t* storage, const key_t* keys, int64_t row_stride, int64_t column_stride,
                      int64_t K, int64_t B, int64_t D, const int64_t* position, bool normalize,
                      bool grouped) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first = B > K ? B - K : 0;
  const int64_t b = first + static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (b >= B) return;
  const key_t* key = keys + b * row_stride;
  storage_t* row = storage + wrap(wrap(*position, K) + b % K, K) * D;

  acc_t factor = acc_t(1);
  if (normalize) {
    acc_t sum = acc_t(0);
    if (grouped) {
      for (int64_t d = lane * kGroup; d < D; d += kWarpSize * kGroup) {
        const auto group = *reinterpret_cast<const Group<key_t>*>(key + d);
#pragma unroll
        for (int e = 0; e < kGroup; ++e) sum += to_acc(group.value[e]) * to_acc(group.value[e]);
      }
    } else {
      for (int64_t d = lane; d < D; d += kWarpSize) {
        sum += to_acc(key[d * column_stride]) * to_acc(key[d * column_stride]);
      }
    }
    const acc_t norm = Math<acc_t>::sqrt(warp_sum(sum));
    factor = acc_t(1) / (norm < Math<acc_t>::kNormEps ? Math<acc_t>::kNormEps : norm);
  }
  if (grouped) {
    for (int64_t d = lane * kGroup; d < D; d += kWarpSize * kGroup) {
      const auto group = *reinterpret_cast<const Group<key_t>*>(key + d);
      Group<storage_t> result;
#pragma unroll
      for (int e = 0; e < kGroup; ++e)
        result.value[e] = to_storage<storage_t>(to_acc(group.value[e]) * factor);
      *reinterpret_cast<Group<storage_t>*>(row + d) = result;
    }
  } else {
    for (int64_t d = lane; d < D; d += kWarpSize) {
      row[d] = to_storage<storage_t>(to_acc(key[d * column_stride]) * factor);
    }
  }
}

// After all keys are written. One thread.
__global__ void queue_push_advance_kernel(int64_t* position, int64_t* filled, int64_t K, int64_t B) {
  *position = wrap(wrap(*position, K) + B % K, K);
  const int64_t count = *filled < 0 ? 0 : *filled;
  *filled = count < K && B < K - count ? count + B : K;
}

}  // namespace queue_push
}  // namespace ssl_kernels
