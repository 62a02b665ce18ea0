// The forward of `contrastive`:
//
//   lse_i = log sum_{j allowed} exp(s_ij);   positive_logits_ik = s_{i, positives(i, k)}
//   both directions: also column_lse_j = log sum_{i allowed} exp(s_ij), from the same tiles
//
// Tiling: ReduceShape; every thread keeps the running maximum and sum of its share of 4 rows in registers,
//   and the lanes of a row meet once at the end. Positives are picked out of the tile by the one lane that
//   holds them. Several parts of the columns leave their maximum and sum in `partial`. Below, B = ceil(N /
//   128) blocks of rows, T = ceil(M / kBlockN) tiles, S = ceil(D / 128 bytes) steps. The first H of own rows
//   (kFwdHeldSteps) stay in registers.
// Both directions: every tile is reduced along its rows as well. The 8 lanes of a column share out its
//   maximum and sum, the warps merge theirs through shared memory with one barrier a tile more, and one
//   thread per column adds them to the block's sums in `column_partial`, (groups, M). A block (group, part)
//   walks its part of the columns for each of its group's blocks of rows in turn, so an entry of
//   column_partial has one owner and there are as many groups as fill the card beside 8 parts, not B.
// Products: 1 unit of 2 N M D flops, in both directions too: 256 B T S mma, each 16 x 8 by 32 bytes of depth.
//   One exponential per entry, also in both directions where the logits are bounded (has_bounded_logits),
//   else 2 there.
// Traffic, 32-byte sectors of global memory: operands 4 N S (times the parts, or T beyond the first H
//   steps where K < S - H) + 4 B M S, positives 32 B T P, column norms B T kBlockN / 8, row norms and scale
//   20 B; ids of columns B T kBlockN / 4, of rows 32 B T. Writes N (1 + P) doubles, or 2 N acc_t a part. Both
//   directions write 2 B M acc_t and read 2 (B - groups) M acc_t more.
// Memory: 2 N acc_t a part, and in both directions 2 M acc_t a group: on 132 multiprocessors at most 33
//   groups, 264 bytes per column, or less than 1 MB in all where T < 32 leaves fewer parts and so more groups
//   (twice that for double).
// Shared memory: K * 16 KB of own rows + 3 * kBlockN * (136 bytes + acc_t), 2 KB more in both
//   directions. No bank conflicts. Wavefronts of a tile and step: kBlockN for its copy (128 more with own
//   rows), reads of operands 384 on tensor cores, 256 in the first H steps but those of the first tile, 2560
//   by float FMA; and of a tile 66 for column norms, and 32 in both directions.
// Occupancy: 2 blocks of 128 threads per multiprocessor, at most 255 registers, on sm_80, sm_90 and sm_100.
// Numerics: products in scalar_t with acc_t accumulation, all else in acc_t, results in double. The maximum
//   of a column is that of the warp's 32 rows before any exponential of it is taken, then a running one as of
//   a row. Bounded logits need none: a column sums what the rows have, each times 2 to its row's shift.
#pragma once

#include "contrastive_additions.cuh"
#include "device/online_softmax.cuh"

namespace ssl_kernels {
namespace contrastive {

// Steps of own rows that registers hold on tensor cores: as many as ptxas takes without a spill.
template <typename Engine, bool kBothDirections>
constexpr int kFwdHeldSteps = !kBothDirections                         ? 2
                              : kAdds<Engine>                          ? 1
                              : sizeof(typename Engine::scalar_t) == 4 ? 0
                                                                       : 2;

template <typename Engine, bool kBothDirections>
struct FwdShape : ReduceShape<Engine, kFwdHeldSteps<Engine, kBothDirections>, 1, true> {
  using Base = ReduceShape<Engine, kFwdHeldSteps<Engine, kBothDirections>, 1, true>;
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

  // With kLeavesPowers 2^(a v) is left in the place of v, which has to be in the range of acc_t.
  template <int kNTiles, bool kLeavesPowers = false>
  __device__ __forceinline__ void add(
      std::conditional_t<kLeavesPowers, Fragment<acc_t, kNTiles>, const Fragment<acc_t, kNTiles>>& c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc_t largest = c[i / 2][0][i % 2 * 2];
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        largest = Math<acc_t>::max(largest, c[i / 2][n][i % 2 * 2]);
        largest = Math<acc_t>::max(largest, c[i / 2][n][i % 2 * 2 + 1]);
      }
      const acc_t shift = state[i].raise(largest, a);
      const acc_t power = kLeavesPowers ? Math<acc_t>::exp2(shift) : acc_t(1);
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const acc_t term = OnlineSoftmax<acc_t>::term(c[i / 2][n][i % 2 * 2 + e], a, shift);
          state[i].sum += term;
          if constexpr (kLeavesPowers) c[i / 2][n][i % 2 * 2 + e] = term * power;
        }
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
  // That it keeps: k = kKept g + {0 .. kKept - 1}, lane = 4 g + q.
  static constexpr int kKept = kCount / 8;
  static_assert(kKept * sizeof(Softmax) == 16);

  // Reduces x_k over the 8 lanes of its column, which halve their columns with each exchange: a lane has its
  // own in x[0 .. kKept - 1].
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
  static __device__ __forceinline__ void add(const Fragment<acc_t, Shape::kNTiles>& c, acc_t a,
                                             Softmax* exchange) {
    const int lane = threadIdx.x % kWarpSize;
    acc_t largest[kCount], sum[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      largest[k] = c[0][k / 2][k % 2];
#pragma unroll
      for (int i = 1; i < 4; ++i)
        largest[k] = Math<acc_t>::max(largest[k], c[i / 2][k / 2][i % 2 * 2 + k % 2]);
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
    store(largest, sum, exchange);
  }

  // The same of 2^(a v), with a maximum of 0.
  static __device__ __forceinline__ void add_powers(const Fragment<acc_t, Shape::kNTiles>& powers,
                                                    Softmax* exchange) {
    acc_t sum[kCount], zero[kCount] = {};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      sum[k] = powers[0][k / 2][k % 2];
#pragma unroll
      for (int i = 1; i < 4; ++i) sum[k] += powers[i / 2][k / 2][i % 2 * 2 + k % 2];
    }
    share_out(sum, [](acc_t x, acc_t y) { return x + y; });
    store(zero, sum, exchange);
  }

 private:
  static __device__ __forceinline__ void store(const acc_t (&largest)[kCount], const acc_t (&sum)[kCount],
                                               Softmax* exchange) {
    const int lane = threadIdx.x % kWarpSize, k0 = lane / 4 * kKept;
    Vector<acc_t> kept;  // as Softmax lies in memory
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      kept.value[2 * k] = largest[k];
      kept.value[2 * k + 1] = sum[k];
    }
    store_vector(exchange + fragment_column(lane, k0 / 2, k0 % 2), kept);
  }
};

// Sets the elements of a warp's part of a tile in rows from `rows` on to -inf: the sums of columns leave them
// out.
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

  const acc_t signed_scale = *problem.scale;
  const acc_t a = sum_base2_scale<kAdds<Engine>>(signed_scale);
  const bool one_exponential =
      kBothDirections && !kAdds<Engine> && has_bounded_logits(problem, a);
  const double logit_scale = kAdds<Engine>              ? Math<double>::kLn2
                             : signed_scale == acc_t(0) ? 0.0
                                                        : a * Math<double>::kLn2;

  int row_block = blockIdx.x, row_blocks_end = row_block + 1;
  if constexpr (kBothDirections) {
    const Split group(ceil_div(own.count, Shape::kBlockM), blockIdx.x, gridDim.x);
    row_block = static_cast<int>(group.begin);
    row_blocks_end = static_cast<int>(group.end);
  }
  // The last tile's barrier stands between the last reading of a block's operands and the next block's
  // copies.
  for (bool first_of_group = true; row_block < row_blocks_end; ++row_block, first_of_group = false) {
    TileWalk<Shape, Engine> walk(shared, own, other, {{other.rnorm}, other.ids}, problem.width,
                                 static_cast<int64_t>(row_block) * Shape::kBlockM);
    const int64_t warp_row0 = walk.row0() + walk.warp_row();
    auto* exchange = reinterpret_cast<Softmax*>(walk.row_terms());  // (kWarps, kBlockN)
    acc_t row_factor[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      row_factor[i] = signed_rnorm(own, warp_row0 + fragment_row(lane, i / 2, i % 2 * 2), signed_scale);
    }
    RowSums<acc_t> sums(a);
    RowAdditions<acc_t> additions[4];
    if constexpr (kAdds<Engine>) read_row_additions(problem, warp_row0, additions);

    for (walk.start(); walk.next();) {
      Fragment<acc_t, kNTiles> c;
      walk.products(c);
      walk.normalize(c, row_factor);
      if constexpr (kAdds<Engine>)
        scale_tile<kNTiles>(c, Math<acc_t>::abs(signed_scale) * Math<acc_t>::kLog2e);
      if (positive_logits) {
        store_positive_logits<kNTiles>(c, problem, warp_row0, walk.column0(), logit_scale, positive_logits);
      }
      if constexpr (kAdds<Engine>) exclude_above<kNTiles>(c, problem, warp_row0, walk.column0(), additions);
      exclude(c, problem, walk, -Math<acc_t>::infinity());
      if constexpr (kBothDirections) {
        exclude_rows_past_the_end<kNTiles>(c, own.count - warp_row0);
        auto* columns = exchange + threadIdx.x / kWarpSize * Shape::kBlockN;
        if constexpr (kAdds<Engine>) {
          Fragment<acc_t, kNTiles> of_columns;
          copy_with_row_bias<kNTiles>(c, additions, of_columns);
          ColumnSums<Shape>::add(of_columns, a, columns);
        } else if (one_exponential) {
          sums.template add<kNTiles, true>(c);
          ColumnSums<Shape>::add_powers(c, columns);
        } else {
          ColumnSums<Shape>::add(c, a, columns);
        }
      }
      if constexpr (kAdds<Engine>) add_column_bias<kNTiles>(c, problem.other_additions.bias, walk.column0());
      if (!one_exponential) sums.template add<kNTiles>(c);
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

// lse_i from the maxima and sums of `parts` parts, (parts, count), merged in their order: of rows or of
// columns. One thread each.
template <typename acc_t, bool kAdded>
__global__ void contrastive_merge_kernel(const OnlineSoftmax<acc_t>* partial, int parts, int64_t count,
                                         const acc_t* scale, double* lse) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= count) return;
  const acc_t a = sum_base2_scale<kAdded>(*scale);
  OnlineSoftmax<acc_t> state = partial[row];
  for (int part = 1; part < parts; ++part) {
    const OnlineSoftmax<acc_t> next = partial[part * count + row];
    state.merge(next.max, next.sum, a);
  }
  lse[row] = state.lse(a);
}

}  // namespace contrastive
}  // namespace ssl_kernels
