// The forward of `contrastive` that keeps the expectation of the columns, and the backward from it:
//
//   lse_i and positive_logits_ik as the forward;
//   E_i = sum_j p_ij y^_j,  p_ij = exp(s_ij - lse_i) if allowed
//
// Attention with V = K: where only the rows need a gradient, dx^_i = scale (g_i E_i + sum_k q_ik y^_idx(i,k))
// needs no second walk.
//
// Tiling: ProductShape. Every row has one running maximum for all warps that share it, exchanged through
//   shared memory with one barrier a tile more; the sum stays with the lanes, and G_i = sum_j 2^(a v_ij -
//   shift_i) rnorm_j y_j is scaled down where the maximum rises. A part leaves maximum, sum and G_i;
//   contrastive_expectation_merge_kernel makes lse_i and E_i of them. B, T, S and Z as in the backward.
// Products: 2 units of 2 N M D flops, 1 + Z where D is wider than a slice. As many mma as the backward.
// Traffic, 32-byte sectors of global memory: operands 4 N S Z (times T where K < S) + 4 B M S (1 + Z),
//   positives 32 B T P for each warp that shares a row, column norms B Z T kBlockN / 8, row norms B Z kBlockM
//   / 8. Writes N D + 2 N acc_t a part. Columns of 2 bytes beside float rows are widened in the block: half
//   of their sectors.
// Memory: the parts' sums, 64 KB for each block of 128 rows by 128 features: 8.7 MB for 256 rows of 128 on
//   132 multiprocessors, whatever M. That is what a card that is full holds in registers. Fewer parts would
//   leave multiprocessors idle (2 MB: 15 parts of 2 row blocks, 30 of 132 busy); blocks of fewer rows would
//   read the columns from L2 as much more often (2 MB: blocks of 16 rows, 8 times the traffic for the same
//   products).
// Shared memory: (K + kBlockN / chunk) * kBlockM * 128 bytes, 3 * kBlockN * (136 bytes + acc_t),
//   of double 8 less, norms and maxima of the rows. No bank conflicts but those of the backward.
// Occupancy: one block of 256 threads per multiprocessor, at most 255 registers.
// Numerics: the exponentials in acc_t, rounded once to scalar_t for their product, not for their sum. half
//   scales them by a power of two that brings their product with the norms near 2^15.
#pragma once

#include "contrastive_additions.cuh"
#include "device/online_softmax.cuh"

namespace ssl_kernels {
namespace contrastive {

// Beside sums of doubles no registers are left for ids in shared memory.
template <typename Engine, int kWarpsM, int kSliceChunks>
struct ExpectationShape : ProductShape<Engine, kWarpsM, kSliceChunks, 1, 1 + 8 / kWarpsM,
                                       sizeof(typename Engine::acc_t) == 4> {
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
  TileWalk<Shape, Engine> walk(shared, own, other, {{other.rnorm}, other.ids}, problem.width);
  const int64_t warp_row0 = walk.row0() + walk.warp_row();
  acc_t* row_factors = walk.row_terms();
  acc_t* exchange = row_factors + kBlockM;  // (kWarpsN, kBlockM)

  const acc_t signed_scale = *problem.scale;
  const acc_t a = sum_base2_scale<kAdds<Engine>>(signed_scale);
  const double logit_scale = kAdds<Engine>              ? Math<double>::kLn2
                             : signed_scale == acc_t(0) ? 0.0
                                                        : a * Math<double>::kLn2;
  const acc_t c_scale = Shape::kScaled ? *coefficient_scale : acc_t(1);
  const bool first_slice = blockIdx.z == 0;
  for (int r = threadIdx.x; r < kBlockM; r += Shape::kThreads) {
    row_factors[r] = signed_rnorm(own, walk.row0() + r, signed_scale);
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
    if constexpr (kAdds<Engine>) scale_tile<kNTiles>(c, Math<acc_t>::abs(signed_scale) * Math<acc_t>::kLog2e);
    if (positive_logits && first_slice) {
      store_positive_logits<kNTiles>(c, problem, warp_row0, walk.column0(), logit_scale, positive_logits);
    }
    if constexpr (kAdds<Engine>) {
      RowAdditions<acc_t> additions[4];
      read_row_additions(problem, warp_row0, additions);
      exclude_above<kNTiles>(c, problem, warp_row0, walk.column0(), additions);
    }
    exclude(c, problem, walk, -Math<acc_t>::infinity());
    if constexpr (kAdds<Engine>) add_column_bias<kNTiles>(c, problem.other_additions.bias, walk.column0());

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

// lse_i and E_i from the parts, merged in their order; 0 where nothing was allowed. One warp per row.
//
// Traffic: reads parts N (D acc_t and 2 sectors), 1 sector a row of scale, for half 2; writes N D acc_t and N
// doubles, of which each is a sector of its own.
template <typename acc_t, bool kAdded>
__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    contrastive_expectation_merge_kernel(const OnlineSoftmax<acc_t>* partial_sums, const acc_t* partial,
                                         int parts, int64_t partial_stride, int64_t count, int64_t D,
                                         const acc_t* scale, const acc_t* coefficient_scale, double* lse,
                                         acc_t* expectation) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
  if (row >= count) return;
  const acc_t a = sum_base2_scale<kAdded>(*scale);
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
    weight[part] =
        factor * Math<acc_t>::exp2(Math<acc_t>::mul(a, partial_sums[part * count + row].max) - shift);
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
// One warp per row, everything in acc_t. Traffic: reads N D acc_t, N D (1 + P) scalar_t and 3 sectors for
// each positive and 32 features twice (the second time from cache), 3 sectors per row; writes N D scalar_t
// and N acc_t in N sectors.
template <typename scalar_t, typename acc_t, typename other_t>
__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    contrastive_expectation_bwd_kernel(const acc_t* expectation, StridedRows<scalar_t> rows,
                                       const acc_t* row_rnorm, StridedRows<other_t> columns,
                                       const acc_t* column_rnorm, int64_t N, int64_t M, int64_t D,
                                       const int64_t* positives, int64_t P, const double* grad_lse,
                                       const double* grad_positive_logits, const acc_t* scale, scalar_t* grad,
                                       acc_t* dots) {
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
