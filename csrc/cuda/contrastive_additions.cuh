// What an AddingEngine's kernels of `contrastive` make of a tile between its product and its exponentials:
//
//   s'_ij = a v_ij, a = scale log2(e), rounded once, the same number in forward and backward, whichever side
//   owns the
//           rows
//   left out where s'_ij > the larger of row i's and column j's limit, unless a positive names (i, j)
//   what stays gets the bias of its column in the sums of rows, that of its row in the sums of columns
//
// so exponents are s' + bias less a shift, and the base-2 factor of the sums is 1.
//
// Traffic, 32-byte sectors of global memory for float (double: twice): with each tile every warp reads the
//   bias and the limit of its columns from cache, one sector for 8 columns and each of them. Of its rows it
//   reads them once in the forward, 4 sectors each, in backward and expectation with each tile. With limits
//   the positives of a tile are read once more. Products and shared memory: as without. Prepared copies: 3
//   acc_t per row and per column.
// Numerics: as of the kernels without additions, but for the rounding of s'.
#pragma once

#include "contrastive.cuh"
#include "device/online_softmax.cuh"

namespace ssl_kernels {
namespace contrastive {

constexpr int64_t kAdditionsPadding = 128;  // whole tiles and blocks of rows of every shape

// Additions of one side as the tiles take them, 0 and no limits up to `padded`. A limit of NaN is none. Null
// results are left out. One thread per row. Traffic: reads and writes each once.
template <typename acc_t>
__global__ void contrastive_additions_kernel(const acc_t* bias, const acc_t* limit, const uint8_t* exempt,
                                             int64_t count, int64_t padded, acc_t* base2_bias,
                                             acc_t* base2_limit, acc_t* exemption) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= padded) return;
  const bool inside = row < count;
  const acc_t infinity = Math<acc_t>::infinity();
  if (base2_bias) base2_bias[row] = inside ? Math<acc_t>::mul(bias[row], Math<acc_t>::kLog2e) : acc_t(0);
  if (base2_limit) {
    const acc_t value = inside ? Math<acc_t>::mul(limit[row], Math<acc_t>::kLog2e) : infinity;
    base2_limit[row] = value == value ? value : infinity;
  }
  if (exemption) exemption[row] = inside && exempt && exempt[row] ? infinity : -infinity;
}

// The additions of one row of a tile.
template <typename acc_t>
struct RowAdditions {
  acc_t bias, own_limit, other_limit;
};

// Those of a lane's rows of a warp's part of a tile, by fragment_row.
template <typename acc_t, typename Problem>
__device__ __forceinline__ void read_row_additions(const Problem& problem, int64_t row0,
                                                   RowAdditions<acc_t> (&rows)[4]) {
  const SideAdditions<acc_t>& own = problem.own_additions;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = row0 + fragment_row(threadIdx.x % kWarpSize, i / 2, i % 2 * 2);
    rows[i] = {own.bias ? own.bias[row] : acc_t(0),
               own.own_limit ? own.own_limit[row] : Math<acc_t>::infinity(),
               own.other_limit ? own.other_limit[row] : Math<acc_t>::infinity()};
  }
}

// Those of the columns of elements c[.][n][0] and c[.][n][1] in a warp's part of a tile, at column0; null:
// `otherwise`.
template <typename acc_t>
__device__ __forceinline__ Pair<acc_t> column_additions(const acc_t* values, int64_t column0, int n,
                                                        acc_t otherwise) {
  if (!values) return {{otherwise, otherwise}};
  return *reinterpret_cast<const Pair<acc_t>*>(values + column0 +
                                               fragment_column(threadIdx.x % kWarpSize, n, 0));
}

// Elements that no limit leaves out of the sums of the own rows, and of those of the other side's.
struct StayingElements {
  uint64_t own, other;
};

// Those that the positives of either side name in a warp's part of a tile, at (row0, column0). In the square
// case either side has limits and positives of its own.
template <int kNTiles, typename Problem>
__device__ __forceinline__ StayingElements staying_elements(const Problem& problem, int64_t row0,
                                                            int64_t column0) {
  const auto& own = problem.own;
  const auto& other = problem.other;
  StayingElements stay = {};
  const auto mark = [](uint64_t& bits, int row, int column) __attribute__((always_inline)) {
    if (holds_element(row, column))
      bits |= uint64_t{1} << element_bit<kNTiles>(row / 8, column / 8, column % 2);
  };
  if (own.positives) {
    for_each_positive(own, row0, kWarpRows, other, column0, kNTiles * 8, problem.P,
                      [&](int row, int column, int64_t)
                          __attribute__((always_inline)) { mark(stay.own, row, column); });
  }
  if (other.positives) {
    for_each_positive(other, column0, kNTiles * 8, own, row0, kWarpRows, problem.P,
                      [&](int column, int row, int64_t)
                          __attribute__((always_inline)) { mark(stay.other, row, column); });
  }
  if (!problem.square) stay.own = stay.other = stay.own | stay.other;
  return stay;
}

// Whether the limits leave element c[i / 2][n][i % 2 * 2 + e] = s out. NaN is above none.
template <int kNTiles, typename acc_t>
__device__ __forceinline__ bool exceeds(acc_t s, acc_t row_limit, acc_t column_limit, uint64_t stay, int i,
                                        int n, int e) {
  return s > Math<acc_t>::max(row_limit, column_limit) && !(stay >> element_bit<kNTiles>(i, n, e) & 1);
}

// s + bias of what is not left out.
template <typename acc_t>
__device__ __forceinline__ acc_t with_bias(acc_t s, acc_t bias) {
  return s == -Math<acc_t>::infinity() ? s : s + bias;
}

// Base-2 factor of the values that the sums take in: v, or with additions base-2 logits.
template <bool kAdded, typename acc_t>
__device__ __forceinline__ acc_t sum_base2_scale(acc_t scale) {
  return kAdded ? acc_t(1) : OnlineSoftmax<acc_t>::base2_scale(Math<acc_t>::abs(scale));
}

// v to base-2 logits.
template <int kNTiles, typename acc_t>
__device__ __forceinline__ void scale_tile(Fragment<acc_t, kNTiles>& c, acc_t a) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[m][n][e] = Math<acc_t>::mul(c[m][n][e], a);
    }
  }
}

// Sets the logits of a warp's part of a tile that are above their limit to -inf, for the sums of the own
// rows.
template <int kNTiles, typename acc_t, typename Problem>
__device__ __forceinline__ void exclude_above(Fragment<acc_t, kNTiles>& c, const Problem& problem,
                                              int64_t row0, int64_t column0,
                                              const RowAdditions<acc_t> (&rows)[4]) {
  const acc_t infinity = Math<acc_t>::infinity();
  if (!problem.own_additions.own_limit) return;
  const StayingElements stay = staying_elements<kNTiles>(problem, row0, column0);
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
    const Pair<acc_t> limit = column_additions(problem.other_additions.other_limit, column0, n, infinity);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        acc_t& s = c[i / 2][n][i % 2 * 2 + e];
        if (exceeds<kNTiles>(s, rows[i].own_limit, limit.value[e], stay.own, i, n, e)) s = -infinity;
      }
    }
  }
}

// Adds the biases of columns to the logits of a warp's part of a tile, at column0.
template <int kNTiles, typename acc_t>
__device__ __forceinline__ void add_column_bias(Fragment<acc_t, kNTiles>& c, const acc_t* bias,
                                                int64_t column0) {
  if (!bias) return;
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
    const Pair<acc_t> pair = column_additions(bias, column0, n, acc_t(0));
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        acc_t& s = c[i / 2][n][i % 2 * 2 + e];
        s = with_bias(s, pair.value[e]);
      }
    }
  }
}

// c with the biases of its rows.
template <int kNTiles, typename acc_t>
__device__ __forceinline__ void copy_with_row_bias(const Fragment<acc_t, kNTiles>& c,
                                                   const RowAdditions<acc_t> (&rows)[4],
                                                   Fragment<acc_t, kNTiles>& result) {
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        result[i / 2][n][i % 2 * 2 + e] = with_bias(c[i / 2][n][i % 2 * 2 + e], rows[i].bias);
      }
    }
  }
}

}  // namespace contrastive
}  // namespace ssl_kernels
