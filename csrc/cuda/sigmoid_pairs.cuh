// Device code of `sigmoid_pairs` on the tile walk of tile_walk.cuh. One side owns the rows of the tiles, the
// other side is walked:
//
//   z_ij = scale <x^_i, y^_j> + bias      u_ij = -z_ij for the positive pairs j = i + diagonal, else z_ij
//   loss_ij = softplus(u_ij) = max(u_ij, 0) + log1p(e),  e = exp(-|u_ij|)
//   A_ij = g (+-) 1 / (1 + exp(-u_ij)), minus for the positive pairs, g that of the row of the loss
//
// One exponential and one reciprocal serve both; softplus and sigma of the positive pairs are taken at -z.
// Pairs of equal ids are the positive ones in place of the diagonal, or those off the diagonal are left out
// of both.
#pragma once

#include <cstdint>

#include "coefficient_blocks.cuh"
#include "rows.cuh"
#include "tile_walk.cuh"

namespace ssl_kernels {
namespace sigmoid_pairs {

// What the kernels of a WithIds engine know besides.
struct Ids {
  const int64_t* own_ids;
  const int64_t* other_ids;
  bool equal_are_positive;
};

struct NoIds {};

// The same products, in kernels that look at ids.
template <typename Engine>
struct WithIds : Engine {};

template <typename Engine>
constexpr bool kHasIds = false;
template <typename Engine>
constexpr bool kHasIds<WithIds<Engine>> = true;

template <typename scalar_t, typename acc_t, typename ids_t>
struct Problem : ids_t {
  Operand<scalar_t, acc_t> own;
  Operand<scalar_t, acc_t> other;
  int64_t width;  // D padded to 16 bytes
  const acc_t* scale;
  const acc_t* bias;
  int64_t diagonal;           // own row i and other row i + diagonal are a positive pair
  const acc_t* own_weight;    // g of the own rows, or null
  const acc_t* other_weight;  // g of the other rows, or null; 1 where both are
};

template <typename Engine>
using ProblemOf = Problem<typename Engine::scalar_t, typename Engine::acc_t,
                          std::conditional_t<kHasIds<Engine>, Ids, NoIds>>;

// What a walk brings with its columns' tiles.
template <typename Walk, typename Problem>
__device__ __forceinline__ typename Walk::Terms column_terms(const Problem& problem) {
  typename Walk::Terms terms = {};
  terms.of_columns[0] = problem.other.rnorm;
  if constexpr (Walk::kColumnTerms > 1) terms.of_columns[1] = problem.other_weight;
  if constexpr (Walk::kColumnLabels) terms.labels = problem.other_ids;
  return terms;
}

// The elements of this lane, in a warp's part of the walk's tile, whose row and column have equal ids: their
// element_bit. Those outside the matrix may be among them. One row at a time, for the backward has few
// registers left.
template <typename Shape, typename Engine>
__device__ __forceinline__ auto equal_ids(const ProblemOf<Engine>& problem,
                                          const TileWalk<Shape, Engine>& walk) {
  constexpr int kNTiles = Shape::kNTiles;
  using Bits = std::conditional_t<kNTiles * 8 <= 32, uint32_t, uint64_t>;
  const int lane = threadIdx.x % kWarpSize;
  const auto id = [](const int64_t* ids, int64_t index, int64_t count) {
    return index < count ? ids[index] : 0;
  };
  Bits equal = 0;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int64_t row = walk.row0() + walk.warp_row() + fragment_row(lane, i / 2, i % 2 * 2);
    const int64_t row_id = id(problem.own_ids, row, problem.own.count);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      Pair<int64_t> column_id;
      if constexpr (Shape::kColumnLabels) {
        column_id = walk.column_labels(n);
      } else {
        const int64_t column = walk.column0() + fragment_column(lane, n, 0);
        column_id = {{id(problem.other_ids, column, problem.other.count),
                      id(problem.other_ids, column + 1, problem.other.count)}};
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        equal |= Bits{row_id == column_id.value[e]} << element_bit<kNTiles>(i, n, e);
      }
    }
  }
  return equal;
}

// Calls f(z, row, column, positive) for the elements inside the matrix that are not left out, of a warp's
// part of the walk's tile of dot products; row and column count from there. The others become 0.
template <typename Shape, typename Engine, typename acc_t, typename F>
__device__ __forceinline__ void for_each_pair(Fragment<acc_t, Shape::kNTiles>& c,
                                              const ProblemOf<Engine>& problem,
                                              const TileWalk<Shape, Engine>& walk, acc_t scale, acc_t bias,
                                              F f) {
  constexpr bool kIds = kHasIds<Engine>;
  constexpr int kNTiles = Shape::kNTiles;
  const int64_t row0 = walk.row0() + walk.warp_row(), column0 = walk.column0();
  const int lane = threadIdx.x % kWarpSize;
  constexpr int kColumns = kNTiles * 8;
  const int rows = static_cast<int>(min(problem.own.count - row0, int64_t{kWarpRows}));
  const int columns = static_cast<int>(min(problem.other.count - column0, int64_t{kColumns}));
  const bool whole = rows == kWarpRows && columns == kColumns;
  // Of the positive column of row 0; kColumns stands for any that meets no element.
  const int64_t to_positive = row0 + problem.diagonal - column0;
  const int offset =
      to_positive > -kWarpRows && to_positive < kColumns ? static_cast<int>(to_positive) : kColumns;
  const auto equal = [&] {
    if constexpr (kIds)
      return equal_ids(problem, walk);
    else
      return 0;
  }();
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = fragment_row(lane, m, e), column = fragment_column(lane, n, e);
        bool positive = column - row == offset, inside = whole || (row < rows && column < columns);
        if constexpr (kIds) {
          const bool same = equal >> element_bit<kNTiles>(m * 2 + e / 2, n, e % 2) & 1;
          inside = inside && (problem.equal_are_positive || positive || !same);
          if (problem.equal_are_positive) positive = same;
        }
        if (inside) {
          c[m][n][e] = f(Math<acc_t>::fma(c[m][n][e], scale, bias), m * 2 + e / 2, n, e % 2, positive);
        } else {
          c[m][n][e] = acc_t(0);
        }
      }
    }
  }
}

// softplus(u) and sigma(u).
template <typename acc_t>
struct Softplus {
  acc_t decay;  // exp(-|u|)
  acc_t u;
  __device__ __forceinline__ explicit Softplus(acc_t u_)
      : decay(Math<acc_t>::exp2(-Math<acc_t>::abs(u_) * Math<acc_t>::kLog2e)), u(u_) {}
  __device__ __forceinline__ acc_t value() const {
    return Math<acc_t>::max(u, acc_t(0)) + Math<acc_t>::log1p_unit(decay);
  }
  __device__ __forceinline__ acc_t derivative() const {
    return (u >= acc_t(0) ? acc_t(1) : decay) * Math<acc_t>::reciprocal(acc_t(1) + decay);
  }
};

// --------------------------------------------------------------------------------------------------- forward
//
//   loss_i = sum_j softplus(u_ij)
//
// Tiling: ReduceShape; every thread sums its share of 4 rows, a tile in acc_t and the tiles in double, and
//   the lanes of a row meet once at the end. B = ceil(N / 128) blocks, T = ceil(M / kBlockN) tiles, S =
//   ceil(D / 128 bytes) steps.
// Products: 1 unit of 2 N M D flops, 256 B T S mma, each 16 x 8 by 32 bytes of depth.
// Traffic, 32-byte sectors of global memory: operands 4 N S (times T beyond the first 2 steps, which
//   registers hold on tensor cores, where K < S - 2) + 4 B M S, column norms B T kBlockN / 8, row norms and
//   scalars 24 B; with ids B T (32 + kBlockN / 4). Writes N doubles a part.
// Shared memory: K * 16 KB of own rows + 3 * kBlockN * (128 bytes + acc_t, with ids 8 more). No bank
//   conflicts.
// Occupancy: 2 blocks of 128 threads per multiprocessor, at most 255 registers, on sm_80, sm_90 and sm_100.
template <typename Engine>
using FwdShape = ReduceShape<Engine, 2, 1, kHasIds<Engine>>;

template <typename Engine>
__global__ void __launch_bounds__(FwdShape<Engine>::kThreads, FwdShape<Engine>::kBlocksPerSm)
    sigmoid_pairs_fwd_kernel(const ProblemOf<Engine> problem, double* partial) {
  using Shape = FwdShape<Engine>;
  using acc_t = typename Engine::acc_t;
  constexpr int kNTiles = Shape::kNTiles;
  const auto& own = problem.own;
  const int lane = threadIdx.x % kWarpSize;
  extern __shared__ __align__(128) unsigned char shared[];
  using Walk = TileWalk<Shape, Engine>;
  Walk walk(shared, own, problem.other, column_terms<Walk>(problem), problem.width);
  const int64_t warp_row0 = walk.row0() + walk.warp_row();

  const acc_t scale = *problem.scale, bias = *problem.bias;
  acc_t row_factor[4];
  double sum[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = warp_row0 + fragment_row(lane, i / 2, i % 2 * 2);
    row_factor[i] = own.rnorm && row < own.count ? own.rnorm[row] : acc_t(1);
  }
  for (walk.start(); walk.next();) {
    Fragment<acc_t, kNTiles> c;
    walk.products(c);
    walk.normalize(c, row_factor);
    acc_t tile_sum[4] = {};
    for_each_pair(c, problem, walk, scale, bias,
                  [&](acc_t z, int i, int, int, bool positive) __attribute__((always_inline)) {
                    tile_sum[i] += Softplus<acc_t>(positive ? -z : z).value();
                    return acc_t(0);
                  });
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += tile_sum[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], offset);
    const int64_t row = warp_row0 + fragment_row(lane, i / 2, i % 2 * 2);
    if (lane % 4 == 0 && row < own.count) partial[blockIdx.y * own.count + row] = sum[i];
  }
}

// ------------------------------------------------------------------------------------------------ gradients
//
//   G_i = sum_j A_ij rnorm_j y_j     dx^_i = scale G_i     dscale = sum_i <x^_i, G_i>     dbias = sum_ij A_ij
//
// and the sum of all losses where it is asked for: there is no normaliser to wait for, so the gradient of the
// total comes from the same visit of a tile. Once for the rows and once, with the roles exchanged, for the
// columns; the first of the two makes the sums as well.
//
// Narrow rows in one kernel; wide ones from stored coefficients, see CoefficientShape.
//
// Tiling: ProductShape. B = ceil(N / kBlockM) blocks, T = ceil(M / kBlockN) tiles, S = ceil(D / 128 bytes)
//   steps.
// Products: 2 units of 2 N M D flops a side, B T S kBlockM kBlockN / 16 mma.
// Traffic, 32-byte sectors of global memory: operands 4 N S (times T where K < S) + 8 B M S; row and column
//   terms, of which there are 2 with weights, B (kBlockM + T kBlockN) / 8 each; with ids B T (64 + kBlockN /
//   4). Writes N D acc_t a part.
// Shared memory: (K + kBlockN / chunk) * kBlockM * 128 bytes, 3 * kBlockN * 128 bytes, 2 * (kBlockM +
//   3 * kBlockN) acc_t of terms, 24 * kBlockN bytes of ids. Bank conflicts as in the backward of
//   `contrastive`.
// Occupancy: one block of 256 threads per multiprocessor, at most 255 registers.
// Numerics: A in acc_t, rounded once to scalar_t; half scales it by a power of two that brings its bound near
//   2^15. Losses and dbias are summed over a tile in acc_t, over tiles in double.
template <typename Engine, int kWarpsM, int kSliceChunks>
struct BwdShape : ProductShape<Engine, kWarpsM, kSliceChunks, 2, 2, kHasIds<Engine>> {
  static constexpr bool kScaled = std::is_same_v<typename Engine::scalar_t, __half>;
};

enum ColumnTerm { kRnorm, kWeight };

// A lane's sums over a tile, of losses where they are wanted and of the coefficients.
template <typename acc_t>
struct TileSums {
  acc_t loss, bias;
};

// A in the place of the products of the walk's tile; row_rnorm and row_weight by fragment_row.
template <typename Shape, typename Engine, typename acc_t>
__device__ __forceinline__ TileSums<acc_t> make_coefficients(typename TileWalk<Shape, Engine>::Tile& c,
                                                             const TileWalk<Shape, Engine>& walk,
                                                             const ProblemOf<Engine>& problem,
                                                             const acc_t (&row_rnorm)[4],
                                                             const acc_t (&row_weight)[4], acc_t scale,
                                                             acc_t bias, bool with_losses) {
  walk.normalize(c, row_rnorm);
  TileSums<acc_t> sums = {};
  for_each_pair(c, problem, walk, scale, bias,
                [&](acc_t z, int i, int n, int e, bool positive) __attribute__((always_inline)) {
                  const Softplus<acc_t> softplus(positive ? -z : z);
                  if (with_losses) sums.loss += softplus.value();
                  acc_t coefficient = softplus.derivative() * row_weight[i];
                  if (problem.other_weight) coefficient *= walk.column_pair(kWeight, n).value[e];
                  if (positive) coefficient = -coefficient;
                  sums.bias += coefficient;
                  return coefficient;
                });
  return sums;
}

// Leaves a warp's sums in `losses` and `biases`, unless null.
template <typename Shape>
__device__ __forceinline__ void store_sums(double loss, double bias, double* losses, double* biases) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t slot =
      (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * Shape::kWarps + threadIdx.x / kWarpSize;
  if (losses) {
    loss = warp_sum(loss);
    if (lane == 0) losses[slot] = loss;
  }
  if (biases) {
    bias = warp_sum(bias);
    if (lane == 0) biases[slot] = bias;
  }
}

// `losses` and `biases`: (blocks, parts, warps) sums of a warp each, or null: not needed.
template <typename Shape, typename Engine>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    sigmoid_pairs_bwd_kernel(const ProblemOf<Engine> problem, const typename Engine::acc_t* coefficient_scale,
                             double* losses, double* biases, typename Engine::acc_t* partial) {
  using acc_t = typename Engine::acc_t;
  constexpr int kBlockM = Shape::kBlockM;
  const auto& own = problem.own;
  const int lane = threadIdx.x % kWarpSize;
  extern __shared__ __align__(128) unsigned char shared[];
  using Walk = TileWalk<Shape, Engine>;
  Walk walk(shared, own, problem.other, column_terms<Walk>(problem), problem.width);

  acc_t* row_rnorm = walk.row_terms();
  acc_t* row_weights = row_rnorm + kBlockM;
  for (int r = threadIdx.x; r < kBlockM; r += Shape::kThreads) {
    const int64_t i = walk.row0() + r;
    const bool valid = i < own.count;
    row_rnorm[r] = valid && own.rnorm ? own.rnorm[i] : acc_t(1);
    row_weights[r] = valid && problem.own_weight ? problem.own_weight[i] : acc_t(1);
  }

  const acc_t scale = *problem.scale, bias = *problem.bias;
  const acc_t c_scale = Shape::kScaled ? *coefficient_scale : acc_t(1);
  double loss = 0.0, bias_sum = 0.0;
  Fragment<acc_t, Shape::kGTiles> g[Shape::kSliceChunks];
#pragma unroll
  for (int slice = 0; slice < Shape::kSliceChunks; ++slice) clear<acc_t, Shape::kGTiles>(g[slice]);

  for (walk.start(); walk.next();) {
    typename TileWalk<Shape, Engine>::Tile c;
    walk.products(c);
    acc_t row_factor[4], row_weight[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = walk.warp_row() + fragment_row(lane, i / 2, i % 2 * 2);
      row_factor[i] = row_rnorm[r];
      row_weight[i] = row_weights[r];
    }
    const TileSums<acc_t> sums =
        make_coefficients(c, walk, problem, row_factor, row_weight, scale, bias, losses != nullptr);
    loss += sums.loss;
    bias_sum += sums.bias;
    walk.store_coefficients(c, [&](int n) __attribute__((always_inline)) {
      return coefficient_factor<Shape::kScaled>(walk.column_rnorm(n), c_scale);
    });
    walk.accumulate(g);
  }
  walk.store(g, partial);

  store_sums<Shape>(loss, bias_sum, losses, biases);
}

// Wide rows: block by block (block_gradients), this kernel writes A, and a library makes G of A.
//
// Tiling: MatrixShape. The row terms are read for every tile, after the products, which need the registers. R
//   rows and M columns in the block, B = ceil(R / 128) blocks, T = ceil(M / kBlockN) tiles, S = ceil(D / 128
//   bytes) > 1 steps.
// Products: 1 unit of 2 R M D flops, 4 B T S kBlockN mma.
// Traffic, 32-byte sectors of global memory: operands 4 R S (times T where K < S) + 4 B M S; column terms B T
//   kBlockN / 8 each, row terms 32 B T each (double: twice these), of which there are 2 with weights; ids 64
//   B T of rows, 8 B T kBlockN of columns. Writes 128 B T kBlockN scalar_t in whole sectors.
// Shared memory: 16 KB of own rows K times, 3 * kBlockN * 128 bytes of the other side, terms of two tiles: 98
//   KB; for double, terms of three: 75 KB. No bank conflicts.
// Occupancy: one block of 256 threads per multiprocessor, at most 255 registers: with 128, for two blocks, 8
//   bytes would be spilled on sm_90, 16 with the sums of losses in shared memory. One block leaves room for
//   own rows of 11 steps (sm_80: 7), two would for 3.
template <typename Engine>
struct CoefficientShape : MatrixShape<Engine, 2> {
  static constexpr int kBlocksPerSm = 1;
};

// Of a CoefficientBlock; `losses` and `biases` as of sigmoid_pairs_bwd_kernel.
template <typename Engine>
__global__ void __launch_bounds__(CoefficientShape<Engine>::kThreads, CoefficientShape<Engine>::kBlocksPerSm)
    sigmoid_pairs_coefficients_kernel(const ProblemOf<Engine> problem,
                                      const typename Engine::acc_t* coefficient_scale, int64_t first_row,
                                      int64_t first_column, int64_t columns, bool with_norms,
                                      typename Engine::scalar_t* block, int64_t stride, double* losses,
                                      double* biases) {
  using Shape = CoefficientShape<Engine>;
  using acc_t = typename Engine::acc_t;
  const auto& own = problem.own;
  const int lane = threadIdx.x % kWarpSize;
  extern __shared__ __align__(128) unsigned char shared[];
  using Walk = TileWalk<Shape, Engine>;
  Walk walk(shared, own, problem.other, column_terms<Walk>(problem), problem.width,
            first_row + static_cast<int64_t>(blockIdx.x) * Shape::kBlockM,
            block_tiles<Shape>(first_column, columns));
  const acc_t scale = *problem.scale, bias = *problem.bias;
  const acc_t c_scale = kScalesCoefficients<Engine> ? *coefficient_scale : acc_t(1);
  double loss = 0.0, bias_sum = 0.0;

  for (walk.start(); walk.next();) {
    typename TileWalk<Shape, Engine>::Tile c;
    walk.products(c);
    acc_t row_rnorm[4], row_weight[4];  // from cache: the products need the registers
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = walk.row0() + walk.warp_row() + fragment_row(lane, i / 2, i % 2 * 2);
      const bool valid = row < own.count;
      row_rnorm[i] = valid && own.rnorm ? own.rnorm[row] : acc_t(1);
      row_weight[i] = valid && problem.own_weight ? problem.own_weight[row] : acc_t(1);
    }
    const TileSums<acc_t> sums =
        make_coefficients(c, walk, problem, row_rnorm, row_weight, scale, bias, losses != nullptr);
    loss += sums.loss;
    bias_sum += sums.bias;
    write_block(walk, c, c_scale, with_norms, block - first_row * stride - first_column, stride);
  }
  store_sums<Shape>(loss, bias_sum, losses, biases);
}

// The incoming gradient in the type of the tiles. One thread per row.
template <typename acc_t>
__global__ void sigmoid_pairs_weight_kernel(const double* grad_losses, int64_t count, acc_t* weight) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < count) weight[row] = static_cast<acc_t>(grad_losses[row]);
}

}  // namespace sigmoid_pairs
}  // namespace ssl_kernels
