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
#include <type_traits>

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
  // weight 2^(center - base2_lse); null where one exponential may not do for both sides.
  const acc_t* centered_weight;
};

// The additions of one side, in units of base-2 logits and up to the end of the last tile. Null: a bias of 0,
// no limits.
template <typename acc_t>
struct SideAdditions {
  const acc_t* bias;  // of its logits in the sums of the other side's rows
  // What its logits may not exceed, in the sums of its own rows and in those of the other side's; with the
  // limit of the other side the larger one counts. Exempt: infinity, and -infinity where the limit is the
  // other side's.
  const acc_t* own_limit;
  const acc_t* other_limit;
};

// What the kernels of an AddingEngine know besides (docs/contrastive.md, "Biases and limits").
template <typename acc_t>
struct Additions {
  SideAdditions<acc_t> own_additions, other_additions;
  bool only_equal_ids;
  // Backward: the gradient of the own bias for rows from bias_row on, see BiasSums; null where it is not
  //   needed.
  acc_t* bias_partial;
  int64_t bias_row, bias_rows;
};

struct NoAdditions {
  static constexpr bool only_equal_ids = false;
};

// The same products, in kernels that take additions.
template <typename Engine>
struct AddingEngine : Engine {};

template <typename Engine>
struct WithoutAdditions {
  using type = Engine;
};
template <typename Engine>
struct WithoutAdditions<AddingEngine<Engine>> {
  using type = Engine;
};
template <typename Engine>
using PlainEngine = typename WithoutAdditions<Engine>::type;

template <typename Engine>
constexpr bool kAdds = !std::is_same_v<Engine, PlainEngine<Engine>>;

template <typename scalar_t, typename acc_t, typename other_t, typename additions_t>
struct Problem : additions_t {
  Side<scalar_t, acc_t> own;
  Side<other_t, acc_t> other;
  int64_t width;  // D padded to 16 bytes
  const acc_t* scale;
  int64_t P;
  acc_t center;        // of a side's base2_lse
  bool square;         // both sides are the same rows: (i, i) is left out
  bool keep_diagonal;  // (i, i) stays although its ids are equal
};

template <typename Engine>
using ProblemOf =
    Problem<typename Engine::scalar_t, typename Engine::acc_t, typename Engine::other_t,
            std::conditional_t<kAdds<Engine>, Additions<typename Engine::acc_t>, NoAdditions>>;

// Where rows are normalised and a = scale log2(e) is at most this, every base-2 logit lies in [-32, 32] and
// every base-2 log-sum-exp of n of them in [-32, 32 + log2(n)], so that quotients of their powers of two are
// numbers of float's range.
constexpr int kMostBase2Scale = 32;

// Whether both sides' sums may take their terms from one exponential an entry.
template <typename Problem, typename acc_t>
__device__ __forceinline__ bool has_bounded_logits(const Problem& problem, acc_t a) {
  return problem.own.rnorm && problem.other.rnorm && Math<acc_t>::abs(a) <= acc_t(kMostBase2Scale);
}

// Whether s_ij counts in the sums, given the ids of both (0 for all where there are none).
template <typename Problem>
__device__ __forceinline__ bool is_allowed(const Problem& problem, int64_t i, int64_t id_i, int64_t j,
                                           int64_t id_j) {
  const bool apart = id_i != id_j != problem.only_equal_ids;
  if (j >= problem.other.count) return false;
  if (i == j) return !problem.square && (problem.keep_diagonal || !problem.own.ids || apart);
  return !problem.own.ids || apart;
}

template <typename scalar_t, typename acc_t>
__device__ __forceinline__ int64_t id_of(const Side<scalar_t, acc_t>& side, int64_t index) {
  return side.ids && index < side.count ? side.ids[index] : 0;
}

// Ids of the columns of elements c[.][n][0] and c[.][n][1] of the walk's tile; 0 where there are none.
template <typename Shape, typename Engine, typename Problem>
__device__ __forceinline__ Pair<int64_t> column_ids(const TileWalk<Shape, Engine>& walk,
                                                    const Problem& problem, int n) {
  if (!problem.own.ids) return {{0, 0}};
  if constexpr (Shape::kColumnLabels) {
    return walk.column_labels(n);
  } else {
    const int64_t column = walk.column0() + fragment_column(threadIdx.x % kWarpSize, n, 0);
    return {{id_of(problem.other, column), id_of(problem.other, column + 1)}};
  }
}

// Sets the elements of a warp's part of the walk's tile that stay out of the sums to `value`.
template <typename Shape, typename Engine, typename acc_t, typename Problem>
__device__ __forceinline__ void exclude(Fragment<acc_t, Shape::kNTiles>& c, const Problem& problem,
                                        const TileWalk<Shape, Engine>& walk, acc_t value) {
  const auto& own = problem.own;
  const auto& other = problem.other;
  constexpr int kColumns = Shape::kWarpColumns;
  const int64_t row0 = walk.row0() + walk.warp_row(), column0 = walk.column0();
  const bool meets_diagonal = column0 < row0 + kWarpRows && row0 < column0 + kColumns;
  const bool on_diagonal = problem.square && meets_diagonal;
  const bool is_whole = column0 + kColumns <= other.count;
  if (!on_diagonal && !own.ids && is_whole) return;
  const int lane = threadIdx.x % kWarpSize;
  int64_t row_id[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) row_id[i] = id_of(own, row0 + fragment_row(lane, i / 2, i % 2 * 2));
  if constexpr (Shape::kColumnLabels) {
    if (is_whole && !meets_diagonal) {  // by ids alone
#pragma unroll
      for (int n = 0; n < Shape::kNTiles; ++n) {
        const Pair<int64_t> column_id = column_ids(walk, problem, n);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (row_id[i] != column_id.value[e] == problem.only_equal_ids) {
              c[i / 2][n][i % 2 * 2 + e] = value;
            }
          }
        }
      }
      return;
    }
  }
#pragma unroll
  for (int n = 0; n < Shape::kNTiles; ++n) {
    const Pair<int64_t> column_id = column_ids(walk, problem, n);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t column = column0 + fragment_column(lane, n, e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = row0 + fragment_row(lane, i / 2, i % 2 * 2);
        if (!is_allowed(problem, row, row_id[i], column, column_id.value[e])) {
          c[i / 2][n][i % 2 * 2 + e] = value;
        }
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

// The factor of row i where the exponents take |scale|: a negative scale turns the order of v round, and its
// sign goes here.
template <typename scalar_t, typename acc_t>
__device__ __forceinline__ acc_t signed_rnorm(const Side<scalar_t, acc_t>& own, int64_t i, acc_t scale) {
  const acc_t rnorm = own.rnorm && i < own.count ? own.rnorm[i] : acc_t(1);
  return scale < acc_t(0) ? -rnorm : rnorm;
}

// Writes the logits that the rows' positives name in a warp's part of a tile, at (row0, column0); v by
// logit_scale.
template <int kNTiles, typename acc_t, typename Problem>
__device__ __forceinline__ void store_positive_logits(const Fragment<acc_t, kNTiles>& c,
                                                      const Problem& problem, int64_t row0, int64_t column0,
                                                      double logit_scale, double* positive_logits) {
  for_each_positive(problem.own, row0, kWarpRows, problem.other, column0, kNTiles * 8, problem.P,
                    [&](int row, int column, int64_t k) __attribute__((always_inline)) {
                      if (!holds_element(row, column)) return;
                      positive_logits[(row0 + row) * problem.P + k] =
                          element<acc_t, kNTiles>(c, row, column) * logit_scale;
                    });
}

}  // namespace contrastive
}  // namespace ssl_kernels
