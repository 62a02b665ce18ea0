// A tensor-core tile for the tests of the rig, whole and with seven planted bugs.
//   C = scale * A B^T, A (M, K) and B (N, K) bfloat16, C (M, N) float; rowsum_i += sum_j exp(C_ij).
// Tiling: a block of four warps owns BM x BN entries and walks K by BK, double buffered with cp.async.
// Needs: K % 8 == 0, BM == 64, BN % 8 == 0, BK % 16 == 0.
#pragma once
#include <cuda_bf16.h>
#include <stdint.h>

enum Bug {
  kNone,
  kRowsOutOfBounds,
  kNoAsyncWait,
  kNoBarrierBeforeUse,
  kNoTrailingBarrier,
  kShuffleInDivergentBranch,
  kAddAcrossBlocksWithoutAtomics,
  kDivergentBarrier,
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(source_bytes)
               : "memory");
}

__device__ __forceinline__ void commit_async_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_async_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <int BM, int BN, int BK, int kBug>
__global__ void __launch_bounds__(128)
    tile_product(const __nv_bfloat16* __restrict__ A, const __nv_bfloat16* __restrict__ B,
                 float* __restrict__ C, float* __restrict__ rowsum, int M, int N, int K, float scale) {
  constexpr int kThreads = 128;
  constexpr int kStride = BK + 8;  // rows 16 bytes apart modulo 128: ldmatrix without bank conflicts
  constexpr int kChunks = BK / 8;  // 16-byte chunks of a row
  __shared__ __align__(16) __nv_bfloat16 tile_a[2][BM][kStride];
  __shared__ __align__(16) __nv_bfloat16 tile_b[2][BN][kStride];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
  float acc[BN / 8][4] = {};

  auto load = [&](int stage, int k0) {
    for (int i = thread; i < BM * kChunks; i += kThreads) {
      const int row = i / kChunks, column = (i % kChunks) * 8;
      const bool inside = (m0 + row < M || kBug == kRowsOutOfBounds) && k0 + column < K;
      const size_t offset = inside ? static_cast<size_t>(m0 + row) * K + k0 + column : 0;
      copy_async_16(&tile_a[stage][row][column], A + offset, inside ? 16 : 0);
    }
    for (int i = thread; i < BN * kChunks; i += kThreads) {
      const int row = i / kChunks, column = (i % kChunks) * 8;
      const bool inside = n0 + row < N && k0 + column < K;
      const size_t offset = inside ? static_cast<size_t>(n0 + row) * K + k0 + column : 0;
      copy_async_16(&tile_b[stage][row][column], B + offset, inside ? 16 : 0);
    }
    commit_async_group();
  };

  load(0, 0);
  for (int k0 = 0, stage = 0; k0 < K; k0 += BK, stage ^= 1) {
    if (k0 + BK < K) {
      load(stage ^ 1, k0 + BK);
      if (kBug != kNoAsyncWait) wait_async_group<1>();
    } else {
      wait_async_group<0>();
    }
    if (kBug != kNoBarrierBeforeUse) __syncthreads();
    for (int kk = 0; kk < BK; kk += 16) {
      uint32_t a[4];
      load_matrix_x4(a, &tile_a[stage][warp * 16 + (lane & 15)][kk + (lane >> 4) * 8]);
      for (int j = 0; j < BN / 8; ++j) {
        uint32_t b[2];
        load_matrix_x2(b, &tile_b[stage][j * 8 + (lane & 7)][kk + ((lane >> 3) & 1) * 8]);
        mma_bf16(acc[j], a, b);
      }
    }
    if (kBug != kNoTrailingBarrier) __syncthreads();
  }

  const int quad = lane & 3, row0 = m0 + warp * 16 + (lane >> 2);
  float sum[2] = {0.f, 0.f};
  for (int j = 0; j < BN / 8; ++j) {
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 8 * half, column = n0 + j * 8 + quad * 2;
      for (int e = 0; e < 2; ++e) {
        if (row < M && column + e < N) {
          const float value = acc[j][2 * half + e] * scale;
          C[static_cast<size_t>(row) * N + column + e] = value;
          sum[half] += __expf(value);
        }
      }
    }
  }
  for (int half = 0; half < 2; ++half) {
    if (kBug == kShuffleInDivergentBranch && quad == 3) continue;
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    const int row = row0 + 8 * half;
    if (quad == 0 && row < M) {
      if (kBug == kAddAcrossBlocksWithoutAtomics) {
        rowsum[row] += sum[half];
      } else {
        atomicAdd(&rowsum[row], sum[half]);
      }
    }
  }
  if (kBug == kDivergentBarrier) {
    if (warp == 0) __syncthreads();
  }
}
