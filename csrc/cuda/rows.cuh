// Kernels over the rows of one operand, before and after the walks over tiles: norms and packed copies, the
// gradient through the norm, sums over rows.
#pragma once

#include <cstdint>

#include "device/math.cuh"
#include "device/warp.cuh"

namespace ssl_kernels {

constexpr int kRowWarps = 8;     // of kernels with one warp per row
constexpr int kBlockWarps = 32;  // of kernels that are one block
constexpr double kZeroRowRnorm = 1e11;  // half rows with a larger 1 / norm are zero

//   rnorm_i = 1 / max(|x_i|, 1e-12);
//   half_square_i = |x^_i|^2 / 2, x^_i = x_i, times rnorm_i where that is wanted;
//   packed_i = x_i, zero padded to `packed_width`
//
// One warp per row, acc_t throughout; null results are left out. The packed copy is made only for operands
// that are not 16-byte aligned rows with unit column stride. Traffic: reads N * D elements once, writes N
// acc_t each (and N * packed_width elements).
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    prepare_rows_kernel(const scalar_t* data, int64_t row_stride, int64_t column_stride, int64_t count,
                        int64_t D, bool vectorised, acc_t* rnorm, acc_t* half_square, scalar_t* packed,
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
  if (!rnorm && !half_square) return;
  sum = warp_sum(sum);
  if (lane != 0) return;
  acc_t factor = acc_t(1);
  if (rnorm) {
    const acc_t norm = Math<acc_t>::sqrt(sum);
    factor = acc_t(1) / (norm < Math<acc_t>::kNormEps ? Math<acc_t>::kNormEps : norm);
    rnorm[row] = factor;
  }
  if (half_square) half_square[row] = sum * factor * factor / 2;
}

// A matrix as a caller passed it.
template <typename scalar_t>
struct StridedRows {
  const scalar_t* data;
  int64_t row_stride, column_stride;
  __device__ __forceinline__ scalar_t at(int64_t row, int64_t d) const {
    return data[row * row_stride + d * column_stride];
  }
};

// dx_i from G_i, whose element d is g(d), and its dot with x^_i. For a whole warp, everything in acc_t.
//
//   dot_i = <x^_i, G_i>      dx_i = rnorm_i scale (G_i - x^_i dot_i), without the second term where |x_i| <
//   1e-12
//
// `grad` is null where only the dot is needed.
template <typename scalar_t, typename acc_t, typename grad_t, typename G>
__device__ __forceinline__ void finish_row(const StridedRows<scalar_t>& x, int64_t row, int64_t D,
                                           const acc_t* rnorm, const acc_t* scale, grad_t* grad, acc_t* dots,
                                           G g) {
  const int lane = threadIdx.x % kWarpSize;
  const acc_t factor = rnorm ? rnorm[row] : acc_t(1);
  auto x_hat = [&](int64_t d) { return to_acc(x.at(row, d)) * factor; };
  acc_t dot = acc_t(0);
  for (int64_t d = lane; d < D; d += kWarpSize) dot += x_hat(d) * g(d);
  dot = warp_sum(dot);
  if (lane == 0) dots[row] = dot;
  if (!grad) return;
  const bool projected = rnorm && factor < acc_t(1) / Math<acc_t>::kNormEps;
  const acc_t outer = *scale * factor;
  for (int64_t d = lane; d < D; d += kWarpSize) {
    grad[row * D + d] = from_acc<grad_t>(outer * (projected ? g(d) - x_hat(d) * dot : g(d)));
  }
}

// finish_row of G_i summed over its parts, (parts, count, partial_stride). One warp per row.
//
// Traffic: reads (parts acc_t + scalar_t) N D twice (the second time from cache) and 2 sectors per row, for
// half 3; writes N D grad_t and N acc_t in N sectors.
template <typename scalar_t, typename acc_t, typename grad_t>
__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    finish_rows_kernel(const acc_t* partial, int parts, int64_t partial_stride, StridedRows<scalar_t> x,
                       int64_t count, int64_t D, const acc_t* rnorm, const acc_t* scale,
                       const acc_t* coefficient_scale, grad_t* grad, acc_t* dots) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
  if (row >= count) return;
  const acc_t unscale = coefficient_scale ? acc_t(1) / *coefficient_scale : acc_t(1);
  finish_row(x, row, D, rnorm, scale, grad, dots, [&](int64_t d) {
    acc_t sum = acc_t(0);
    for (int part = 0; part < parts; ++part) sum += partial[(part * count + row) * partial_stride + d];
    return sum * unscale;
  });
}

// Whether an engine's coefficients are scaled before they are rounded.
template <typename Engine>
constexpr bool kScalesCoefficients = std::is_same_v<typename Engine::scalar_t, __half>;

// A power of two that brings the largest possible coefficient of a pass near 2^15, for half operands:
// bound = (constant + max |w_own| + max |w_other| + 2 P max |q|) * max rnorm_other over rows that are not
// zero. One block.
template <typename acc_t>
__global__ void __launch_bounds__(kBlockWarps* kWarpSize)
    coefficient_scale_kernel(acc_t constant, const acc_t* own_weight, int64_t own_count,
                             const acc_t* other_weight, const acc_t* other_rnorm, int64_t other_count,
                             const double* grad_positive_logits, int64_t positive_count, int64_t P,
                             acc_t* result) {
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
    const acc_t bound = (constant + own_bound + other_bound + 2 * acc_t(P) * positive_bound) *
                        (other_rnorm ? rnorm_bound : acc_t(1));
    int exponent = 0;
    if (bound > acc_t(0) && bound < infinity) frexp(bound, &exponent);
    *result = ldexp(acc_t(1), min(max(15 - exponent, -100), 100));
  }
}

// What a column's coefficients are multiplied by before they are rounded: its norm and, for half, a factor
// that brings their bound near 2^15. A zero row's 1e12 would overflow half, and multiplies zeros only.
template <bool kScaled, typename acc_t>
__device__ __forceinline__ Pair<acc_t> coefficient_factor(Pair<acc_t> rnorm, acc_t c_scale) {
  if constexpr (kScaled) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      rnorm.value[e] = rnorm.value[e] > acc_t(kZeroRowRnorm) ? acc_t(0) : rnorm.value[e] * c_scale;
    }
  }
  return rnorm;
}

// result = weight * sum of `count` numbers, in a fixed order. One block.
template <typename T, typename result_t>
__global__ void __launch_bounds__(kBlockWarps* kWarpSize)
    sum_rows_kernel(const T* values, int64_t count, T weight, result_t* result) {
  __shared__ T scratch[kBlockWarps];
  T sum = T(0);
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += values[i];
  sum = block_sum<kBlockWarps>(sum, scratch);
  if (threadIdx.x == 0) *result = static_cast<result_t>(weight * sum);
}

// results_i = sum of values_(part, i) over `parts` parts, in their order. One thread per row.
template <typename T>
__global__ void sum_parts_kernel(const T* values, int parts, int64_t count, T* results) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= count) return;
  T sum = T(0);
  for (int part = 0; part < parts; ++part) sum += values[part * count + row];
  results[row] = sum;
}

}  // namespace ssl_kernels
