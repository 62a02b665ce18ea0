// Device code of `batch_hard` on the tile walk of tile_walk.cuh.
//
//   k_ij = |x^_j|^2 / 2 - <x^_i, x^_j>, or -<x^_i, x^_j> for the cosine
//   positive_i = argmax k_ij over j != i of i's label      negative_i = argmin k_ij over j of another label
//
// A key that is NaN goes before every other, of equal keys the lowest index, -1 where there is none.
//
// Tiling: ReduceShape; every thread keeps the best two of its share of 4 rows with their indices in
//   registers, columns in ascending order; the lanes of a row meet once at the end, then the parts of the
//   columns. B = ceil(N / 128) blocks, T = ceil(N / kBlockN) tiles, S = ceil(D / 128 bytes) steps.
// Products: 1 unit of 2 N N D flops, 256 B T S mma, each 16 x 8 by 32 bytes of depth.
// Traffic, 32-byte sectors of global memory: operands 4 N S (times T beyond the first step, which registers
//   hold on tensor cores, where K < S - 1) + 4 B N S; column norms and half squares B T kBlockN / 8 each,
//   column labels B T kBlockN / 4; of rows 16 B norms and 32 B labels. Writes 4 N numbers per part.
// Shared memory: K * 16 KB of own rows + 3 * kBlockN * (136 bytes + 2 acc_t). No bank conflicts.
// Occupancy: 2 blocks of 128 threads per multiprocessor, at most 255 registers, on sm_80, sm_90 and sm_100.
// Numerics: products in scalar_t with acc_t accumulation, all else in acc_t.
#pragma once

#include <cstdint>

#include "rows.cuh"
#include "tile_walk.cuh"

namespace ssl_kernels {
namespace batch_hard {

template <typename scalar_t, typename acc_t>
struct Problem {
  Operand<scalar_t, acc_t> rows;
  int64_t width;             // D padded to 16 bytes
  const acc_t* half_square;  // null: cosine
  const int64_t* labels;
};

// The best candidate so far: the largest key if kLargest, else the smallest.
template <typename acc_t, bool kLargest>
struct Best {
  acc_t key;
  int index;  // -1: none yet

  static __device__ __forceinline__ bool beats(acc_t a, acc_t b) { return kLargest ? a > b : a < b; }

  __device__ __forceinline__ void clear() {
    key = acc_t(0);
    index = -1;
  }

  // Takes a candidate of a higher index than any before. Without branches, on which lanes would part.
  __device__ __forceinline__ void take(bool is_candidate, acc_t candidate, int j) {
    const bool before_all = (candidate != candidate) & (key == key);
    const bool taken = is_candidate & ((index < 0) | beats(candidate, key) | before_all);
    key = taken ? candidate : key;
    index = taken ? j : index;
  }

  __device__ __forceinline__ void merge(acc_t other_key, int other_index) {
    const bool is_nan = key != key, other_is_nan = other_key != other_key;
    const bool tie = (is_nan & other_is_nan) | (key == other_key);
    const bool goes_first = tie ? other_index < index : !is_nan & (other_is_nan | beats(other_key, key));
    const bool taken = (other_index >= 0) & ((index < 0) | goes_first);
    key = taken ? other_key : key;
    index = taken ? other_index : index;
  }
};

// What a row has after a part of the columns.
template <typename acc_t>
struct alignas(16) Hardest {
  Best<acc_t, true> positive;
  Best<acc_t, false> negative;
};

template <typename Engine>
using Shape = ReduceShape<Engine, 1, 2, true>;

template <typename Engine>
__global__ void __launch_bounds__(Shape<Engine>::kThreads, Shape<Engine>::kBlocksPerSm)
    batch_hard_kernel(const Problem<typename Engine::scalar_t, typename Engine::acc_t> problem,
                      Hardest<typename Engine::acc_t>* partial) {
  using acc_t = typename Engine::acc_t;
  constexpr int kNTiles = Shape<Engine>::kNTiles;
  enum ColumnTerm { kRnorm, kHalfSquare };
  const auto& rows = problem.rows;
  const int lane = threadIdx.x % kWarpSize;
  extern __shared__ __align__(128) unsigned char shared[];
  TileWalk<Shape<Engine>, Engine> walk(shared, rows, rows,
                                       {{rows.rnorm, problem.half_square}, problem.labels}, problem.width);
  const int row0 = static_cast<int>(walk.row0()) + walk.warp_row();
  const int count = static_cast<int>(rows.count);

  acc_t row_factor[4];
  int64_t label[4];
  Hardest<acc_t> hardest[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + fragment_row(lane, i / 2, i % 2 * 2);
    row_factor[i] = rows.rnorm && row < count ? rows.rnorm[row] : acc_t(1);
    label[i] = row < count ? problem.labels[row] : 0;
    hardest[i].positive.clear();
    hardest[i].negative.clear();
  }
  for (walk.start(); walk.next();) {
    Fragment<acc_t, kNTiles> c;
    walk.products(c);
    walk.normalize(c, row_factor);
    const int column0 = static_cast<int>(walk.column0());
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const Pair<int64_t> labels = walk.column_labels(n);
      Pair<acc_t> half_square = {{acc_t(0), acc_t(0)}};
      if (problem.half_square) half_square = walk.column_pair(kHalfSquare, n);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = column0 + fragment_column(lane, n, e);
        const bool inside = column < count;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = row0 + fragment_row(lane, i / 2, i % 2 * 2);
          const acc_t key = half_square.value[e] - c[i / 2][n][i % 2 * 2 + e];
          const bool same = labels.value[e] == label[i];
          hardest[i].positive.take(inside & same & (row != column), key, column);
          hardest[i].negative.take(inside & !same, key, column);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      hardest[i].positive.merge(__shfl_xor_sync(kAllLanes, hardest[i].positive.key, offset),
                                __shfl_xor_sync(kAllLanes, hardest[i].positive.index, offset));
      hardest[i].negative.merge(__shfl_xor_sync(kAllLanes, hardest[i].negative.key, offset),
                                __shfl_xor_sync(kAllLanes, hardest[i].negative.index, offset));
    }
    const int row = row0 + fragment_row(lane, i / 2, i % 2 * 2);
    if (lane % 4 == 0 && row < count) partial[blockIdx.y * rows.count + row] = hardest[i];
  }
}

// The indices from `parts` parts, (parts, count). One thread per row.
template <typename acc_t>
__global__ void batch_hard_merge_kernel(const Hardest<acc_t>* partial, int parts, int64_t count,
                                        int64_t* positive_index, int64_t* negative_index) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= count) return;
  Hardest<acc_t> hardest = partial[row];
  for (int part = 1; part < parts; ++part) {
    const Hardest<acc_t> next = partial[part * count + row];
    hardest.positive.merge(next.positive.key, next.positive.index);
    hardest.negative.merge(next.negative.key, next.negative.index);
  }
  positive_index[row] = hardest.positive.index;
  negative_index[row] = hardest.negative.index;
}

}  // namespace batch_hard
}  // namespace ssl_kernels
