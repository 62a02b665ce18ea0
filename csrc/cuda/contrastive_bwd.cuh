// The backward of `contrastive`: the gradient of the logits, seen from the owner of row i (w, L of either
// side; null terms are absent):
//
//   C_ij = allowed_ij (w_i 2^(a v_ij - L_i) + w_j 2^(a v_ij - L_j))
//          + sum_k [positives(i, k) = j] q_ik + sum_k [positives(j, k) = i] q_jk
//   G_i = sum_j C_ij rnorm_j y_j    dx^_i = scale G_i    dscale = sum_i <x^_i, G_i>, half of it when square
//
// One exponential does for both where the logits are bounded (has_bounded_logits): the bracket is
//
//   2^(a v_ij - L_i) (w_i + 2^(L_i - center) w_j 2^(center - L_j))
//
// with the last two factors a number of the column, and a center that keeps either power within float's range
// whatever the other is. At lower temperatures there are two.
//
// With additions (contrastive_additions.cuh) the two exponentials take s' and the bias of the column and of
// the row, each with the limits of its own sums, and the sum of the second term over j is the gradient of row
// i's bias.
//
// Square: both sides are the same, C = A + A^T. Rectangular: the rows' terms are those of lse, the columns'
// those of column_lse; for the columns' gradient the roles are exchanged.
//
// Narrow rows in one kernel; wide ones from stored coefficients, see CoefficientShape.
//
// Tiling: ProductShape; a tile is recomputed and its C multiplied. Below, B = ceil(N / kBlockM) blocks, T =
//   ceil(M / kBlockN) tiles, S = ceil(D / 128 bytes) steps.
// Products: 2 units of 2 N M D flops, B T S kBlockM kBlockN / 16 mma.
//   An exponential an entry, or 2 where both sides have sums and logits are not bounded.
// Traffic, 32-byte sectors of global memory: operands 4 N S (times T where K < S) + 8 B M S; 64 B T P for the
//   positives of a side and N P for their gradients; row and column terms 3 B (kBlockM + T kBlockN) / 8, of
//   columns 2 in the place of 3 with one exponential.
//   Writes N D acc_t a part.
// Shared memory: (K + kBlockN / chunk) * kBlockM * 128 bytes, 3 * kBlockN * 128 bytes, 4 * kBlockM +
//   9 * kBlockN acc_t of terms, 24 * kBlockN bytes of ids; at most 99 KB. No bank conflicts but two-way ones
//   in TF32's reads of y for C y and in 4-byte types' writes of C.
// Occupancy: one block of 256 threads per multiprocessor, at most 255 registers.
// Numerics: C in acc_t, rounded once to scalar_t. half scales C by a power of two that brings its bound
//   near 2^15.
#pragma once

#include "coefficient_blocks.cuh"
#include "contrastive_additions.cuh"

namespace ssl_kernels {
namespace contrastive {

template <typename Engine, int kWarpsM, int kSliceChunks>
using BwdShape = ProductShape<Engine, kWarpsM, kSliceChunks, 3, 4, true>;

// What the backward tiles need of a sum and its gradient, once per row (g = grad_lse, or null: 1):
//
//   L_i = lse_i log2(e) rounded to acc_t      w_i = g_i 2^(L_i - lse_i log2(e))      so g_i exp(s - lse_i) =
//   w_i 2^(a v - L_i)
//
// and w_i 2^(center - L_i), or nothing for null. A sum over nothing (lse = -inf) gets NaN, which meets only
// entries that are excluded.
template <typename acc_t>
__global__ void contrastive_terms_kernel(const double* lse, const double* grad_lse, int64_t count,
                                         acc_t* base2_lse, acc_t* weight, double center,
                                         acc_t* centered_weight) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= count) return;
  const double exact = lse[row] * Math<double>::kLog2e, gradient = grad_lse ? grad_lse[row] : 1.0;
  const acc_t rounded = static_cast<acc_t>(exact);
  base2_lse[row] = rounded;
  weight[row] = static_cast<acc_t>(gradient * Math<double>::exp2(rounded - exact));
  if (centered_weight) {
    centered_weight[row] = static_cast<acc_t>(gradient * Math<double>::exp2(center - exact));
  }
}

// With one exponential the centered weight is in the place of the lse, and kWeight absent.
enum ColumnTerm { kRnorm, kBase2Lse, kWeight, kCenteredWeight = kBase2Lse };

template <typename Problem, typename acc_t>
__device__ __forceinline__ bool takes_one_exponential(const Problem& problem, acc_t a) {
  return problem.own.centered_weight && problem.other.centered_weight && has_bounded_logits(problem, a);
}

template <typename Walk, typename Problem>
__device__ __forceinline__ typename Walk::Terms column_terms(const Problem& problem, bool one_exponential) {
  const auto& other = problem.other;
  return {{other.rnorm, one_exponential ? other.centered_weight : other.base2_lse,
           one_exponential ? nullptr : other.weight},
          other.ids};
}

// What the coefficients need of one row of the owner.
template <typename acc_t>
struct RowTerms {
  acc_t rnorm, base2_lse, weight;
  acc_t power;  // 2^(base2_lse - center), for one exponential
};

template <typename scalar_t, typename acc_t>
__device__ __forceinline__ RowTerms<acc_t> row_terms(const Side<scalar_t, acc_t>& own, int64_t i,
                                                     acc_t center) {
  const bool valid = i < own.count, has_sums = valid && own.base2_lse;
  const acc_t base2_lse = has_sums ? own.base2_lse[i] : Math<acc_t>::infinity();
  return {valid && own.rnorm ? own.rnorm[i] : acc_t(1), base2_lse, has_sums ? own.weight[i] : acc_t(0),
          has_sums ? Math<acc_t>::exp2(base2_lse - center) : acc_t(0)};
}

// The gradient of the own bias: the sums over the tiles of the other side's term of the coefficients, for a
// lane's rows. Nothing without additions.
template <typename Engine, bool kSums = kAdds<Engine>>
struct BiasSums {
  template <typename Shape>
  __device__ __forceinline__ void store(const TileWalk<Shape, Engine>&, const ProblemOf<Engine>&) const {}
};

template <typename Engine>
struct BiasSums<Engine, true> {
  using acc_t = typename Engine::acc_t;
  acc_t of_rows[4] = {};  // by fragment_row

  // Leaves them in part (blockIdx.y, the warp's place beside those that share its rows) of bias_partial,
  // (parts, rows).
  template <typename Shape>
  __device__ __forceinline__ void store(const TileWalk<Shape, Engine>& walk,
                                        const ProblemOf<Engine>& problem) {
    if (!problem.bias_partial) return;
    const int lane = threadIdx.x % kWarpSize, warp_n = threadIdx.x / kWarpSize % Shape::kWarpsN;
    const int64_t part = static_cast<int64_t>(blockIdx.y) * Shape::kWarpsN + warp_n;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2)
        of_rows[i] += __shfl_xor_sync(kAllLanes, of_rows[i], offset);
      const int64_t row =
          walk.row0() + walk.warp_row() + fragment_row(lane, i / 2, i % 2 * 2) - problem.bias_row;
      if (lane % 4 == 0 && row < problem.bias_rows)
        problem.bias_partial[part * problem.bias_rows + row] = of_rows[i];
    }
  }
};

// The softmax' part of C in the place of the products, with additions.
template <typename Shape, typename Engine>
__device__ __forceinline__ void make_added_coefficients(typename TileWalk<Shape, Engine>::Tile& c,
                                                        const TileWalk<Shape, Engine>& walk,
                                                        const ProblemOf<Engine>& problem,
                                                        const RowTerms<typename Engine::acc_t> (&rows)[4],
                                                        typename Engine::acc_t a,
                                                        BiasSums<Engine>& bias_sums) {
  using acc_t = typename Engine::acc_t;
  constexpr int kNTiles = Shape::kNTiles;
  const acc_t infinity = Math<acc_t>::infinity();
  const auto& of_columns = problem.other_additions;
  const int64_t warp_row0 = walk.row0() + walk.warp_row(), column0 = walk.column0();
  const acc_t row_factor[4] = {rows[0].rnorm, rows[1].rnorm, rows[2].rnorm, rows[3].rnorm};
  walk.normalize(c, row_factor);
  scale_tile<kNTiles>(c, a);
  StayingElements stay = {};
  if (of_columns.own_limit) stay = staying_elements<kNTiles>(problem, warp_row0, column0);
  exclude(c, problem, walk, -infinity);
  RowAdditions<acc_t> additions[4];
  read_row_additions(problem, warp_row0, additions);
  // w 2^(s - L), 0 for what is left out, whatever w and L are.
  const auto term = [&](acc_t s, acc_t bias, bool left_out, acc_t weight, acc_t base2_lse)
                        __attribute__((always_inline)) {
    s = left_out ? -infinity : with_bias(s, bias);
    return s == -infinity ? acc_t(0) : weight * Math<acc_t>::exp2(s - base2_lse);
  };
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
    acc_t coefficient[4][2] = {};
    if (problem.own.base2_lse) {
      const Pair<acc_t> bias = column_additions(of_columns.bias, column0, n, acc_t(0));
      const Pair<acc_t> limit = column_additions(of_columns.other_limit, column0, n, infinity);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const acc_t s = c[i / 2][n][i % 2 * 2 + e];
          const bool left_out =
              exceeds<kNTiles>(s, additions[i].own_limit, limit.value[e], stay.own, i, n, e);
          coefficient[i][e] = term(s, bias.value[e], left_out, rows[i].weight, rows[i].base2_lse);
        }
      }
    }
    if (problem.other.base2_lse) {
      const Pair<acc_t> limit = column_additions(of_columns.own_limit, column0, n, infinity);
      const Pair<acc_t> base2_lse = walk.column_pair(kBase2Lse, n), weight = walk.column_pair(kWeight, n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const acc_t s = c[i / 2][n][i % 2 * 2 + e];
          const bool left_out =
              exceeds<kNTiles>(s, additions[i].other_limit, limit.value[e], stay.other, i, n, e);
          const acc_t of_column = term(s, additions[i].bias, left_out, weight.value[e], base2_lse.value[e]);
          coefficient[i][e] += of_column;
          bias_sums.of_rows[i] += of_column;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) c[i / 2][n][i % 2 * 2 + e] = coefficient[i][e];
    }
  }
}

// Whether the rows of a warp's tile are taken 16 at a time, with the columns' terms read for each: of the 128
// registers of a coefficient kernel, half and TF32 leave too few for the terms of 32 rows.
template <typename Shape, typename Engine>
constexpr bool kTakesHalves = Shape::kBlocksPerSm == 2 &&
                              !std::is_same_v<typename Engine::scalar_t, __nv_bfloat16>;

// The same without additions, from one exponential an entry.
template <typename Shape, typename Engine>
__device__ __forceinline__ void make_coefficients_of_one_exponential(
    typename TileWalk<Shape, Engine>::Tile& c, const TileWalk<Shape, Engine>& walk,
    const RowTerms<typename Engine::acc_t> (&rows)[4], typename Engine::acc_t a) {
  using acc_t = typename Engine::acc_t;
  constexpr int kAtOnce = kTakesHalves<Shape, Engine> ? 1 : 2;
#pragma unroll
  for (int first = 0; first < 2; first += kAtOnce) {
#pragma unroll
    for (int n = 0; n < Shape::kNTiles; ++n) {
      const Pair<acc_t> column_factor = walk.column_rnorm(n), weight = walk.column_pair(kCenteredWeight, n);
#pragma unroll
      for (int m = first; m < first + kAtOnce; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const RowTerms<acc_t>& row = rows[m * 2 + e / 2];
          const acc_t v = c[m][n][e] * (row.rnorm * column_factor.value[e % 2]);
          c[m][n][e] = Math<acc_t>::exp2(Math<acc_t>::fma(v, a, -row.base2_lse)) *
                       Math<acc_t>::fma(weight.value[e % 2], row.power, row.weight);
        }
      }
    }
  }
}

// C in the place of the products of the walk's tile; a = scale log2(e), `rows` by fragment_row.
template <typename Shape, typename Engine>
__device__ __forceinline__ void make_coefficients(
    typename TileWalk<Shape, Engine>::Tile& c, const TileWalk<Shape, Engine>& walk,
    const ProblemOf<Engine>& problem, const RowTerms<typename Engine::acc_t> (&rows)[4],
    typename Engine::acc_t a, bool one_exponential, const double* grad_positive_logits,
    BiasSums<Engine>& bias_sums) {
  using acc_t = typename Engine::acc_t;
  constexpr int kNTiles = Shape::kNTiles;
  const auto& own = problem.own;
  const auto& other = problem.other;
  const int64_t warp_row0 = walk.row0() + walk.warp_row();
  if constexpr (kAdds<Engine>) {
    make_added_coefficients(c, walk, problem, rows, a, bias_sums);
  } else if (one_exponential) {
    make_coefficients_of_one_exponential(c, walk, rows, a);
    exclude(c, problem, walk, acc_t(0));
  } else {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const Pair<acc_t> column_factor = walk.column_rnorm(n);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          c[m][n][e] *= rows[m * 2 + e / 2].rnorm * column_factor.value[e % 2];
        }
      }
      acc_t coefficient[2][4] = {};
      if (own.base2_lse) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const RowTerms<acc_t>& row = rows[m * 2 + e / 2];
            coefficient[m][e] =
                row.weight * Math<acc_t>::exp2(Math<acc_t>::fma(c[m][n][e], a, -row.base2_lse));
          }
        }
      }
      if (other.base2_lse) {
        const Pair<acc_t> base2_lse = walk.column_pair(kBase2Lse, n), weight = walk.column_pair(kWeight, n);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            coefficient[m][e] += weight.value[e % 2] *
                                 Math<acc_t>::exp2(Math<acc_t>::fma(c[m][n][e], a, -base2_lse.value[e % 2]));
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[m][n][e] = coefficient[m][e];
      }
    }
    exclude(c, problem, walk, acc_t(0));
  }
  if (grad_positive_logits && own.positives) {
    for_each_positive(own, warp_row0, kWarpRows, other, walk.column0(), Shape::kWarpColumns, problem.P,
                      [&](int row, int column, int64_t k) __attribute__((always_inline)) {
                        const acc_t q =
                            static_cast<acc_t>(grad_positive_logits[(warp_row0 + row) * problem.P + k]);
                        if (holds_element(row, column)) add_to_element<acc_t, kNTiles>(c, row, column, q);
                      });
  }
  if (grad_positive_logits && other.positives) {
    for_each_positive(other, walk.column0(), Shape::kWarpColumns, own, warp_row0, kWarpRows, problem.P,
                      [&](int column, int row, int64_t k) __attribute__((always_inline)) {
                        const acc_t q = static_cast<acc_t>(
                            grad_positive_logits[(walk.column0() + column) * problem.P + k]);
                        if (holds_element(row, column)) add_to_element<acc_t, kNTiles>(c, row, column, q);
                      });
  }
}

template <typename Shape, typename Engine>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    contrastive_bwd_kernel(const ProblemOf<Engine> problem,
                           const double* grad_positive_logits,
                           const typename Engine::acc_t* coefficient_scale, typename Engine::acc_t* partial) {
  using acc_t = typename Engine::acc_t;
  constexpr int kBlockM = Shape::kBlockM;

  const auto& own = problem.own;
  const auto& other = problem.other;
  const int lane = threadIdx.x % kWarpSize;
  extern __shared__ __align__(128) unsigned char shared[];
  const acc_t a = *problem.scale * Math<acc_t>::kLog2e;
  const bool one_exponential = !kAdds<Engine> && takes_one_exponential(problem, a);
  using Walk = TileWalk<Shape, Engine>;
  Walk walk(shared, own, other, column_terms<Walk>(problem, one_exponential), problem.width);

  acc_t* row_rnorm = walk.row_terms();
  acc_t* row_base2_lse = row_rnorm + kBlockM;
  acc_t* row_weights = row_base2_lse + kBlockM;
  acc_t* row_powers = row_weights + kBlockM;
  for (int r = threadIdx.x; r < kBlockM; r += Shape::kThreads) {
    const RowTerms<acc_t> terms = row_terms(own, walk.row0() + r, problem.center);
    row_rnorm[r] = terms.rnorm;
    row_base2_lse[r] = terms.base2_lse;
    row_weights[r] = terms.weight;
    if (one_exponential) row_powers[r] = terms.power;
  }

  const acc_t c_scale = kScalesCoefficients<Engine> ? *coefficient_scale : acc_t(1);
  Fragment<acc_t, Shape::kGTiles> g[Shape::kSliceChunks];
#pragma unroll
  for (int slice = 0; slice < Shape::kSliceChunks; ++slice) clear<acc_t, Shape::kGTiles>(g[slice]);
  BiasSums<Engine> bias_sums;

  for (walk.start(); walk.next();) {
    typename TileWalk<Shape, Engine>::Tile c;
    walk.products(c);
    RowTerms<acc_t> rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = walk.warp_row() + fragment_row(lane, i / 2, i % 2 * 2);
      rows[i] = {row_rnorm[r], row_base2_lse[r], row_weights[r],
                 one_exponential ? row_powers[r] : acc_t(0)};
    }
    make_coefficients(c, walk, problem, rows, a, one_exponential, grad_positive_logits, bias_sums);
    walk.store_coefficients(c, [&](int n) __attribute__((always_inline)) {
      return coefficient_factor<kScalesCoefficients<Engine>>(walk.column_rnorm(n), c_scale);
    });
    walk.accumulate(g);
  }
  walk.store(g, partial);
  bias_sums.store(walk, problem);
}

// Wide rows: block by block (block_gradients), this kernel writes C, and a library makes G of C.
//
// Tiling: MatrixShape. The row terms are read for every tile, after the products, which need the registers. R
//   rows and M columns in the block, B = ceil(R / 128) blocks, T = ceil(M / kBlockN) tiles, S = ceil(D / 128
//   bytes) > 1 steps, of doubles with additions also 1.
// Products: 1 unit of 2 R M D flops, 4 B T S kBlockN mma.
// Traffic, 32-byte sectors of global memory: operands 4 R S (times T where K < S) + 4 B M S; positives of the
//   rows 64 B T P, of the columns B T P kBlockN; R P for the gradients of a side's positives; column terms 3
//   B T kBlockN / 8, row terms 96 B T (double: twice these). Writes 128 B T kBlockN scalar_t in whole
//   sectors.
// Shared memory: 16 KB of own rows K times, 3 * kBlockN * 128 bytes of the other side, terms of two tiles: 99
//   KB; for double, terms of three: 77 KB. No bank conflicts.
// Occupancy: 256 threads, at most 128 registers: 2 blocks per multiprocessor, one by sm_80's shared memory;
//   exact products, and with additions: one block, at most 255 registers.
template <typename Engine>
struct LargeCoefficientShape : MatrixShape<Engine, 3> {
  static constexpr int kBlocksPerSm = 1;
};

template <typename Engine>
constexpr bool kIsLarge = kAdds<Engine> || std::is_same_v<Engine, FmaEngine<float>>;

template <typename Engine>
using CoefficientShape =
    std::conditional_t<kIsLarge<Engine>, LargeCoefficientShape<Engine>, MatrixShape<Engine, 3>>;

// Of a CoefficientBlock.
template <typename Engine>
__global__ void __launch_bounds__(CoefficientShape<Engine>::kThreads, CoefficientShape<Engine>::kBlocksPerSm)
    contrastive_coefficients_kernel(const ProblemOf<Engine> problem, const double* grad_positive_logits,
                                    const typename Engine::acc_t* coefficient_scale, int64_t first_row,
                                    int64_t first_column, int64_t columns, bool with_norms,
                                    typename Engine::scalar_t* block, int64_t stride) {
  using Shape = CoefficientShape<Engine>;
  using acc_t = typename Engine::acc_t;
  const auto& own = problem.own;
  const auto& other = problem.other;
  const int lane = threadIdx.x % kWarpSize;
  extern __shared__ __align__(128) unsigned char shared[];
  const acc_t a = *problem.scale * Math<acc_t>::kLog2e;
  const bool one_exponential = !kAdds<Engine> && takes_one_exponential(problem, a);
  using Walk = TileWalk<Shape, Engine>;
  Walk walk(shared, own, other, column_terms<Walk>(problem, one_exponential), problem.width,
            first_row + static_cast<int64_t>(blockIdx.x) * Shape::kBlockM,
            block_tiles<Shape>(first_column, columns));
  const acc_t c_scale = kScalesCoefficients<Engine> ? *coefficient_scale : acc_t(1);
  BiasSums<Engine> bias_sums;

  for (walk.start(); walk.next();) {
    typename TileWalk<Shape, Engine>::Tile c;
    walk.products(c);
    RowTerms<acc_t> rows[4];  // from cache: the products need the registers
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rows[i] = row_terms(own, walk.row0() + walk.warp_row() + fragment_row(lane, i / 2, i % 2 * 2),
                          problem.center);
    }
    make_coefficients(c, walk, problem, rows, a, one_exponential, grad_positive_logits, bias_sums);
    write_block(walk, c, c_scale, with_norms, block - first_row * stride - first_column, stride);
  }
  bias_sums.store(walk, problem);
}

}  // namespace contrastive
}  // namespace ssl_kernels
