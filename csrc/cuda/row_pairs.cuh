// Device code of `row_pairs`.
//
//   u_k = y^_k (product) or x^ - y^_k (distance), y_1 = y, y_2 = z if there is one
//   m_k = <u_k, x^> or |u_k|      value = m_1 - m_2      p_k = <u_k, x^>
// Backward, with w_1 = g, w_2 = -g, for the distance over m_k, 0 where that is 0:
//   dx = r_x (sum_k w_k u_k - (sum_k w_k p_k) x^)
//   dy_k = r_k w_k (x^ - p_k y^_k), or -r_k w_k (u_k - (p_k - m_k^2) y^_k)
//   without the term along the row where that is not normalised, or shorter than 1e-12 and only scaled.
//
// Tiling: one warp per row, 8 rows per block; one block per row where a row does not fit the registers of a
//   warp. Each thread holds its part of the operands, 16 bytes per load where addresses allow, for the
//   norms and then for the pairs. The backward has what was summed in `saved` and no reduction.
// Traffic: forward reads (1 + pairs) N D elements, writes N doubles and 4 pairs N acc_t; backward reads all
//   of these once and writes the gradients that are needed once. Rows wider than 4096 (float64: 2048) are
//   read twice by the forward if they are normalised, the second time from cache. No atomics; shared memory
//   only for a block's sums.
// Numerics: in acc_t. x^ and y^_k are rounded before they are subtracted, so equal rows have the distance 0.
//   Gradients are rounded once.
#pragma once

#include <cstdint>

#include "device/math.cuh"
#include "device/warp.cuh"

namespace ssl_kernels {
namespace row_pairs {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

template <typename scalar_t>
using acc_t_of = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// What the forward keeps of each pair of rows: r_x, r_k, m_k, p_k.
template <typename acc_t>
struct alignas(16) Saved {
  acc_t x_rnorm, y_rnorm, measure, projection;
};

template <typename scalar_t>
struct Operands {
  const scalar_t* data[3];
  int64_t row_stride[3], column_stride[3];
};

// Which of a row's elements a thread of a team has: of each of its chunks kSize, neighbours if they are
// loaded together.
template <typename scalar_t, bool kVectors>
struct Walk {
  static constexpr int kSize = Vector<scalar_t>::kSize;
  int thread, team;

  __device__ __forceinline__ int64_t index(int64_t base, int chunk, int e) const {
    if constexpr (kVectors) return base + (static_cast<int64_t>(chunk) * team + thread) * kSize + e;
    else return base + (static_cast<int64_t>(chunk) * kSize + e) * team + thread;
  }

  // Zeros outside of the row.
  __device__ __forceinline__ Vector<scalar_t> load(const scalar_t* row, int64_t stride, int64_t base,
                                                   int chunk, int64_t D) const {
    union {
      uint4 bits;
      Vector<scalar_t> vector;
    } loaded = {make_uint4(0, 0, 0, 0)};
    if constexpr (kVectors) {
      const int64_t d = index(base, chunk, 0);
      if (d < D) loaded.bits = *reinterpret_cast<const uint4*>(row + d);
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const int64_t d = index(base, chunk, e);
        if (d < D) loaded.vector.value[e] = row[d * stride];
      }
    }
    return loaded.vector;
  }

  __device__ __forceinline__ void store(scalar_t* row, const acc_t_of<scalar_t> (&x)[kSize], int64_t base,
                                        int64_t D) const {
    union {
      uint4 bits;
      Vector<scalar_t> vector;
    } rounded;
#pragma unroll
    for (int e = 0; e < kSize; ++e) rounded.vector.value[e] = from_acc<scalar_t>(x[e]);
    if constexpr (kVectors) {
      const int64_t d = index(base, 0, 0);
      if (d < D) *reinterpret_cast<uint4*>(row + d) = rounded.bits;
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const int64_t d = index(base, 0, e);
        if (d < D) row[d] = rounded.vector.value[e];
      }
    }
  }
};

// Over a team that is a warp or the block, for all its threads, in a fixed order. `scratch` holds kWarps
// values.
template <typename T>
__device__ __forceinline__ T team_sum(T x, int team, T* scratch) {
  x = warp_sum(x);
  if (team == kWarpSize) return x;
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  T sum = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) sum += scratch[warp];
  return sum;
}

template <typename scalar_t, int kPairs, bool kVectors, int kChunks>
__global__ void __launch_bounds__(kThreads, 2)
    row_pairs_fwd_kernel(Operands<scalar_t> operands, int64_t N, int64_t D, int team, bool normalize,
                         bool distance, double* values, Saved<acc_t_of<scalar_t>>* saved) {
  using acc_t = acc_t_of<scalar_t>;
  __shared__ acc_t scratch[kWarps];
  const Walk<scalar_t, kVectors> walk{static_cast<int>(threadIdx.x) % team, team};
  constexpr int kSize = walk.kSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / team) + threadIdx.x / team;
  if (row >= N) return;
  const int64_t step = static_cast<int64_t>(kChunks) * kSize * team;
  const bool held = D <= step;
  Vector<scalar_t> part[1 + kPairs][kChunks];
  const auto load = [&](int64_t base) {
#pragma unroll
    for (int k = 0; k <= kPairs; ++k) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        part[k][c] =
            walk.load(operands.data[k] + row * operands.row_stride[k], operands.column_stride[k], base, c, D);
      }
    }
  };
  if (held) load(0);

  acc_t rnorm[1 + kPairs];
#pragma unroll
  for (int k = 0; k <= kPairs; ++k) rnorm[k] = acc_t(1);
  if (normalize) {
    acc_t squares[1 + kPairs] = {};
    for (int64_t base = 0; base < D; base += step) {
      if (!held) load(base);
#pragma unroll
      for (int k = 0; k <= kPairs; ++k) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
#pragma unroll
          for (int e = 0; e < kSize; ++e) {
            const acc_t value = to_acc(part[k][c].value[e]);
            squares[k] += value * value;
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k <= kPairs; ++k) {
      const acc_t norm = Math<acc_t>::sqrt(team_sum(squares[k], team, scratch));
      rnorm[k] = acc_t(1) / (norm < Math<acc_t>::kNormEps ? Math<acc_t>::kNormEps : norm);
    }
  }

  acc_t squares[kPairs] = {}, projections[kPairs] = {};
  for (int64_t base = 0; base < D; base += step) {
    if (!held) load(base);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const acc_t x = Math<acc_t>::mul(rnorm[0], to_acc(part[0][c].value[e]));
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
          const acc_t y = Math<acc_t>::mul(rnorm[1 + k], to_acc(part[1 + k][c].value[e]));
          const acc_t u = distance ? x - y : y;
          squares[k] += u * u;
          projections[k] += u * x;
        }
      }
    }
  }
  double value = 0;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const acc_t projection = team_sum(projections[k], team, scratch);
    acc_t measure = projection;
    if (distance) measure = Math<acc_t>::sqrt(team_sum(squares[k], team, scratch));
    value += k ? -static_cast<double>(measure) : static_cast<double>(measure);
    if (walk.thread == 0) saved[row * kPairs + k] = {rnorm[0], rnorm[1 + k], measure, projection};
  }
  if (walk.thread == 0) values[row] = value;
}

// Null gradients are left out.
template <typename scalar_t>
struct Gradients {
  scalar_t* data[3];
};

template <typename scalar_t, int kPairs, bool kVectors>
__global__ void __launch_bounds__(kThreads, 2)
    row_pairs_bwd_kernel(Operands<scalar_t> operands, int64_t N, int64_t D, int team, bool normalize,
                         bool distance, const double* grad_values, const Saved<acc_t_of<scalar_t>>* saved,
                         Gradients<scalar_t> grads) {
  using acc_t = acc_t_of<scalar_t>;
  const Walk<scalar_t, kVectors> walk{static_cast<int>(threadIdx.x) % team, team};
  constexpr int kSize = walk.kSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / team) + threadIdx.x / team;
  if (row >= N) return;

  // dx = r_x (sum_k w_k u_k - along_x x^),  dy_k = factor_k (x^ or u_k - along_k y^_k)
  const acc_t clamped = acc_t(1) / Math<acc_t>::kNormEps, g = static_cast<acc_t>(grad_values[row]);
  acc_t x_rnorm = acc_t(1), along_x = acc_t(0);
  acc_t y_rnorm[kPairs], weight[kPairs], factor[kPairs], along[kPairs];
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const Saved<acc_t> pair = saved[row * kPairs + k];
    x_rnorm = pair.x_rnorm;
    y_rnorm[k] = pair.y_rnorm;
    weight[k] = k ? -g : g;
    if (distance) weight[k] = pair.measure == acc_t(0) ? acc_t(0) : weight[k] / pair.measure;
    along_x += weight[k] * pair.projection;
    factor[k] = (distance ? -weight[k] : weight[k]) * y_rnorm[k];
    along[k] = distance ? pair.projection - pair.measure * pair.measure : pair.projection;
    if (!normalize || !(y_rnorm[k] < clamped)) along[k] = acc_t(0);
  }
  if (!normalize || !(x_rnorm < clamped)) along_x = acc_t(0);

  for (int64_t base = 0; base < D; base += static_cast<int64_t>(kSize) * team) {
    Vector<scalar_t> part[1 + kPairs];
#pragma unroll
    for (int k = 0; k <= kPairs; ++k) {
      part[k] =
          walk.load(operands.data[k] + row * operands.row_stride[k], operands.column_stride[k], base, 0, D);
    }
    acc_t dx[kSize], dy[kPairs][kSize];
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const acc_t x = Math<acc_t>::mul(x_rnorm, to_acc(part[0].value[e]));
      acc_t sum = acc_t(0);
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        const acc_t y = Math<acc_t>::mul(y_rnorm[k], to_acc(part[1 + k].value[e]));
        const acc_t u = distance ? x - y : y;
        sum += weight[k] * u;
        dy[k][e] = factor[k] * ((distance ? u : x) - along[k] * y);
      }
      dx[e] = x_rnorm * (sum - along_x * x);
    }
    if (grads.data[0]) walk.store(grads.data[0] + row * D, dx, base, D);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (grads.data[1 + k]) walk.store(grads.data[1 + k] + row * D, dy[k], base, D);
    }
  }
}

}  // namespace row_pairs
}  // namespace ssl_kernels
