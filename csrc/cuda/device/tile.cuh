// Operand tiles in shared memory and the two products over them.
//
// A tile is rows of 128 bytes (kTileUnits units of 16 bytes); unit u of row r lies at position u ^ (r % 8),
// so that eight rows read at one unit, or one row read along its units, touch all 32 banks once.
//
// A warp owns 32 rows of the result and 8 * kNTiles columns, held as accumulators c[m][n][4] in the layout of
// the 16 x 8 fragment of matrix.cuh, m = 0, 1 and n = 0 .. kNTiles - 1; the FMA engine uses the same layout.
#pragma once

#include "async_copy.cuh"
#include "math.cuh"
#include "matrix.cuh"
#include "vector_access.cuh"
#include "warp.cuh"

namespace ssl_kernels {

constexpr int kTileRowBytes = 128;
constexpr int kTileUnits = kTileRowBytes / 16;
constexpr int kWarpRows = 32;

__device__ __forceinline__ uint32_t tile_offset(int row, int unit) {
  return row * kTileRowBytes + ((unit ^ (row & 7)) << 4);
}

template <typename acc_t, int kNTiles>
using Fragment = acc_t[2][kNTiles][4];

// Row and column of element c[m][n][e] in the warp's part of the result.
__device__ __forceinline__ int fragment_row(int lane, int m, int e) {
  return m * 16 + (e / 2) * 8 + lane / 4;
}
__device__ __forceinline__ int fragment_column(int lane, int n, int e) {
  return n * 8 + (lane % 4) * 2 + e % 2;
}

// How kThreads threads share out a tile of kRows rows: each has one unit of every kRowsAtOnce-th row, at the
// same position of all of them.
template <int kRows, int kThreads>
struct TileShare {
  static constexpr int kRowsAtOnce = kThreads / kTileUnits;
  static constexpr int kUnits = kRows / kRowsAtOnce;
  static_assert(kRows % kRowsAtOnce == 0, "every thread has the same number of units");
  static_assert(kRowsAtOnce % 8 == 0, "a thread's units lie at one position of their rows");

  static __device__ __forceinline__ int unit() { return threadIdx.x % kTileUnits; }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / kTileUnits; }
  // Of the thread's first unit in the tile; the others follow kBytes apart.
  static __device__ __forceinline__ uint32_t offset() { return tile_offset(first_row(), unit()); }
  static constexpr int kBytes = kRowsAtOnce * kTileRowBytes;
  // Unit i of the thread lies inside the matrix where i * kRowsAtOnce is less than this.
  static __device__ __forceinline__ int rows_inside(int64_t rows, int64_t row0, bool column_inside) {
    return column_inside ? static_cast<int>(min(rows - row0, int64_t{kRows})) - first_row() : 0;
  }
};

// Starts copying rows [row0, row0 + kRows) and columns [column0, column0 + 128 bytes) of a matrix of (rows,
// columns) with unit column stride; 0 outside. Rows are 16-byte aligned and columns a multiple of 16 bytes.
// kThreads threads share the work, and have addresses of kAtOnce copies at a time.
template <int kRows, int kThreads, int kAtOnce, typename scalar_t>
__device__ __forceinline__ void load_tile(unsigned char* tile, const scalar_t* matrix, int64_t row_stride,
                                          int64_t rows, int64_t columns, int64_t row0, int64_t column0) {
  using Share = TileShare<kRows, kThreads>;
  const int64_t column = column0 + Share::unit() * static_cast<int>(16 / sizeof(scalar_t));
  const int inside = Share::rows_inside(rows, row0, column < columns);
  const scalar_t* source = matrix + (row0 + Share::first_row()) * row_stride + column;
  const int64_t step = Share::kRowsAtOnce * row_stride;
  tile += Share::offset();
#pragma unroll kAtOnce
  for (int i = 0; i < Share::kUnits; ++i, source += step) {  // outside the matrix nothing is read
    copy_async<16>(tile + i * Share::kBytes, source, i * Share::kRowsAtOnce < inside);
  }
}

// The same from a matrix in a narrower type, as 128 bytes of float: through registers, since asynchronous
// copies move bits as they are. Rows are 8-byte aligned and columns a multiple of 4. Between load() and
// store() other work hides the way from memory; the next barrier publishes the tile.
template <int kRows, int kThreads, typename narrow_t>
struct WidenedTile {
  using Share = TileShare<kRows, kThreads>;
  using Bits = BitsOf<8>::type;
  static constexpr int kVector = 16 / sizeof(float);
  Bits held[Share::kUnits];

  __device__ __forceinline__ void load(const narrow_t* matrix, int64_t row_stride, int64_t rows,
                                       int64_t columns, int64_t row0, int64_t column0) {
    const int64_t column = column0 + Share::unit() * kVector;
    const int inside = Share::rows_inside(rows, row0, column < columns);
    const narrow_t* source = matrix + (row0 + Share::first_row()) * row_stride + column;
    const int64_t step = Share::kRowsAtOnce * row_stride;
#pragma unroll
    for (int i = 0; i < Share::kUnits; ++i, source += step) {
      held[i] = {};
      if (i * Share::kRowsAtOnce < inside) held[i] = *reinterpret_cast<const Bits*>(source);
    }
  }

  __device__ __forceinline__ void store(unsigned char* tile) const {
    tile += Share::offset();
#pragma unroll
    for (int i = 0; i < Share::kUnits; ++i) {
      const auto narrow = *reinterpret_cast<const Chunk<narrow_t, kVector>*>(&held[i]);
      Vector<float> wide;
#pragma unroll
      for (int e = 0; e < kVector; ++e) wide.value[e] = to_acc(narrow.value[e]);
      *reinterpret_cast<Vector<float>*>(tile + i * Share::kBytes) = wide;
    }
  }
};

// An engine's types: scalar_t is what products are of, other_t what the walked side is stored in.
//
// Tensor cores: bfloat16 and half through m16n8k16, float as TF32 through m16n8k8. Either way one step of
// depth is 32 bytes of a row, so the operand addresses are the same.
template <typename scalar>
struct MmaEngine {
  using scalar_t = scalar;
  using other_t = scalar;
  using acc_t = float;
  static constexpr bool kTf32 = sizeof(scalar_t) == 4;
  static constexpr bool kHoldsOwn = true;

  template <int kCount>
  static __device__ __forceinline__ void round_operands(uint32_t (&r)[kCount]) {
    if constexpr (kTf32) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) r[i] = round_to_tf32(r[i]);
    }
  }

  // The warp's part of a first operand over one tile's 128 bytes of depth, in 32 registers.
  struct OwnStep {
    uint32_t fragment[kTileUnits / 2][2][4];
  };

  static __device__ __forceinline__ void load_own(uint32_t (&fragment)[2][4], uint32_t a_base, int a_row,
                                                  int unit) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      load_matrices(fragment[m], a_base + tile_offset(a_row + m * 16 + lane % 16, unit + lane / 16));
      round_operands(fragment[m]);
    }
  }

  static __device__ __forceinline__ void load_own(OwnStep& step, const unsigned char* a, int a_row) {
#pragma unroll
    for (int unit = 0; unit < kTileUnits; unit += 2) {
      load_own(step.fragment[unit / 2], shared_address(a), a_row, unit);
    }
  }

  // c += A B^T over 32 bytes of depth.
  template <int kNTiles>
  static __device__ __forceinline__ void product_nt(Fragment<acc_t, kNTiles>& c,
                                                    const uint32_t (&a_fragment)[2][4], uint32_t b_base,
                                                    int b_row, int unit) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int n = 0; n < kNTiles; n += 2) {
      uint32_t b_fragment[4];
      const int row = b_row + n * 8 + (lane / 16) * 8 + lane % 8;
      load_matrices(b_fragment, b_base + tile_offset(row, unit + lane / 8 % 2));
      round_operands(b_fragment);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma(c[m][n], a_fragment[m], b_fragment[0], b_fragment[1], scalar_t());
        mma(c[m][n + 1], a_fragment[m], b_fragment[2], b_fragment[3], scalar_t());
      }
    }
  }

  // c += A B^T over one tile's 128 bytes of depth; `a` and `b` are the tiles' shared addresses, a_row and
  // b_row the first row of the warp's part in each.
  template <int kNTiles>
  static __device__ __forceinline__ void product_nt(Fragment<acc_t, kNTiles>& c, const unsigned char* a,
                                                    int a_row, const unsigned char* b, int b_row) {
#pragma unroll
    for (int unit = 0; unit < kTileUnits; unit += 2) {
      uint32_t a_fragment[2][4];
      load_own(a_fragment, shared_address(a), a_row, unit);
      product_nt<kNTiles>(c, a_fragment, shared_address(b), b_row, unit);
    }
  }

  // The same with A in registers.
  template <int kNTiles>
  static __device__ __forceinline__ void product_nt(Fragment<acc_t, kNTiles>& c, const OwnStep& a,
                                                    const unsigned char* b, int b_row) {
#pragma unroll
    for (int unit = 0; unit < kTileUnits; unit += 2) {
      product_nt<kNTiles>(c, a.fragment[unit / 2], shared_address(b), b_row, unit);
    }
  }

  // c += A B: depth runs along the columns of `a` (one tile, 128 bytes) and the rows of `b` from b_row;
  // b_column is the first column of the warp's part.
  template <int kNTiles>
  static __device__ __forceinline__ void product_nn(Fragment<acc_t, kNTiles>& c, const unsigned char* a,
                                                    int a_row, const unsigned char* b, int b_row,
                                                    int b_column) {
    const int lane = threadIdx.x % kWarpSize;
    const uint32_t a_base = shared_address(a), b_base = shared_address(b);
#pragma unroll
    for (int unit = 0; unit < kTileUnits; unit += 2) {
      uint32_t a_fragment[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrices(a_fragment[m], a_base + tile_offset(a_row + m * 16 + lane % 16, unit + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < kNTiles; n += 2) {
        uint32_t b_fragment[4];
        if constexpr (kTf32) {
          // ldmatrix transposes 2-byte elements only; lanes 4g + q and 4g + q + 1 share banks here.
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = b_row + unit * 4 + (i % 2) * 4 + lane % 4;
            const int column = b_column + (n + i / 2) * 8 + lane / 4;
            b_fragment[i] =
                *reinterpret_cast<const uint32_t*>(b + tile_offset(row, column / 4) + column % 4 * 4);
          }
          round_operands(b_fragment);
        } else {
          const int row = b_row + unit * 8 + lane % 16;
          load_matrices_transposed(b_fragment, b_base + tile_offset(row, b_column / 8 + n + lane / 16));
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma(c[m][n], a_fragment[m], b_fragment[0], b_fragment[1], scalar_t());
          mma(c[m][n + 1], a_fragment[m], b_fragment[2], b_fragment[3], scalar_t());
        }
      }
    }
  }

  // Two neighbouring values of a result as elements of the first operand of product_nn.
  static __device__ __forceinline__ Pair<scalar_t> to_operands(float x, float y) {
    Pair<scalar_t> pair;
    if constexpr (kTf32) {
      pair.value[0] = __uint_as_float(round_to_tf32(__float_as_uint(x)));
      pair.value[1] = __uint_as_float(round_to_tf32(__float_as_uint(y)));
    } else {
      pair.value[0] = from_acc<scalar_t>(x);
      pair.value[1] = from_acc<scalar_t>(y);
    }
    return pair;
  }
};

// Exact products in float or double by fused multiply-add, the same tiles and the same ownership.
template <typename scalar>
struct FmaEngine {
  using scalar_t = scalar;
  using other_t = scalar;
  using acc_t = scalar;
  static constexpr int kVector = 16 / sizeof(scalar_t);
  static constexpr bool kHoldsOwn = false;
  struct OwnStep {};

  static __device__ __forceinline__ Vector<scalar_t> load(const unsigned char* tile, int row, int unit) {
    return *reinterpret_cast<const Vector<scalar_t>*>(tile + tile_offset(row, unit));
  }

  template <int kNTiles>
  static __device__ __forceinline__ void product_nt(Fragment<acc_t, kNTiles>& c, const unsigned char* a,
                                                    int a_row, const unsigned char* b, int b_row) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int unit = 0; unit < kTileUnits; ++unit) {
      Vector<scalar_t> a_vector[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a_vector[i] = load(a, a_row + fragment_row(lane, i / 2, i % 2 * 2), unit);
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Vector<scalar_t> b_vector = load(b, b_row + fragment_column(lane, n, e), unit);
#pragma unroll
          for (int k = 0; k < kVector; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              acc_t& sum = c[i / 2][n][i % 2 * 2 + e];
              sum = Math<acc_t>::fma(a_vector[i].value[k], b_vector.value[k], sum);
            }
          }
        }
      }
    }
  }

  template <int kNTiles>
  static __device__ __forceinline__ void product_nn(Fragment<acc_t, kNTiles>& c, const unsigned char* a,
                                                    int a_row, const unsigned char* b, int b_row,
                                                    int b_column) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int unit = 0; unit < kTileUnits; ++unit) {
      Vector<scalar_t> a_vector[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a_vector[i] = load(a, a_row + fragment_row(lane, i / 2, i % 2 * 2), unit);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const int row = b_row + unit * kVector + k;
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          const int byte = (b_column + fragment_column(lane, n, 0)) * static_cast<int>(sizeof(scalar_t));
          const auto pair =
              *reinterpret_cast<const Pair<scalar_t>*>(b + tile_offset(row, byte / 16) + byte % 16);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              acc_t& sum = c[i / 2][n][i % 2 * 2 + e];
              sum = Math<acc_t>::fma(a_vector[i].value[k], pair.value[e], sum);
            }
          }
        }
      }
    }
  }

  static __device__ __forceinline__ Pair<scalar_t> to_operands(acc_t x, acc_t y) {
    return {{x, y}};
  }
};

// Float products against a walked side of half the width.
template <typename Engine, typename narrow_t>
struct WideningEngine : Engine {
  using other_t = narrow_t;
};

// Stores two neighbours of a tile.
template <typename scalar_t>
__device__ __forceinline__ void store_operands(unsigned char* tile, int row, int column,
                                               const Pair<scalar_t>& pair) {
  const int byte = column * static_cast<int>(sizeof(scalar_t));
  *reinterpret_cast<Pair<scalar_t>*>(tile + tile_offset(row, byte / 16) + byte % 16) = pair;
}

template <typename acc_t, int kNTiles>
__device__ __forceinline__ void clear(Fragment<acc_t, kNTiles>& c) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[m][n][e] = acc_t(0);
    }
  }
}

// A bit for each element c[i / 2][n][i % 2 * 2 + e] of a lane.
template <int kNTiles>
__device__ __forceinline__ constexpr int element_bit(int i, int n, int e) {
  static_assert(4 * kNTiles * 2 <= 64);
  return (i * kNTiles + n) * 2 + e;
}

// Whether this lane holds element (row, column) of the warp's part.
__device__ __forceinline__ bool holds_element(int row, int column) {
  return threadIdx.x % kWarpSize == row % 8 * 4 + column % 8 / 2;
}

// In the lane that holds it: the value of an element whose place is known at run time only, by selection,
// since an indexed fragment would leave the registers.
template <typename acc_t, int kNTiles>
__device__ __forceinline__ acc_t element(const Fragment<acc_t, kNTiles>& c, int row, int column) {
  acc_t value = acc_t(0);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const acc_t candidate = c[m][n][e];
        const int difference = (row / 8 ^ (m * 2 + e / 2)) | (column / 8 ^ n) | (column % 2 ^ e % 2);
        value = difference == 0 ? candidate : value;
      }
    }
  }
  return value;
}

// In the lane that holds it: adds to an element.
template <typename acc_t, int kNTiles>
__device__ __forceinline__ void add_to_element(Fragment<acc_t, kNTiles>& c, int row, int column, acc_t x) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool here = row / 8 == m * 2 + e / 2 && column / 8 == n && column % 2 == e % 2;
        c[m][n][e] += here ? x : acc_t(0);
      }
    }
  }
}

}  // namespace ssl_kernels
