// Device code of `contrastive`. One side owns the rows of the similarity tiles, the other side is walked:
//
//   s_ij = scale * v_ij      v_ij = <x_i, y_j> * (rnorm_i * rnorm_j)      rnorm = 1 / max(|x|, 1e-12), or 1
//
// Rows are normalised by scaling the tile of raw products, so no normalised copy exists. In base 2, a =
// scale * log2(e) is rounded once and a * v enters every exponent as an exact product (fma), the same
// whichever side owns the rows, in forward and in backward.
//
// A block owns kBlockM rows of one side (blockIdx.x) and walks a part of the other side's rows (blockIdx.y,
// see Split) kBlockN at a time, each in steps of 128 bytes of D. The operand tiles of a step come through a
// ring of kStages buffers by cp.async, kStages - 1 steps ahead; each step opens with one wait and one
// barrier, which publish the step's tiles and say that the buffer loaded next is no longer read. The
// owner's tiles stay in shared memory after the first tile where all of D fits into kOwnerSlots steps;
// otherwise they come again with each tile.
#pragma once

#include <cstdint>

#include "device/online_softmax.cuh"
#include "device/tile.cuh"
#include "device/warp.cuh"

namespace ssl_kernels {
namespace contrastive {

constexpr int kStages = 3;
constexpr int kOwnerSlots = 3;
constexpr double kZeroRowRnorm = 1e11;  // half rows with a larger 1 / norm are zero

// One operand as the kernels read it: unit column stride, 16-byte aligned rows, width padded to 16 bytes.
template <typename scalar_t, typename acc_t>
struct Side {
  const scalar_t* data;
  int64_t stride;
  int64_t count;
  const acc_t* rnorm;        // null: not normalised
  const int64_t* ids;        // null: no exclusion by id
  const int64_t* positives;  // (count, P): rows of the other side; null: none of this side
  // Backward, see contrastive_terms_kernel; null where this side's sums have no gradient.
  const acc_t* base2_lse;
  const acc_t* weight;
};

template <typename scalar_t, typename acc_t>
struct Problem {
  Side<scalar_t, acc_t> own;
  Side<scalar_t, acc_t> other;
  int64_t width;  // D padded to 16 bytes
  const acc_t* scale;
  int64_t P;
  bool square;         // both sides are the same rows: (i, i) is left out
  bool keep_diagonal;  // (i, i) stays although its ids are equal
};

// Tiles [begin, end) of the other side that part `part` of `parts` walks.
struct Split {
  int64_t begin, end;
  __device__ Split(int64_t tiles, int part, int parts)
      : begin(tiles * part / parts), end(tiles * (part + 1) / parts) {}
};

__device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Whether s_ij counts in the sums, given the ids of both (0 for all where there are none).
template <typename scalar_t, typename acc_t>
__device__ __forceinline__ bool is_allowed(const Problem<scalar_t, acc_t>& problem, int64_t i, int64_t id_i,
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
template <int kNTiles, typename scalar_t, typename acc_t>
__device__ __forceinline__ void exclude(Fragment<acc_t, kNTiles>& c, const Problem<scalar_t, acc_t>& problem,
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
template <typename Operand, typename F>
__device__ __forceinline__ void for_each_positive(const Operand& from, int64_t source0, int sources,
                                                  const Operand& to, int64_t target0, int targets, int64_t P,
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

// ----------------------------------------------------------------------------------------------- preparation
//
//   rnorm_i = 1 / max(|x_i|, 1e-12);   packed_i = x_i, zero padded to `packed_width`
//
// One warp a row, acc_t throughout. The packed copy is made only for operands that are not 16-byte aligned
// rows with unit column stride. Traffic: reads N * D elements once, writes N acc_t (and N * packed_width
// elements).
constexpr int kRowWarps = 8;

template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    contrastive_prepare_kernel(const scalar_t* data, int64_t row_stride, int64_t column_stride, int64_t count,
                               int64_t D, bool vectorised, acc_t* rnorm, scalar_t* packed,
                               int64_t packed_width) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
  if (row >= count) return;
  const scalar_t* x = data + row * row_stride;
  acc_t sum = acc_t(0);
  if (vectorised) {
    constexpr int kSize = Vector<scalar_t>::kSize;
    for (int64_t d = lane * kSize; d < D; d += kWarpSize * kSize) {
      const auto vector = *reinterpret_cast<const Vector<scalar_t>*>(x + d);
#pragma unroll
      for (int e = 0; e < kSize; ++e) sum += to_acc(vector.value[e]) * to_acc(vector.value[e]);
    }
  } else {
    for (int64_t d = lane; d < packed_width; d += kWarpSize) {
      const scalar_t value = d < D ? x[d * column_stride] : from_acc<scalar_t>(acc_t(0));
      sum += to_acc(value) * to_acc(value);
      packed[row * packed_width + d] = value;
    }
  }
  if (!rnorm) return;
  const acc_t norm = Math<acc_t>::sqrt(warp_sum(sum));
  if (lane == 0) rnorm[row] = acc_t(1) / (norm < Math<acc_t>::kNormEps ? Math<acc_t>::kNormEps : norm);
}

// --------------------------------------------------------------------------------------------------- forward
//
//   lse_i = log sum_{j allowed} exp(s_ij);   positive_logits_ik = s_{i, positives(i, k)}
//
// Tiling: 4 warps, each 32 rows by all kBlockN columns of the tile; every thread keeps the running maximum
//   and sum of its share of 4 rows in registers, and the lanes of a row meet once at the end. Positives are
//   picked out of the tile by the one lane that holds them. Several parts of the columns leave their
//   maximum and sum in `partial`. Below, B = ceil(N / 128) blocks, T = ceil(M / kBlockN) tiles, S = ceil(D
//   / 128 bytes) steps.
// Products: 1 unit of 2 N M D flops, 256 B T S mma, each 16 x 8 by 32 bytes of depth.
// Traffic, 32-byte sectors of global memory: operands 4 N S (times T where S > 3) + 4 B M S, positives 32 B
//   T P, column norms B T kBlockN / 8, row norms and scale 20 B. Writes N (1 + P) doubles, or 2 N acc_t a
//   part.
// Shared memory: min(S, 3) * 16 KB of own rows + 3 * kBlockN * (128 bytes + acc_t). No bank conflicts.
//   Wavefronts of a tile and step: kBlockN for its copy (128 more with own rows), reads of operands 384 on
//   tensor cores, 2560 by float FMA; and of a tile 66 for column norms.
// Occupancy: 2 blocks of 128 threads per multiprocessor, at most 255 registers, on sm_80, sm_90 and sm_100.
// Numerics: products in scalar_t with acc_t accumulation, all else in acc_t, results in double.
template <typename Engine>
struct FwdShape {
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  static constexpr bool kDouble = sizeof(acc_t) == 8;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlockM = kWarps * kWarpRows;
  static constexpr int kBlockN = kDouble ? 32 : 64;
  static constexpr int kNTiles = kBlockN / 8;
  static constexpr int kChunk = kTileRowBytes / sizeof(scalar_t);
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kOwnBytes = kBlockM * kTileRowBytes;
  static constexpr int kOtherBytes = kBlockN * kTileRowBytes;

  static constexpr int shared_bytes(int own_slots) {
    return own_slots * kOwnBytes + kStages * (kOtherBytes + kBlockN * static_cast<int>(sizeof(acc_t)));
  }
};

template <typename Engine>
__global__ void __launch_bounds__(FwdShape<Engine>::kThreads, FwdShape<Engine>::kBlocksPerSm)
    contrastive_fwd_kernel(const Problem<typename Engine::scalar_t, typename Engine::acc_t> problem,
                           double* lse, double* positive_logits,
                           OnlineSoftmax<typename Engine::acc_t>* partial) {
  using Shape = FwdShape<Engine>;
  using acc_t = typename Engine::acc_t;
  using Softmax = OnlineSoftmax<acc_t>;
  constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kNTiles = Shape::kNTiles;

  const auto& own = problem.own;
  const auto& other = problem.other;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int chunks = static_cast<int>(ceil_div(problem.width, Shape::kChunk));
  const bool resident = chunks <= kOwnerSlots;
  const int own_slots = resident ? chunks : kOwnerSlots;

  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* own_tiles = shared;
  unsigned char* other_tiles = own_tiles + own_slots * Shape::kOwnBytes;
  acc_t* column_rnorm = reinterpret_cast<acc_t*>(other_tiles + kStages * Shape::kOtherBytes);

  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kBlockM;
  const Split split(ceil_div(other.count, kBlockN), blockIdx.y, gridDim.y);

  // Loads go through the same (tile, chunk) sequence as the products, kStages - 1 steps before them.
  int64_t load_tile_index = split.begin;
  int load_chunk = 0, load_stage = 0;
  auto load_next = [&] {
    if (load_tile_index < split.end) {
      const int64_t column0 = load_tile_index * kBlockN;
      const int64_t depth0 = static_cast<int64_t>(load_chunk) * Shape::kChunk;
      if (!resident || load_tile_index == split.begin) {
        const int slot = resident ? load_chunk : load_stage;
        load_tile<kBlockM, Shape::kThreads>(own_tiles + slot * Shape::kOwnBytes, own.data, own.stride,
                                            own.count, problem.width, row0, depth0);
      }
      load_tile<kBlockN, Shape::kThreads>(other_tiles + load_stage * Shape::kOtherBytes, other.data,
                                          other.stride, other.count, problem.width, column0, depth0);
      if (load_chunk == 0 && other.rnorm && threadIdx.x < kBlockN) {
        const int64_t j = column0 + threadIdx.x;
        const bool valid = j < other.count;
        copy_async<sizeof(acc_t)>(&column_rnorm[load_tile_index % kStages * kBlockN + threadIdx.x],
                                  other.rnorm + (valid ? j : 0), valid);
      }
      if (++load_chunk == chunks) {
        load_chunk = 0;
        ++load_tile_index;
      }
    }
    copy_async_commit();
    load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
  };

  // A negative scale turns the order of v round; its sign goes into the rows' factor.
  const acc_t signed_scale = *problem.scale;
  const acc_t a = Softmax::base2_scale(Math<acc_t>::abs(signed_scale));
  const double logit_scale = signed_scale == acc_t(0) ? 0.0 : a * Math<double>::kLn2;
  const int warp_row = warp * kWarpRows;
  acc_t row_factor[4];
  Softmax state[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = row0 + warp_row + fragment_row(lane, i / 2, i % 2 * 2);
    row_factor[i] = own.rnorm && row < own.count ? own.rnorm[row] : acc_t(1);
    if (signed_scale < acc_t(0)) row_factor[i] = -row_factor[i];
    state[i].clear();
  }

  for (int step = 0; step < kStages - 1; ++step) load_next();
  int stage = 0;
  for (int64_t tile = split.begin; tile < split.end; ++tile) {
    Fragment<acc_t, kNTiles> c;
    clear<acc_t, kNTiles>(c);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_async_wait<kStages - 2>();
      __syncthreads();
      load_next();
      Engine::template product_nt<kNTiles>(c, own_tiles + (resident ? chunk : stage) * Shape::kOwnBytes,
                                           warp_row, other_tiles + stage * Shape::kOtherBytes, 0);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    const int64_t column0 = tile * kBlockN;
    const acc_t* rnorm = column_rnorm + tile % kStages * kBlockN;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      Pair<acc_t> column_factor = {{acc_t(1), acc_t(1)}};
      if (other.rnorm) {
        column_factor = *reinterpret_cast<const Pair<acc_t>*>(rnorm + fragment_column(lane, n, 0));
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[m][n][e] *= row_factor[m * 2 + e / 2] * column_factor.value[e % 2];
      }
    }
    if (positive_logits) {
      for_each_positive(own, row0 + warp_row, kWarpRows, other, column0, kBlockN, problem.P,
                        [&](int row, int column, int64_t k) __attribute__((always_inline)) {
                          if (!holds_element(row, column)) return;
                          const acc_t v = element<acc_t, kNTiles>(c, row, column);
                          positive_logits[(row0 + warp_row + row) * problem.P + k] = v * logit_scale;
                        });
    }
    exclude<kNTiles>(c, problem, row0 + warp_row, column0, -Math<acc_t>::infinity());
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
        state[i].sum += Softmax::term(c[i / 2][n][i % 2 * 2], a, shift);
        state[i].sum += Softmax::term(c[i / 2][n][i % 2 * 2 + 1], a, shift);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      const acc_t other_max = __shfl_xor_sync(kAllLanes, state[i].max, offset);
      const acc_t other_sum = __shfl_xor_sync(kAllLanes, state[i].sum, offset);
      state[i].merge(other_max, other_sum, a);
    }
    const int64_t row = row0 + warp_row + fragment_row(lane, i / 2, i % 2 * 2);
    if (lane % 4 == 0 && row < own.count) {
      if (partial) {
        partial[blockIdx.y * own.count + row] = state[i];
      } else {
        lse[row] = state[i].lse(a);
      }
    }
  }
}

// lse_i from the maxima and sums of `parts` parts, (parts, N), merged in their order. One thread a row.
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
// Tiling: 8 warps, kWarpsM x kWarpsN, each 32 rows by kBlockN / kWarpsN columns of s. A tile is recomputed
//   in steps over all of D, its C rounded to scalar_t as an operand tile in shared memory, and multiplied
//   in steps over the block's slice of D (blockIdx.z, kSliceChunks steps); G stays in registers until the
//   end. The barrier of the next step also stands between writing C and reading it, and between reading it
//   and the next tile's writing. Below, B = ceil(N / kBlockM) blocks, T = ceil(M / kBlockN) tiles, S =
//   ceil(D / 128 bytes) steps, Z slices.
// Products: 2 units of 2 N M D flops; 1 + Z where D is wider than a slice, of 512 elements for 2-byte
//   types, 256 for float, 128 for double. B T S (1 + Z) kBlockM kBlockN / 32 mma.
// Traffic, 32-byte sectors of global memory: operands 4 N S Z (times T where S > 3) + 4 B M S (1 + Z); 64 B
//   T Z P for the positives of a side and Z N P for their gradients; row and column terms 3 B Z (kBlockM +
//   T kBlockN) / 8. Writes N D acc_t a part.
// Shared memory: (min(S, 3) + kBlockN / chunk) * kBlockM * 128 bytes, 3 * kBlockN * 128 bytes, terms; at
//   most 97.3 KB. No bank conflicts but two-way ones in TF32's reads of y for C y and in 4-byte types'
//   writes of C.
// Occupancy: one block of 256 threads per multiprocessor, at most 255 registers.
// Numerics: C in acc_t, rounded once to scalar_t. half scales C by a power of two that brings its bound
//   near 2^15.
template <typename Engine, int kWarpsM_, int kSliceChunks_>
struct BwdShape {
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  static constexpr int kWarps = 8;
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarps / kWarpsM;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlockM = kWarpsM * kWarpRows;
  static constexpr int kBlockN = sizeof(scalar_t) == 2 ? 64 : 32;
  static constexpr int kWarpColumns = kBlockN / kWarpsN;  // of s
  static constexpr int kNTiles = kWarpColumns / 8;
  static constexpr int kChunk = kTileRowBytes / sizeof(scalar_t);
  static constexpr int kSliceChunks = kSliceChunks_;
  static constexpr int kSlice = kSliceChunks * kChunk;
  static constexpr int kWarpDepth = kChunk / kWarpsN;  // columns of G per step
  static constexpr int kGTiles = kWarpDepth / 8;
  static constexpr int kPanels = kBlockN / kChunk;  // tiles of C side by side
  static constexpr bool kScaled = std::is_same_v<scalar_t, __half>;
  static constexpr int kOwnBytes = kBlockM * kTileRowBytes;
  static constexpr int kOtherBytes = kBlockN * kTileRowBytes;
  static_assert(kPanels * kChunk == kBlockN, "C is whole tiles");

  struct RowTerms {
    acc_t rnorm[kBlockM], base2_lse[kBlockM], weight[kBlockM];
  };
  struct ColumnTerms {
    acc_t rnorm[kBlockN], base2_lse[kBlockN], weight[kBlockN];
  };
  static constexpr int shared_bytes(int own_slots) {
    return (own_slots + kPanels) * kOwnBytes + kStages * kOtherBytes + static_cast<int>(sizeof(RowTerms)) +
           kStages * static_cast<int>(sizeof(ColumnTerms));
  }
};

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

template <typename Shape, typename Engine>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    contrastive_bwd_kernel(const Problem<typename Engine::scalar_t, typename Engine::acc_t> problem,
                           const double* grad_positive_logits,
                           const typename Engine::acc_t* coefficient_scale, typename Engine::acc_t* partial,
                           int64_t partial_stride) {
  using acc_t = typename Engine::acc_t;
  using RowTerms = typename Shape::RowTerms;
  using ColumnTerms = typename Shape::ColumnTerms;
  constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kNTiles = Shape::kNTiles;

  const auto& own = problem.own;
  const auto& other = problem.other;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warp_row = warp / Shape::kWarpsN * kWarpRows;
  const int warp_column = warp % Shape::kWarpsN * Shape::kWarpColumns;
  const int warp_depth = warp % Shape::kWarpsN * Shape::kWarpDepth;
  const int chunks = static_cast<int>(ceil_div(problem.width, Shape::kChunk));
  const int slice0 = blockIdx.z * Shape::kSliceChunks;
  const int slice_chunks = min(Shape::kSliceChunks, chunks - slice0);
  const bool resident = chunks <= kOwnerSlots;
  const int own_slots = resident ? chunks : kOwnerSlots;

  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* own_tiles = shared;
  unsigned char* other_tiles = own_tiles + own_slots * Shape::kOwnBytes;
  unsigned char* coefficients = other_tiles + kStages * Shape::kOtherBytes;
  RowTerms& row_terms = *reinterpret_cast<RowTerms*>(coefficients + Shape::kPanels * Shape::kOwnBytes);
  ColumnTerms* column_terms = reinterpret_cast<ColumnTerms*>(&row_terms + 1);

  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kBlockM;
  const Split split(ceil_div(other.count, kBlockN), blockIdx.y, gridDim.y);

  int64_t load_tile_index = split.begin;
  int load_step = 0, load_stage = 0;  // steps 0 .. chunks - 1 are for s, the others for G
  auto load_next = [&] {
    if (load_tile_index < split.end) {
      const int64_t column0 = load_tile_index * kBlockN;
      const bool for_s = load_step < chunks;
      const int64_t depth0 =
          static_cast<int64_t>(for_s ? load_step : slice0 + load_step - chunks) * Shape::kChunk;
      if (for_s && (!resident || load_tile_index == split.begin)) {
        const int slot = resident ? load_step : load_stage;
        load_tile<kBlockM, Shape::kThreads>(own_tiles + slot * Shape::kOwnBytes, own.data, own.stride,
                                            own.count, problem.width, row0, depth0);
      }
      load_tile<kBlockN, Shape::kThreads>(other_tiles + load_stage * Shape::kOtherBytes, other.data,
                                          other.stride, other.count, problem.width, column0, depth0);
      if (load_step == 0 && threadIdx.x < kBlockN) {
        ColumnTerms& terms = column_terms[load_tile_index % kStages];
        const int64_t j = column0 + threadIdx.x;
        const bool valid = j < other.count;
        auto load_term = [&](acc_t* to, const acc_t* from) {
          if (from) copy_async<sizeof(acc_t)>(to + threadIdx.x, from + (valid ? j : 0), valid);
        };
        load_term(terms.rnorm, other.rnorm);
        load_term(terms.base2_lse, other.base2_lse);
        load_term(terms.weight, other.weight);
      }
      if (++load_step == chunks + slice_chunks) {
        load_step = 0;
        ++load_tile_index;
      }
    }
    copy_async_commit();
    load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
  };

  // Published by the first step's barrier.
  for (int r = threadIdx.x; r < kBlockM; r += Shape::kThreads) {
    const int64_t i = row0 + r;
    const bool valid = i < own.count;
    row_terms.rnorm[r] = valid && own.rnorm ? own.rnorm[i] : acc_t(1);
    row_terms.base2_lse[r] = valid && own.base2_lse ? own.base2_lse[i] : Math<acc_t>::infinity();
    row_terms.weight[r] = valid && own.base2_lse ? own.weight[i] : acc_t(0);
  }

  const acc_t a = *problem.scale * Math<acc_t>::kLog2e;
  const acc_t c_scale = Shape::kScaled ? *coefficient_scale : acc_t(1);
  Fragment<acc_t, Shape::kGTiles> g[Shape::kSliceChunks];
#pragma unroll
  for (int slice = 0; slice < Shape::kSliceChunks; ++slice) clear<acc_t, Shape::kGTiles>(g[slice]);

  for (int step = 0; step < kStages - 1; ++step) load_next();
  int stage = 0;
  for (int64_t tile = split.begin; tile < split.end; ++tile) {
    Fragment<acc_t, kNTiles> c;
    clear<acc_t, kNTiles>(c);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_async_wait<kStages - 2>();
      __syncthreads();
      load_next();
      Engine::template product_nt<kNTiles>(c, own_tiles + (resident ? chunk : stage) * Shape::kOwnBytes,
                                           warp_row, other_tiles + stage * Shape::kOtherBytes, warp_column);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    const int64_t column0 = tile * kBlockN + warp_column;
    const ColumnTerms& terms = column_terms[tile % kStages];
    acc_t row_factor[4], row_lse[4], row_weight[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = warp_row + fragment_row(lane, i / 2, i % 2 * 2);
      row_factor[i] = row_terms.rnorm[r];
      row_lse[i] = row_terms.base2_lse[r];
      row_weight[i] = row_terms.weight[r];
    }
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const int column = fragment_column(lane, n, 0);
      auto load_pair = [&](const acc_t* values) {
        return *reinterpret_cast<const Pair<acc_t>*>(values + warp_column + column);
      };
      Pair<acc_t> column_factor = {{acc_t(1), acc_t(1)}};
      if (other.rnorm) column_factor = load_pair(terms.rnorm);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          c[m][n][e] *= row_factor[m * 2 + e / 2] * column_factor.value[e % 2];
        }
      }
      acc_t coefficient[2][4] = {};
      if (own.base2_lse) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = m * 2 + e / 2;
            coefficient[m][e] =
                row_weight[i] * Math<acc_t>::exp2(Math<acc_t>::fma(c[m][n][e], a, -row_lse[i]));
          }
        }
      }
      if (other.base2_lse) {
        const Pair<acc_t> base2_lse = load_pair(terms.base2_lse), weight = load_pair(terms.weight);
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
    exclude<kNTiles>(c, problem, row0 + warp_row, column0, acc_t(0));
    if (grad_positive_logits && own.positives) {
      for_each_positive(
          own, row0 + warp_row, kWarpRows, other, column0, Shape::kWarpColumns, problem.P,
          [&](int row, int column, int64_t k) __attribute__((always_inline)) {
            const acc_t q = static_cast<acc_t>(grad_positive_logits[(row0 + warp_row + row) * problem.P + k]);
            if (holds_element(row, column)) add_to_element<acc_t, kNTiles>(c, row, column, q);
          });
    }
    if (grad_positive_logits && other.positives) {
      for_each_positive(other, column0, Shape::kWarpColumns, own, row0 + warp_row, kWarpRows, problem.P,
                        [&](int column, int row, int64_t k) __attribute__((always_inline)) {
                          const acc_t q =
                              static_cast<acc_t>(grad_positive_logits[(column0 + column) * problem.P + k]);
                          if (holds_element(row, column)) add_to_element<acc_t, kNTiles>(c, row, column, q);
                        });
    }
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const int column = warp_column + fragment_column(lane, n, 0);
      Pair<acc_t> factor = {{acc_t(1), acc_t(1)}};
      if (other.rnorm) factor = *reinterpret_cast<const Pair<acc_t>*>(terms.rnorm + column);
      if constexpr (Shape::kScaled) {
        // A zero row's 1e12 would overflow half, and multiplies zeros only.
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          factor.value[e] = factor.value[e] > acc_t(kZeroRowRnorm) ? acc_t(0) : factor.value[e] * c_scale;
        }
      }
      unsigned char* panel = coefficients + column / Shape::kChunk * Shape::kOwnBytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Engine::store_operands(panel, warp_row + fragment_row(lane, i / 2, i % 2 * 2), column % Shape::kChunk,
                               c[i / 2][n][i % 2 * 2] * factor.value[0],
                               c[i / 2][n][i % 2 * 2 + 1] * factor.value[1]);
      }
    }

#pragma unroll
    for (int slice = 0; slice < Shape::kSliceChunks; ++slice) {
      if (slice < slice_chunks) {
        copy_async_wait<kStages - 2>();
        __syncthreads();
        load_next();
#pragma unroll
        for (int panel = 0; panel < Shape::kPanels; ++panel) {
          Engine::template product_nn<Shape::kGTiles>(g[slice], coefficients + panel * Shape::kOwnBytes,
                                                      warp_row, other_tiles + stage * Shape::kOtherBytes,
                                                      panel * Shape::kChunk, warp_depth);
        }
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
    }
  }

#pragma unroll
  for (int slice = 0; slice < Shape::kSliceChunks; ++slice) {
#pragma unroll
    for (int n = 0; n < Shape::kGTiles; ++n) {
      const int64_t d =
          static_cast<int64_t>(slice0 + slice) * Shape::kChunk + warp_depth + fragment_column(lane, n, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = row0 + warp_row + fragment_row(lane, i / 2, i % 2 * 2);
        if (row < own.count && d < problem.width) {
          store_pair(partial + (blockIdx.y * own.count + row) * partial_stride + d,
                     g[slice][i / 2][n][i % 2 * 2], g[slice][i / 2][n][i % 2 * 2 + 1]);
        }
      }
    }
  }
}

// A power of two that brings the largest possible coefficient of a pass near 2^15, for half operands:
// bound = (max |w_own| + max |w_other| + 2 P max |q|) * max rnorm_other over rows that are not zero. One
// block.
constexpr int kBlockWarps = 32;

template <typename acc_t>
__global__ void __launch_bounds__(kBlockWarps* kWarpSize)
    contrastive_coefficient_scale_kernel(const acc_t* own_weight, int64_t own_count,
                                         const acc_t* other_weight, const acc_t* other_rnorm,
                                         int64_t other_count, const double* grad_positive_logits,
                                         int64_t positive_count, int64_t P, acc_t* result) {
  __shared__ acc_t scratch[4][kBlockWarps];
  const acc_t infinity = Math<acc_t>::infinity();
  auto largest = [&](const auto* values, int64_t count, acc_t limit, acc_t* part) {
    acc_t x = acc_t(0);
    if (values) {
      for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        const acc_t value = Math<acc_t>::abs(static_cast<acc_t>(values[i]));
        if (value < limit) x = Math<acc_t>::max(x, value);
      }
    }
    return block_max<kBlockWarps>(x, part);
  };
  const acc_t own_bound = largest(own_weight, own_count, infinity, scratch[0]);
  const acc_t other_bound = largest(other_weight, other_count, infinity, scratch[1]);
  const acc_t positive_bound = largest(grad_positive_logits, positive_count, infinity, scratch[2]);
  const acc_t rnorm_bound = largest(other_rnorm, other_count, acc_t(kZeroRowRnorm), scratch[3]);
  if (threadIdx.x == 0) {
    const acc_t bound =
        (own_bound + other_bound + 2 * acc_t(P) * positive_bound) * (other_rnorm ? rnorm_bound : acc_t(1));
    int exponent = 0;
    if (bound > acc_t(0) && bound < infinity) frexp(bound, &exponent);
    *result = ldexp(acc_t(1), min(max(15 - exponent, -100), 100));
  }
}

// dx_i from the parts of G_i, and its dot with x^_i. One warp a row, everything in acc_t.
//
//   dot_i = <x^_i, G_i>      dx_i = rnorm_i scale (G_i - x^_i dot_i), without the second term where |x_i| <
//   1e-12
//
// Traffic: reads (parts acc_t + scalar_t) N D twice (the second time from cache), writes N D scalar_t and N
// acc_t.
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    contrastive_finish_kernel(const acc_t* partial, int parts, int64_t partial_stride, const scalar_t* data,
                              int64_t row_stride, int64_t column_stride, int64_t count, int64_t D,
                              const acc_t* rnorm, const acc_t* scale, const acc_t* coefficient_scale,
                              scalar_t* grad, acc_t* dots) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
  if (row >= count) return;
  const acc_t unscale = coefficient_scale ? acc_t(1) / *coefficient_scale : acc_t(1);
  const acc_t factor = rnorm ? rnorm[row] : acc_t(1);
  auto x_hat = [&](int64_t d) { return to_acc(data[row * row_stride + d * column_stride]) * factor; };
  auto g = [&](int64_t d) {
    acc_t sum = acc_t(0);
    for (int part = 0; part < parts; ++part) sum += partial[(part * count + row) * partial_stride + d];
    return sum * unscale;
  };
  acc_t dot = acc_t(0);
  for (int64_t d = lane; d < D; d += kWarpSize) dot += x_hat(d) * g(d);
  dot = warp_sum(dot);
  if (lane == 0) dots[row] = dot;
  if (!grad) return;
  const bool projected = rnorm && factor < acc_t(1) / Math<acc_t>::kNormEps;
  const acc_t outer = *scale * factor;
  for (int64_t d = lane; d < D; d += kWarpSize) {
    grad[row * D + d] = from_acc<scalar_t>(outer * (projected ? g(d) - x_hat(d) * dot : g(d)));
  }
}

// grad_scale = weight * sum of the rows' dots, in a fixed order. One block.
template <typename acc_t>
__global__ void __launch_bounds__(kBlockWarps* kWarpSize)
    contrastive_grad_scale_kernel(const acc_t* dots, int64_t count, acc_t weight, acc_t* grad_scale) {
  __shared__ acc_t scratch[kBlockWarps];
  acc_t sum = acc_t(0);
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += dots[i];
  sum = block_sum<kBlockWarps>(sum, scratch);
  if (threadIdx.x == 0) *grad_scale = weight * sum;
}

}  // namespace contrastive
}  // namespace ssl_kernels
