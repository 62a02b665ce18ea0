// Device code of `contrastive` on the tile walk of tile_walk.cuh. One side owns the rows of the similarity
// tiles, the other side is walked:
//
//   s_ij = scale * v_ij      v_ij = <x_i, y_j> * (rnorm_i * rnorm_j)      rnorm = 1 / max(|x|, 1e-12), or 1
//
// Rows are normalised by scaling the tile of raw products, so no normalised copy exists. In base 2, a =
// scale * log2(e) is rounded once and a * v enters every exponent as an exact product (fma), the same
// whichever side owns the rows, in forward and in backward.
#pragma once

#include <cstdint>

#include "device/online_softmax.cuh"
#include "rows.cuh"
#include "tile_walk.cuh"

namespace ssl_kernels {
namespace contrastive {

template <typename scalar_t, typename acc_t>
struct Side : Operand<scalar_t, acc_t> {
  const int64_t* ids;        // null: no exclusion by id
  const int64_t* positives;  // (count, P): rows of the other side; null: none of this side
  // Backward, see contrastive_terms_kernel; null where this side's sums have no gradient.
  const acc_t* base2_lse;
  const acc_t* weight;
};

template <typename scalar_t, typename acc_t, typename other_t = scalar_t>
struct Problem {
  Side<scalar_t, acc_t> own;
  Side<other_t, acc_t> other;
  int64_t width;  // D padded to 16 bytes
  const acc_t* scale;
  int64_t P;
  bool square;         // both sides are the same rows: (i, i) is left out
  bool keep_diagonal;  // (i, i) stays although its ids are equal
};

template <typename Engine>
using ProblemOf = Problem<typename Engine::scalar_t, typename Engine::acc_t, typename Engine::other_t>;

// Whether s_ij counts in the sums, given the ids of both (0 for all where there are none).
template <typename scalar_t, typename acc_t, typename other_t>
__device__ __forceinline__ bool is_allowed(const Problem<scalar_t, acc_t, other_t>& problem, int64_t i, int64_t id_i,
                                           int64_t j, int64_t id_j) {
  if (j >= problem.other.count) return false;
  if (i == j) return !problem.square && (problem.keep_diagonal || !problem.own.ids || id_i != id_j);
  return !problem.own.ids || id_i != id_j;
}

template <typename scalar_t, typename acc_t>
__device__ __forceinline__ int64_t id_of(const Side<scalar_t, acc_t>& side, int64_t index) {
  return side.ids && index < side.count ? side.ids[index] : 0;
}

// Sets the elements of a warp's part of a tile, at (row0, column0), that stay out of the sums to `value`.
template <int kNTiles, typename scalar_t, typename acc_t, typename other_t>
__device__ __forceinline__ void exclude(Fragment<acc_t, kNTiles>& c, const Problem<scalar_t, acc_t, other_t>& problem,
                                        int64_t row0, int64_t column0, acc_t value) {
  const auto& own = problem.own;
  const auto& other = problem.other;
  constexpr int kColumns = kNTiles * 8;
  const bool on_diagonal = problem.square && column0 < row0 + kWarpRows && row0 < column0 + kColumns;
  if (!on_diagonal && !own.ids && column0 + kColumns <= other.count) return;
  const int lane = threadIdx.x % kWarpSize;
  int64_t row_id[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) row_id[i] = id_of(own, row0 + fragment_row(lane, i / 2, i % 2 * 2));
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t column = column0 + fragment_column(lane, n, e);
      const int64_t column_id = id_of(other, column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = row0 + fragment_row(lane, i / 2, i % 2 * 2);
        if (!is_allowed(problem, row, row_id[i], column, column_id)) c[i / 2][n][i % 2 * 2 + e] = value;
      }
    }
  }
}

// Calls f(source, target, k) for each k-th positive of the rows [source0, source0 + sources) of `from` that
// points into rows [target0, target0 + targets) of `to`; source and target are relative to source0 and
// target0. Called by whole warps, all lanes see every call; the order is fixed. A negative positive counts
// from the end.
template <typename From, typename To, typename F>
__device__ __forceinline__ void for_each_positive(const From& from, int64_t source0, int sources,
                                                  const To& to, int64_t target0, int targets, int64_t P,
                                                  F f) {
  const int lane = threadIdx.x % kWarpSize;
  for (int base = 0; base < sources; base += kWarpSize) {
    const int64_t source = source0 + base + lane;
    const bool valid = base + lane < sources && source < from.count;
    for (int64_t k = 0; k < P; ++k) {
      int64_t target = valid ? from.positives[source * P + k] : -1;
      if (valid && target < 0) target += to.count;
      target -= target0;
      unsigned hits = __ballot_sync(kAllLanes, target >= 0 && target < targets);
      while (hits) {
        const int owner = __ffs(hits) - 1;
        hits &= hits - 1;
        f(base + owner, __shfl_sync(kAllLanes, static_cast<int>(target), owner), k);
      }
    }
  }
}

// --------------------------------------------------------------------------------------------------- forward
//
//   lse_i = log sum_{j allowed} exp(s_ij);   positive_logits_ik = s_{i, positives(i, k)}
//   both directions: also column_lse_j = log sum_{i allowed} exp(s_ij), from the same tiles
//
// Tiling: ReduceShape; every thread keeps the running maximum and sum of its share of 4 rows in registers, and
//   the lanes of a row meet once at the end. Positives are picked out of the tile by the one lane that holds
//   them. Several parts of the columns leave their maximum and sum in `partial`. Below, B = ceil(N / 128) blocks
//   of rows, T = ceil(M / kBlockN) tiles, S = ceil(D / 128 bytes) steps.
// Both directions: every tile is reduced along its rows as well. The 8 lanes of a column share out its maximum
//   and sum, the warps merge theirs through shared memory with one barrier a tile more, and one thread a column
//   adds them to the block's sums in `column_partial`, (groups, M). A block (group, part) walks its part of the
//   columns for each of its group's blocks of rows in turn, so an entry of column_partial has one owner and there
//   are as many groups as fill the card beside 8 parts, not B.
// Products: 1 unit of 2 N M D flops, in both directions too: 256 B T S mma, each 16 x 8 by 32 bytes of depth.
//   One exponential an entry, 2 in both directions.
// Traffic, 32-byte sectors of global memory: operands 4 N S (times the parts, or T where S > 3) + 4 B M S,
//   positives 32 B T P, column norms B T kBlockN / 8, row norms and scale 20 B. Writes N (1 + P) doubles, or 2 N
//   acc_t a part. Both directions write 2 B M acc_t and read 2 (B - groups) M acc_t more.
// Memory: 2 N acc_t a part, and in both directions 2 M acc_t a group: on 132 multiprocessors at most 33 groups, 264
//   bytes a column, or less than 1 MB in all where T < 32 leaves fewer parts and so more groups (twice that for double).
// Shared memory: min(S, 3) * 16 KB of own rows + 3 * kBlockN * (128 bytes + acc_t), 2 KB more in both directions. No
//   bank conflicts. Wavefronts of a tile and step: kBlockN for its copy (128 more with own rows), reads of operands
//   384 on tensor cores, 2560 by float FMA; and of a tile 66 for column norms, and 32 in both directions.
// Occupancy: 2 blocks of 128 threads per multiprocessor, at most 255 registers, on sm_80, sm_90 and sm_100.
// Numerics: products in scalar_t with acc_t accumulation, all else in acc_t, results in double. The maximum of a
//   column is that of the warp's 32 rows before any exponential of it is taken, then a running one as of a row.
template <typename Engine, bool kBothDirections>
struct FwdShape : ReduceShape<Engine, 1> {
  using Base = ReduceShape<Engine, 1>;
  using Softmax = OnlineSoftmax<typename Engine::acc_t>;

  static constexpr int shared_bytes(int own_slots) {
    const int exchange = Base::kWarps * Base::kBlockN * static_cast<int>(sizeof(Softmax));
    return Base::shared_bytes(own_slots) + (kBothDirections ? exchange : 0);
  }
};

// The running maxima and sums of the rows of one lane.
template <typename acc_t>
struct RowSums {
  OnlineSoftmax<acc_t> state[4];  // by fragment_row
  acc_t a;

  __device__ __forceinline__ explicit RowSums(acc_t base2_scale) : a(base2_scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state[i].clear();
  }

  template <int kNTiles>
  __device__ __forceinline__ void add(const Fragment<acc_t, kNTiles>& c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc_t largest = c[i / 2][0][i % 2 * 2];
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        largest = Math<acc_t>::max(largest, c[i / 2][n][i % 2 * 2]);
        largest = Math<acc_t>::max(largest, c[i / 2][n][i % 2 * 2 + 1]);
      }
      const acc_t shift = state[i].raise(largest, a);
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        state[i].sum += OnlineSoftmax<acc_t>::term(c[i / 2][n][i % 2 * 2], a, shift);
        state[i].sum += OnlineSoftmax<acc_t>::term(c[i / 2][n][i % 2 * 2 + 1], a, shift);
      }
    }
  }
};

// The maxima and sums of the columns of a tile over the block's rows.
template <typename Shape>
struct ColumnSums {
  using acc_t = typename Shape::acc_t;
  using Softmax = OnlineSoftmax<acc_t>;
  static constexpr int kCount = Shape::kNTiles * 2;  // columns of a lane, k = 2 n + e
  static constexpr int kKept = kCount / 8;           // that it keeps: k = kKept g + {0 .. kKept - 1}, lane = 4 g + q
  static_assert(kKept * sizeof(Softmax) == 16);

  // Reduces x_k over the 8 lanes of its column, which halve their columns with each exchange: a lane has its own in
  // x[0 .. kKept - 1].
  template <int kHalf = kCount / 2, int kOffset = 16, typename Op>
  static __device__ __forceinline__ void share_out(acc_t (&x)[kCount], Op op) {
    const bool upper = threadIdx.x & kOffset;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const acc_t low = x[k], high = x[k + kHalf];
      x[k] = op(upper ? high : low, __shfl_xor_sync(kAllLanes, upper ? low : high, kOffset));
    }
    if constexpr (kOffset > 4) share_out<kHalf / 2, kOffset / 2>(x, op);
  }

  // Leaves those of a warp's part of a tile in `exchange`, (kBlockN,).
  static __device__ __forceinline__ void add(const Fragment<acc_t, Shape::kNTiles>& c, acc_t a, Softmax* exchange) {
    const int lane = threadIdx.x % kWarpSize;
    acc_t largest[kCount], sum[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      largest[k] = c[0][k / 2][k % 2];
#pragma unroll
      for (int i = 1; i < 4; ++i) largest[k] = Math<acc_t>::max(largest[k], c[i / 2][k / 2][i % 2 * 2 + k % 2]);
    }
    share_out(largest, [](acc_t x, acc_t y) { return Math<acc_t>::max(x, y); });
    acc_t shift[kKept];
#pragma unroll
    for (int k = 0; k < kKept; ++k) shift[k] = Softmax::shift_of(largest[k], a);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const acc_t shift_k = __shfl_sync(kAllLanes, shift[k % kKept], k / kKept * 4 + lane % 4);
      sum[k] = acc_t(0);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[k] += Softmax::term(c[i / 2][k / 2][i % 2 * 2 + k % 2], a, shift_k);
    }
    share_out(sum, [](acc_t x, acc_t y) { return x + y; });
    const int k0 = lane / 4 * kKept;
    Vector<acc_t> kept;  // as Softmax lies in memory
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      kept.value[2 * k] = largest[k];
      kept.value[2 * k + 1] = sum[k];
    }
    store_vector(exchange + fragment_column(lane, k0 / 2, k0 % 2), kept);
  }
};

// Sets the elements of a warp's part of a tile in rows from `rows` on to -inf: the sums of columns leave them out.
template <int kNTiles, typename acc_t>
__device__ __forceinline__ void exclude_rows_past_the_end(Fragment<acc_t, kNTiles>& c, int64_t rows) {
  if (rows >= kWarpRows) return;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool inside = fragment_row(lane, i / 2, i % 2 * 2) < rows;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        acc_t& v = c[i / 2][n][i % 2 * 2 + e];
        v = inside ? v : -Math<acc_t>::infinity();
      }
    }
  }
}

template <typename Engine, bool kBothDirections>
__global__ void __launch_bounds__(FwdShape<Engine, kBothDirections>::kThreads,
                                  FwdShape<Engine, kBothDirections>::kBlocksPerSm)
    contrastive_fwd_kernel(const ProblemOf<Engine> problem,
                           double* lse, double* positive_logits,
                           OnlineSoftmax<typename Engine::acc_t>* partial,
                           OnlineSoftmax<typename Engine::acc_t>* column_partial) {
  using Shape = FwdShape<Engine, kBothDirections>;
  using acc_t = typename Engine::acc_t;
  using Softmax = OnlineSoftmax<acc_t>;
  constexpr int kNTiles = Shape::kNTiles;

  const auto& own = problem.own;
  const auto& other = problem.other;
  const int lane = threadIdx.x % kWarpSize;
  extern __shared__ __align__(128) unsigned char shared[];

  // A negative scale turns the order of v round; its sign goes into the rows' factor.
  const acc_t signed_scale = *problem.scale;
  const acc_t a = Softmax::base2_scale(Math<acc_t>::abs(signed_scale));
  const double logit_scale = signed_scale == acc_t(0) ? 0.0 : a * Math<double>::kLn2;

  int row_block = blockIdx.x, row_blocks_end = row_block + 1;
  if constexpr (kBothDirections) {
    const Split group(ceil_div(own.count, Shape::kBlockM), blockIdx.x, gridDim.x);
    row_block = static_cast<int>(group.begin);
    row_blocks_end = static_cast<int>(group.end);
  }
  // The last tile's barrier stands between the last reading of a block's operands and the next block's copies.
  for (bool first_of_group = true; row_block < row_blocks_end; ++row_block, first_of_group = false) {
    TileWalk<Shape, Engine> walk(shared, own, other, {other.rnorm}, problem.width,
                                 static_cast<int64_t>(row_block) * Shape::kBlockM);
    const int64_t warp_row0 = walk.row0() + walk.warp_row();
    auto* exchange = reinterpret_cast<Softmax*>(walk.row_terms());  // (kWarps, kBlockN)
    acc_t row_factor[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = warp_row0 + fragment_row(lane, i / 2, i % 2 * 2);
      row_factor[i] = own.rnorm && row < own.count ? own.rnorm[row] : acc_t(1);
      if (signed_scale < acc_t(0)) row_factor[i] = -row_factor[i];
    }
    RowSums<acc_t> sums(a);

    for (walk.start(); walk.next();) {
      Fragment<acc_t, kNTiles> c;
      walk.products(c);
      walk.normalize(c, row_factor);
      if (positive_logits) {
        for_each_positive(own, warp_row0, kWarpRows, other, walk.column0(), Shape::kBlockN, problem.P,
                          [&](int row, int column, int64_t k) __attribute__((always_inline)) {
                            if (!holds_element(row, column)) return;
                            const acc_t v = element<acc_t, kNTiles>(c, row, column);
                            positive_logits[(warp_row0 + row) * problem.P + k] = v * logit_scale;
                          });
      }
      exclude<kNTiles>(c, problem, warp_row0, walk.column0(), -Math<acc_t>::infinity());
      if constexpr (kBothDirections) {
        exclude_rows_past_the_end<kNTiles>(c, own.count - warp_row0);
        ColumnSums<Shape>::add(c, a, exchange + threadIdx.x / kWarpSize * Shape::kBlockN);
      }
      sums.template add<kNTiles>(c);
      if constexpr (kBothDirections) {
        __syncthreads();  // the next step's stands between this reading of the exchange and the next writing
        const int64_t column = walk.column0() + threadIdx.x;
        if (threadIdx.x < Shape::kBlockN && column < other.count) {
          Softmax& total = column_partial[blockIdx.x * other.count + column];
          Softmax state = exchange[threadIdx.x];
#pragma unroll
          for (int warp = 1; warp < Shape::kWarps; ++warp) {
            const Softmax next = exchange[warp * Shape::kBlockN + threadIdx.x];
            state.merge(next.max, next.sum, a);
          }
          if (!first_of_group) state.merge(total.max, total.sum, a);
          total = state;
        }
      }
    }

#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Softmax& state = sums.state[i];
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        const acc_t other_max = __shfl_xor_sync(kAllLanes, state.max, offset);
        const acc_t other_sum = __shfl_xor_sync(kAllLanes, state.sum, offset);
        state.merge(other_max, other_sum, a);
      }
      const int64_t row = warp_row0 + fragment_row(lane, i / 2, i % 2 * 2);
      if (lane % 4 == 0 && row < own.count) {
        if (partial) {
          partial[blockIdx.y * own.count + row] = state;
        } else {
          lse[row] = state.lse(a);
        }
      }
    }
  }
}

// lse_i from the maxima and sums of `parts` parts, (parts, count), merged in their order: of rows or of columns. One
// thread each.
template <typename acc_t>
__global__ void contrastive_merge_kernel(const OnlineSoftmax<acc_t>* partial, int parts, int64_t count,
                                         const acc_t* scale, double* lse) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= count) return;
  const acc_t a = OnlineSoftmax<acc_t>::base2_scale(Math<acc_t>::abs(*scale));
  OnlineSoftmax<acc_t> state = partial[row];
  for (int part = 1; part < parts; ++part) {
    const OnlineSoftmax<acc_t> next = partial[part * count + row];
    state.merge(next.max, next.sum, a);
  }
  lse[row] = state.lse(a);
}

// -------------------------------------------------------------------------------------------------- backward
//
// The gradient of the logits, seen from the owner of row i (w, L of either side; null terms are absent):
//
//   C_ij = allowed_ij (w_i 2^(a v_ij - L_i) + w_j 2^(a v_ij - L_j))
//          + sum_k [positives(i, k) = j] q_ik + sum_k [positives(j, k) = i] q_jk
//   G_i = sum_j C_ij rnorm_j y_j    dx^_i = scale G_i    dscale = sum_i <x^_i, G_i>, half of it when square
//
// Square: both sides are the same, C = A + A^T. Rectangular: the rows' terms are those of lse, the columns'
// those of column_lse; for the columns' gradient the roles are exchanged.
//
// Rows of up to 1024 bytes, in one kernel; wider ones in two, see CoefficientShape.
//
// Tiling: ProductShape; a tile is recomputed and its C multiplied. Below, B = ceil(N / kBlockM) blocks, T = ceil(M
//   / kBlockN) tiles, S = ceil(D / 128 bytes) steps.
// Products: 2 units of 2 N M D flops, B T S kBlockM kBlockN / 16 mma.
// Traffic, 32-byte sectors of global memory: operands 4 N S (times T where S > 3) + 8 B M S; 64 B T P for the
//   positives of a side and N P for their gradients; row and column terms 3 B (kBlockM + T kBlockN) / 8. Writes
//   N D acc_t a part.
// Shared memory: (min(S, 3) + kBlockN / chunk) * kBlockM * 128 bytes, 3 * kBlockN * 128 bytes, 3 * (kBlockM + 3 *
//   kBlockN) acc_t of terms; at most 97.3 KB. No bank conflicts but two-way ones in TF32's reads of y for C y and in
//   4-byte types' writes of C.
// Occupancy: one block of 256 threads per multiprocessor, at most 255 registers.
// Numerics: C in acc_t, rounded once to scalar_t. half scales C by a power of two that brings its bound
//   near 2^15.
template <typename Engine, int kWarpsM, int kSliceChunks>
using BwdShape = ProductShape<Engine, kWarpsM, kSliceChunks, 3, 3>;

// What the backward tiles need of a sum and its gradient, once a row (g = grad_lse):
//
//   L_i = lse_i log2(e) rounded to acc_t      w_i = g_i 2^(L_i - lse_i log2(e))      so g_i exp(s - lse_i) =
//   w_i 2^(a v - L_i)
//
// A sum over nothing (lse = -inf) gets NaN, which meets only entries that are excluded.
template <typename acc_t>
__global__ void contrastive_terms_kernel(const double* lse, const double* grad_lse, int64_t count,
                                         acc_t* base2_lse, acc_t* weight) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= count) return;
  const double exact = lse[row] * Math<double>::kLog2e;
  const acc_t rounded = static_cast<acc_t>(exact);
  base2_lse[row] = rounded;
  weight[row] = static_cast<acc_t>(grad_lse[row] * Math<double>::exp2(rounded - exact));
}

// What the coefficients need of one row of the owner.
template <typename acc_t>
struct RowTerms {
  acc_t rnorm, base2_lse, weight;
};

template <typename scalar_t, typename acc_t>
__device__ __forceinline__ RowTerms<acc_t> row_terms(const Side<scalar_t, acc_t>& own, int64_t i) {
  const bool valid = i < own.count;
  return {valid && own.rnorm ? own.rnorm[i] : acc_t(1),
          valid && own.base2_lse ? own.base2_lse[i] : Math<acc_t>::infinity(),
          valid && own.base2_lse ? own.weight[i] : acc_t(0)};
}

// C in the place of the products of the walk's tile; a = scale log2(e), `rows` by fragment_row.
template <typename Shape, typename Engine>
__device__ __forceinline__ void make_coefficients(typename TileWalk<Shape, Engine>::Tile& c,
                                                  const TileWalk<Shape, Engine>& walk,
                                                  const ProblemOf<Engine>& problem,
                                                  const RowTerms<typename Engine::acc_t> (&rows)[4],
                                                  typename Engine::acc_t a, const double* grad_positive_logits) {
  using acc_t = typename Engine::acc_t;
  constexpr int kNTiles = Shape::kNTiles;
  enum ColumnTerm { kRnorm, kBase2Lse, kWeight };
  const auto& own = problem.own;
  const auto& other = problem.other;
  const int64_t warp_row0 = walk.row0() + walk.warp_row();
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
          coefficient[m][e] = row.weight * Math<acc_t>::exp2(Math<acc_t>::fma(c[m][n][e], a, -row.base2_lse));
        }
      }
    }
    if (other.base2_lse) {
      const Pair<acc_t> base2_lse = walk.column_pair(kBase2Lse, n), weight = walk.column_pair(kWeight, n);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          coefficient[m][e] +=
              weight.value[e % 2] * Math<acc_t>::exp2(Math<acc_t>::fma(c[m][n][e], a, -base2_lse.value[e % 2]));
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[m][n][e] = coefficient[m][e];
    }
  }
  exclude<kNTiles>(c, problem, warp_row0, walk.column0(), acc_t(0));
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
  TileWalk<Shape, Engine> walk(shared, own, other, {other.rnorm, other.base2_lse, other.weight},
                               problem.width);

  acc_t* row_rnorm = walk.row_terms();
  acc_t* row_base2_lse = row_rnorm + kBlockM;
  acc_t* row_weights = row_base2_lse + kBlockM;
  for (int r = threadIdx.x; r < kBlockM; r += Shape::kThreads) {
    const RowTerms<acc_t> terms = row_terms(own, walk.row0() + r);
    row_rnorm[r] = terms.rnorm;
    row_base2_lse[r] = terms.base2_lse;
    row_weights[r] = terms.weight;
  }

  const acc_t a = *problem.scale * Math<acc_t>::kLog2e;
  const acc_t c_scale = kScalesCoefficients<Engine> ? *coefficient_scale : acc_t(1);
  Fragment<acc_t, Shape::kGTiles> g[Shape::kSliceChunks];
#pragma unroll
  for (int slice = 0; slice < Shape::kSliceChunks; ++slice) clear<acc_t, Shape::kGTiles>(g[slice]);

  for (walk.start(); walk.next();) {
    typename TileWalk<Shape, Engine>::Tile c;
    walk.products(c);
    RowTerms<acc_t> rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = walk.warp_row() + fragment_row(lane, i / 2, i % 2 * 2);
      rows[i] = {row_rnorm[r], row_base2_lse[r], row_weights[r]};
    }
    make_coefficients(c, walk, problem, rows, a, grad_positive_logits);
    walk.store_coefficients(c, [&](int n) __attribute__((always_inline)) {
      return coefficient_factor<kScalesCoefficients<Engine>>(walk.column_rnorm(n), c_scale);
    });
    walk.accumulate(g);
  }
  walk.store(g, partial);
}

// Wide rows: slab by slab (slab_gradient), this kernel writes C of the slab, rounded as contrastive_bwd_kernel rounds
// it, and slab_product_kernel makes G of C. Together 2 units, whatever D.
//
// Tiling: MatrixShape. The row terms are read for every tile, after the products, which need the registers. R rows in
//   the slab, B = ceil(R / 128) blocks, T = ceil(M / kBlockN) tiles, S = ceil(D / 128 bytes) > 8 steps.
// Products: 1 unit of 2 R M D flops, 4 B T S kBlockN mma.
// Traffic, 32-byte sectors of global memory: operands 4 R S T + 4 B M S; positives of the rows 64 B T P, of the columns
//   B T P kBlockN; R P for the gradients of a side's positives; column terms 3 B T kBlockN / 8, row terms 96 B T
//   (double: twice these). Writes 128 B T kBlockN scalar_t in whole sectors.
// Shared memory: 48 KB of own rows, 3 * kBlockN * 128 bytes of the other side, terms of two tiles: 99 KB, 75 KB for
//   double. No bank conflicts.
// Occupancy: 256 threads, at most 128 registers: 2 blocks per multiprocessor, one by sm_80's shared memory; double: one
//   block, at most 255 registers.
template <typename Engine>
using CoefficientShape = MatrixShape<Engine, 3>;

// C of the rows from `first_row` on; `coefficients` is a matrix of whole tiles, 0 past the last column.
template <typename Engine>
__global__ void __launch_bounds__(CoefficientShape<Engine>::kThreads, CoefficientShape<Engine>::kBlocksPerSm)
    contrastive_coefficients_kernel(const ProblemOf<Engine> problem, const double* grad_positive_logits,
                                    const typename Engine::acc_t* coefficient_scale, int64_t first_row,
                                    int64_t stride, typename Engine::scalar_t* coefficients) {
  using Shape = CoefficientShape<Engine>;
  using acc_t = typename Engine::acc_t;
  const auto& own = problem.own;
  const auto& other = problem.other;
  const int lane = threadIdx.x % kWarpSize;
  extern __shared__ __align__(128) unsigned char shared[];
  TileWalk<Shape, Engine> walk(shared, own, other, {other.rnorm, other.base2_lse, other.weight}, problem.width,
                               first_row + static_cast<int64_t>(blockIdx.x) * Shape::kBlockM);
  const acc_t a = *problem.scale * Math<acc_t>::kLog2e;
  const acc_t c_scale = kScalesCoefficients<Engine> ? *coefficient_scale : acc_t(1);

  for (walk.start(); walk.next();) {
    typename TileWalk<Shape, Engine>::Tile c;
    walk.products(c);
    RowTerms<acc_t> rows[4];  // from cache: the products need the registers
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rows[i] = row_terms(own, walk.row0() + walk.warp_row() + fragment_row(lane, i / 2, i % 2 * 2));
    }
    make_coefficients(c, walk, problem, rows, a, grad_positive_logits);
    walk.write_coefficients(
        c,
        [&](int n) __attribute__((always_inline)) {
          return coefficient_factor<kScalesCoefficients<Engine>>(walk.column_rnorm(n), c_scale);
        },
        coefficients + (walk.row0() - first_row) * stride, stride);
  }
}

// ----------------------------------------------------------------------------------------------- expectation
//
//   lse_i and positive_logits_ik as the forward;   E_i = sum_j p_ij y^_j,  p_ij = exp(s_ij - lse_i) if allowed
//
// Attention with V = K: where only the rows need a gradient, dx^_i = scale (g_i E_i + sum_k q_ik y^_idx(i,k))
// needs no second walk.
//
// Tiling: ProductShape. Every row has one running maximum for all warps that share it, exchanged through shared
//   memory with one barrier a tile more; the sum stays with the lanes, and G_i = sum_j 2^(a v_ij - shift_i)
//   rnorm_j y_j is scaled down where the maximum rises. A part leaves maximum, sum and G_i;
//   contrastive_expectation_merge_kernel makes lse_i and E_i of them. B, T, S and Z as in the backward.
// Products: 2 units of 2 N M D flops, 1 + Z where D is wider than a slice. As many mma as the backward.
// Traffic, 32-byte sectors of global memory: operands 4 N S Z (times T where S > 3) + 4 B M S (1 + Z), positives
//   32 B T P for each warp that shares a row, column norms B Z T kBlockN / 8, row norms B Z kBlockM / 8. Writes N D + 2
//   N acc_t a part. Columns of 2 bytes beside float rows are widened in the block: half of their sectors.
// Memory: the parts' sums, 64 KB for each block of 128 rows by 128 features: 8.7 MB for 256 rows of 128 on 132
//   multiprocessors, whatever M. That is what a card that is full holds in registers. Fewer parts would leave
//   multiprocessors idle (2 MB: 15 parts of 2 row blocks, 30 of 132 busy); blocks of fewer rows would read the
//   columns from L2 as much more often (2 MB: blocks of 16 rows, 8 times the traffic for the same products).
// Shared memory: (min(S, 3) + kBlockN / chunk) * kBlockM * 128 bytes, 3 * kBlockN * (128 bytes + acc_t), norms
//   and maxima of the rows. No bank conflicts but those of the backward.
// Occupancy: one block of 256 threads per multiprocessor, at most 255 registers.
// Numerics: the exponentials in acc_t, rounded once to scalar_t for their product, not for their sum. half
//   scales them by a power of two that brings their product with the norms near 2^15.
template <typename Engine, int kWarpsM, int kSliceChunks>
struct ExpectationShape : ProductShape<Engine, kWarpsM, kSliceChunks, 1, 1 + 8 / kWarpsM> {
  static constexpr bool kScaled = kScalesCoefficients<Engine>;
};

template <typename Shape, typename Engine>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    contrastive_expectation_kernel(const ProblemOf<Engine> problem,
                                   const typename Engine::acc_t* coefficient_scale, double* positive_logits,
                                   OnlineSoftmax<typename Engine::acc_t>* partial_sums,
                                   typename Engine::acc_t* partial) {
  using acc_t = typename Engine::acc_t;
  using Softmax = OnlineSoftmax<acc_t>;
  constexpr int kBlockM = Shape::kBlockM, kNTiles = Shape::kNTiles, kWarpsN = Shape::kWarpsN;

  const auto& own = problem.own;
  const auto& other = problem.other;
  const int lane = threadIdx.x % kWarpSize;
  const int warp_n = threadIdx.x / kWarpSize % kWarpsN;
  extern __shared__ __align__(128) unsigned char shared[];
  TileWalk<Shape, Engine> walk(shared, own, other, {other.rnorm}, problem.width);
  const int64_t warp_row0 = walk.row0() + walk.warp_row();
  acc_t* row_factors = walk.row_terms();
  acc_t* exchange = row_factors + kBlockM;  // (kWarpsN, kBlockM)

  // A negative scale turns the order of v round; its sign goes into the rows' factor.
  const acc_t signed_scale = *problem.scale;
  const acc_t a = Softmax::base2_scale(Math<acc_t>::abs(signed_scale));
  const double logit_scale = signed_scale == acc_t(0) ? 0.0 : a * Math<double>::kLn2;
  const acc_t c_scale = Shape::kScaled ? *coefficient_scale : acc_t(1);
  const bool first_slice = blockIdx.z == 0;
  for (int r = threadIdx.x; r < kBlockM; r += Shape::kThreads) {
    const int64_t row = walk.row0() + r;
    const acc_t rnorm = own.rnorm && row < own.count ? own.rnorm[row] : acc_t(1);
    row_factors[r] = signed_scale < acc_t(0) ? -rnorm : rnorm;
  }
  Softmax state[4];  // the maximum is the row's, the sum the lane's
#pragma unroll
  for (int i = 0; i < 4; ++i) state[i].clear();
  Fragment<acc_t, Shape::kGTiles> g[Shape::kSliceChunks];
#pragma unroll
  for (int slice = 0; slice < Shape::kSliceChunks; ++slice) clear<acc_t, Shape::kGTiles>(g[slice]);

  for (walk.start(); walk.next();) {
    Fragment<acc_t, kNTiles> c;
    walk.products(c);
    acc_t row_factor[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      row_factor[i] = row_factors[walk.warp_row() + fragment_row(lane, i / 2, i % 2 * 2)];
    }
    walk.normalize(c, row_factor);
    if (positive_logits && first_slice) {
      for_each_positive(own, warp_row0, kWarpRows, other, walk.column0(), Shape::kWarpColumns, problem.P,
                        [&](int row, int column, int64_t k) __attribute__((always_inline)) {
                          if (!holds_element(row, column)) return;
                          const acc_t v = element<acc_t, kNTiles>(c, row, column);
                          positive_logits[(warp_row0 + row) * problem.P + k] = v * logit_scale;
                        });
    }
    exclude<kNTiles>(c, problem, warp_row0, walk.column0(), -Math<acc_t>::infinity());

#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc_t largest = c[i / 2][0][i % 2 * 2];
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        largest = Math<acc_t>::max(largest, c[i / 2][n][i % 2 * 2]);
        largest = Math<acc_t>::max(largest, c[i / 2][n][i % 2 * 2 + 1]);
      }
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        largest = Math<acc_t>::max(largest, __shfl_xor_sync(kAllLanes, largest, offset));
      }
      const int r = walk.warp_row() + fragment_row(lane, i / 2, i % 2 * 2);
      if (lane % 4 == 0) exchange[warp_n * kBlockM + r] = largest;
    }
    __syncthreads();
    acc_t shrink[4];
    bool shrinks = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = walk.warp_row() + fragment_row(lane, i / 2, i % 2 * 2);
      acc_t largest = exchange[r];
#pragma unroll
      for (int n = 1; n < kWarpsN; ++n) largest = Math<acc_t>::max(largest, exchange[n * kBlockM + r]);
      const acc_t before = state[i].max;
      const acc_t shift = state[i].raise(largest, a);
      shrink[i] = Math<acc_t>::exp2(Math<acc_t>::mul(a, before) - shift);
      shrinks |= shrink[i] != acc_t(1);
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          acc_t& v = c[i / 2][n][i % 2 * 2 + e];
          v = Softmax::term(v, a, shift);
          state[i].sum += v;
        }
      }
    }
    if (__any_sync(kAllLanes, shrinks)) {
#pragma unroll
      for (int slice = 0; slice < Shape::kSliceChunks; ++slice) {
#pragma unroll
        for (int n = 0; n < Shape::kGTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            g[slice][i / 2][n][i % 2 * 2] *= shrink[i];
            g[slice][i / 2][n][i % 2 * 2 + 1] *= shrink[i];
          }
        }
      }
    }
    walk.store_coefficients(c, [&](int n) __attribute__((always_inline)) {
      return coefficient_factor<Shape::kScaled>(walk.column_rnorm(n), c_scale);
    });
    walk.accumulate(g);
  }
  walk.store(g, partial);

  // The last step's barrier stands after the last reading of the maxima.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      state[i].sum += __shfl_xor_sync(kAllLanes, state[i].sum, offset);
    }
    const int r = walk.warp_row() + fragment_row(lane, i / 2, i % 2 * 2);
    if (lane % 4 == 0) exchange[warp_n * kBlockM + r] = state[i].sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = walk.warp_row() + fragment_row(lane, i / 2, i % 2 * 2);
    const int64_t row = walk.row0() + r;
    if (first_slice && warp_n == 0 && lane % 4 == 0 && row < own.count) {
      state[i].sum = exchange[r];
#pragma unroll
      for (int n = 1; n < kWarpsN; ++n) state[i].sum += exchange[n * kBlockM + r];
      partial_sums[blockIdx.y * own.count + row] = state[i];
    }
  }
}

// lse_i and E_i from the parts, merged in their order; 0 where nothing was allowed. One warp a row.
//
// Traffic: reads parts N (D acc_t and 2 sectors), 1 sector a row of scale, for half 2; writes N D acc_t and N doubles, of
// which each is a sector of its own.
template <typename acc_t>
__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    contrastive_expectation_merge_kernel(const OnlineSoftmax<acc_t>* partial_sums, const acc_t* partial,
                                         int parts, int64_t partial_stride, int64_t count, int64_t D,
                                         const acc_t* scale, const acc_t* coefficient_scale, double* lse,
                                         acc_t* expectation) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
  if (row >= count) return;
  const acc_t a = OnlineSoftmax<acc_t>::base2_scale(Math<acc_t>::abs(*scale));
  OnlineSoftmax<acc_t> state = partial_sums[row];
  for (int part = 1; part < parts; ++part) {
    const OnlineSoftmax<acc_t> next = partial_sums[part * count + row];
    state.merge(next.max, next.sum, a);
  }
  if (lane == 0) lse[row] = state.lse(a);
  const acc_t shift = state.raise(-Math<acc_t>::infinity(), a);
  const acc_t unscale = coefficient_scale ? acc_t(1) / *coefficient_scale : acc_t(1);
  const acc_t factor = state.sum == acc_t(0) ? acc_t(0) : unscale / state.sum;
  __shared__ acc_t weights[kRowWarps][kMaxSplits];
  acc_t* weight = weights[threadIdx.x / kWarpSize];
  for (int part = lane; part < parts; part += kWarpSize) {
    weight[part] = factor * Math<acc_t>::exp2(Math<acc_t>::mul(a, partial_sums[part * count + row].max) - shift);
  }
  __syncwarp();
  for (int64_t d = lane; d < D; d += kWarpSize) {
    acc_t sum = acc_t(0);
    for (int part = 0; part < parts; ++part) {
      sum += weight[part] * partial[(part * count + row) * partial_stride + d];
    }
    expectation[row * D + d] = sum;
  }
}

// The rows' gradient from the expectation, and its dot with x^_i, as finish_rows_kernel makes them of
//
//   G_i = g_i E_i + sum_k q_ik y^_idx(i,k)
//
// One warp a row, everything in acc_t. Traffic: reads N D acc_t, N D (1 + P) scalar_t and 3 sectors for each positive and
// 32 features twice (the second time from cache), 3 sectors a row; writes N D scalar_t and N acc_t in N sectors.
template <typename scalar_t, typename acc_t, typename other_t>
__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    contrastive_expectation_bwd_kernel(const acc_t* expectation, StridedRows<scalar_t> rows, const acc_t* row_rnorm,
                                       StridedRows<other_t> columns, const acc_t* column_rnorm, int64_t N,
                                       int64_t M, int64_t D, const int64_t* positives, int64_t P,
                                       const double* grad_lse, const double* grad_positive_logits,
                                       const acc_t* scale, scalar_t* grad, acc_t* dots) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
  if (row >= N) return;
  const acc_t weight = grad_lse ? static_cast<acc_t>(grad_lse[row]) : acc_t(0);
  finish_row(rows, row, D, row_rnorm, scale, grad, dots, [&](int64_t d) {
    acc_t sum = weight * expectation[row * D + d];
    for (int64_t k = 0; k < (grad_positive_logits ? P : 0); ++k) {
      int64_t j = positives[row * P + k];
      if (j < 0) j += M;
      const acc_t y = to_acc(columns.at(j, d)) * (column_rnorm ? column_rnorm[j] : acc_t(1));
      sum += static_cast<acc_t>(grad_positive_logits[row * P + k]) * y;
    }
    return sum;
  });
}

}  // namespace contrastive
}  // namespace ssl_kernels
