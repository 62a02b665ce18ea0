// Device code of `mixup_cross_entropy`. e is the label smoothing, w the classes' weights (1 without), y a
// row's class, y' its partner's, [y] whether a class is none to ignore:
//   lse_i  = log sum_c exp z_ic
//   a_i = (1 - e) lam_i [y_i] w_y,  b_i = (1 - e) (1 - lam_i) [y'_i] w_y',  s_i = e / C (lam_i [y_i] + (1 -
//   lam_i) [y'_i]) loss_i = m_i lse_i - a_i z_iy - b_i z_iy' - s_i sum_c w_c z_ic,  m_i = a_i + b_i + s_i
//   sum_c w_c dz_ic  = g_i (m_i exp(z_ic - lse_i) - s_i w_c - a_i [c = y] - b_i [c = y'])
//   counted_i = lam_i [y_i] w_y + (1 - lam_i) [y'_i] w_y'
//
// Tiling: kWarps warps own a row (1: four rows per block; 8: one) and read it 16 bytes per lane, kBatch
//   accesses in flight; the elements before the first 16-byte boundary and after the last one by one.
//   Maximum and sum of each lane are merged in registers, those of warps in shared memory. kWeighted: with
//   weights and smoothing.
// Traffic: forward reads N C elements and two more sectors per row; backward reads N C and writes N C.
//   kWeighted: and C weights per row, from the caches.
// Numerics: exponentials and sums in acc_t, of z less the running maximum, or of z less lse in two parts, so
//   that large logits cost no digits; loss and lse in float64. NaN propagates, except out of a row of which
//   nothing counts. A weight of 0 leaves its logit out. Without weights m_i is 1 exactly where both classes
//   count.
#pragma once

#include "device/vector_access.cuh"
#include "device/warp.cuh"

namespace ssl_kernels {
namespace mixing {

constexpr int kBatch = 4;
constexpr int kRowsOfWarps = 4;  // rows of a block where a warp owns one

template <int kWarps>
constexpr int kCrossEntropyThreads = kWarpSize* (kWarps == 1 ? kRowsOfWarps : kWarps);

template <typename scalar_t, typename acc_t>
struct MixedTargets {
  const scalar_t* logits;
  int64_t row_stride;
  int64_t N, C;
  const int64_t* target;
  const int64_t* partner;
  int64_t partner_stride;
  bool partner_is_class;
  int64_t ignore_index;
  const acc_t* lam;
  int64_t lam_stride;
  double smoothing;
  const acc_t* weight;
  const double* weight_sum;

  // What a row's loss is made of. A class that is to be ignored or out of range has no weight.
  struct Row {
    int64_t own, partner;
    double own_weight, partner_weight;  // a and b
    double spread;                      // s
    double mass;                        // m
    double counted;
    __device__ __forceinline__ bool counts() const {
      return own_weight != 0 || partner_weight != 0 || spread != 0;
    }
  };
  __device__ __forceinline__ bool is_present(int64_t label) const {
    return label != ignore_index && label >= 0 && label < C;
  }
  __device__ __forceinline__ int64_t class_of(int64_t other) const {
    if (partner_is_class) return other;
    return other >= 0 && other < N ? target[other] : -1;
  }
  __device__ __forceinline__ Row row(int64_t i) const {
    Row row = {target[i], class_of(partner[i * partner_stride]), 0, 0, 0, 0, 0};
    const acc_t share = lam[i * lam_stride];
    const bool own = is_present(row.own), other = is_present(row.partner);
    const double of_own = own ? static_cast<double>(share) : 0.0;
    const double of_other = other ? static_cast<double>(acc_t(1) - share) : 0.0;
    const double own_class_weight = weight && own ? static_cast<double>(weight[row.own]) : 1.0;
    const double other_class_weight = weight && other ? static_cast<double>(weight[row.partner]) : 1.0;
    const double present = own && other ? 1.0 : of_own + of_other, kept = 1.0 - smoothing;
    row.own_weight = kept * of_own * own_class_weight;
    row.partner_weight = kept * of_other * other_class_weight;
    row.spread = smoothing / C * present;
    row.counted = weight ? of_own * own_class_weight + of_other * other_class_weight : present;
    row.mass = !weight ? present : kept * row.counted + (row.spread != 0 ? row.spread * *weight_sum : 0.0);
    return row;
  }
};

// Elements [0, count) of a row in three parts: singles up to a 16-byte boundary, vectors, singles.
template <typename scalar_t>
struct RowParts {
  static constexpr int kVec = 16 / sizeof(scalar_t);
  int64_t first, vectors, count;
  __device__ __forceinline__ RowParts(const scalar_t* row, int64_t count) : count(count) {
    const int64_t before = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(scalar_t);
    first = before < count ? before : count;
    vectors = (count - first) / kVec;
  }
  // The k-th element outside the vectors.
  __device__ __forceinline__ int64_t single(int64_t k) const { return k < first ? k : k + vectors * kVec; }
  __device__ __forceinline__ int64_t singles() const { return count - vectors * kVec; }
};

// Largest value and, relative to it, sum of exponentials; sum of the values themselves, kWeighted times
// weights.
template <typename acc_t>
struct RowSums {
  acc_t maximum, total, sum;

  __device__ __forceinline__ static acc_t shift_of(acc_t maximum) {
    return maximum == -Math<acc_t>::infinity() ? acc_t(0) : maximum;
  }
  __device__ __forceinline__ static acc_t exp(acc_t x) { return Math<acc_t>::exp2(x * Math<acc_t>::kLog2e); }

  // The weights of z's classes are read kWeighted only.
  template <bool kWeighted, int kVec>
  __device__ __forceinline__ void take(const acc_t (&z)[kVec], const acc_t* weight) {
    acc_t larger = maximum;
#pragma unroll
    for (int e = 0; e < kVec; ++e) larger = Math<acc_t>::max(larger, z[e]);
    const acc_t shift = shift_of(larger);
    total *= exp(maximum - shift);
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      total += exp(z[e] - shift);
      if constexpr (kWeighted) {
        sum += weight[e] == acc_t(0) ? acc_t(0) : weight[e] * z[e];
      } else {
        sum += z[e];
      }
    }
    maximum = larger;
  }

  __device__ __forceinline__ void merge(const RowSums& other) {
    const acc_t larger = Math<acc_t>::max(maximum, other.maximum), shift = shift_of(larger);
    total = total * exp(maximum - shift) + other.total * exp(other.maximum - shift);
    sum += other.sum;
    maximum = larger;
  }
};

template <typename scalar_t, typename acc_t, int kWarps, bool kWeighted>
__global__ __launch_bounds__(
    kCrossEntropyThreads<kWarps>,
    kWarps == 1 ? 4 : 2) void mixup_cross_entropy_loss_kernel(MixedTargets<scalar_t, acc_t> problem,
                                                              double* loss, double* lse, double* counted) {
  constexpr int kRows = kWarps == 1 ? kRowsOfWarps : 1, kLanes = kWarps * kWarpSize;
  const int64_t i = int64_t{blockIdx.x} * kRows + (kWarps == 1 ? threadIdx.x / kWarpSize : 0);
  const int thread = threadIdx.x % kLanes;
  if (i >= problem.N) return;
  const scalar_t* z = problem.logits + i * problem.row_stride;
  const RowParts<scalar_t> parts(z, problem.C);
  constexpr int kVec = RowParts<scalar_t>::kVec;
  using Values = Chunk<scalar_t, kVec>;
  const auto* vectors = reinterpret_cast<const Values*>(z + parts.first);
  RowSums<acc_t> sums = {-Math<acc_t>::infinity(), acc_t(0), acc_t(0)};
  for (int64_t base = thread; base < parts.vectors; base += kBatch * kLanes) {
    Values batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (base + b * kLanes < parts.vectors) batch[b] = vectors[base + b * kLanes];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (base + b * kLanes >= parts.vectors) break;
      acc_t values[kVec];
#pragma unroll
      for (int e = 0; e < kVec; ++e) values[e] = to_acc(batch[b].value[e]);
      sums.template take<kWeighted>(values, problem.weight + parts.first + (base + b * kLanes) * kVec);
    }
  }
  for (int64_t k = thread; k < parts.singles(); k += kLanes) {
    const acc_t value[1] = {to_acc(z[parts.single(k)])};
    sums.template take<kWeighted>(value, problem.weight + parts.single(k));
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    sums.merge({__shfl_xor_sync(kAllLanes, sums.maximum, offset),
                __shfl_xor_sync(kAllLanes, sums.total, offset),
                __shfl_xor_sync(kAllLanes, sums.sum, offset)});
  }
  if constexpr (kWarps > 1) {
    __shared__ RowSums<acc_t> of_warps[kWarps];
    if (thread % kWarpSize == 0) of_warps[thread / kWarpSize] = sums;
    __syncthreads();
    if (thread != 0) return;
    for (int warp = 1; warp < kWarps; ++warp) sums.merge(of_warps[warp]);
  }
  if (thread != 0) return;
  const double row_lse = static_cast<double>(sums.maximum) + ::log(static_cast<double>(sums.total));
  const auto row = problem.row(i);
  double result = row.mass != 0 ? row.mass * row_lse : 0.0;
  if (row.own_weight != 0) result -= row.own_weight * static_cast<double>(to_acc(z[row.own]));
  if (row.partner_weight != 0) result -= row.partner_weight * static_cast<double>(to_acc(z[row.partner]));
  if (row.spread != 0) result -= row.spread * static_cast<double>(sums.sum);
  loss[i] = result;
  counted[i] = row.counted;
  lse[i] = row_lse;
}

template <typename scalar_t, typename acc_t, int kWarps, bool kWeighted>
__global__ __launch_bounds__(
    kCrossEntropyThreads<kWarps>,
    kWarps == 1 ? 4 : 2) void mixup_cross_entropy_grad_kernel(MixedTargets<scalar_t, acc_t> problem,
                                                              const double* grad_loss,
                                                              int64_t grad_loss_stride, const double* lse,
                                                              scalar_t* grad_logits) {
  constexpr int kRows = kWarps == 1 ? kRowsOfWarps : 1, kLanes = kWarps * kWarpSize;
  const int64_t i = int64_t{blockIdx.x} * kRows + (kWarps == 1 ? threadIdx.x / kWarpSize : 0);
  const int thread = threadIdx.x % kLanes;
  if (i >= problem.N) return;
  const scalar_t* z = problem.logits + i * problem.row_stride;
  scalar_t* dz = grad_logits + i * problem.C;
  const auto row = problem.row(i);
  const acc_t g = static_cast<acc_t>(grad_loss[i * grad_loss_stride]);
  const acc_t shift = static_cast<acc_t>(lse[i]);
  const acc_t correction = RowSums<acc_t>::exp(static_cast<acc_t>(static_cast<double>(shift) - lse[i])) *
                           static_cast<acc_t>(row.mass);
  const acc_t everywhere = static_cast<acc_t>(row.spread);
  const bool counts = row.counts();
  const acc_t own_weight = static_cast<acc_t>(row.own_weight),
              partner_weight = static_cast<acc_t>(row.partner_weight);
  const auto gradient = [&](scalar_t logit, int64_t c) {
    acc_t soft_target = everywhere;
    if constexpr (kWeighted) soft_target *= problem.weight[c];
    if (c == row.own) soft_target += own_weight;
    if (c == row.partner) soft_target += partner_weight;
    const acc_t result = g * (RowSums<acc_t>::exp(to_acc(logit) - shift) * correction - soft_target);
    return from_acc<scalar_t>(counts ? result : acc_t(0));
  };
  RowParts<scalar_t> parts(z, problem.C);
  if ((reinterpret_cast<uintptr_t>(z) ^ reinterpret_cast<uintptr_t>(dz)) % 16 != 0) parts.vectors = 0;
  constexpr int kVec = RowParts<scalar_t>::kVec;
  using Values = Chunk<scalar_t, kVec>;
  for (int64_t base = thread; base < parts.vectors; base += kBatch * kLanes) {
    Values batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t k = base + b * kLanes;
      if (k < parts.vectors) batch[b] = load_streaming(reinterpret_cast<const Values*>(z + parts.first) + k);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t k = base + b * kLanes, c = parts.first + k * kVec;
      if (k >= parts.vectors) break;
      Values result;
#pragma unroll
      for (int e = 0; e < kVec; ++e) result.value[e] = gradient(batch[b].value[e], c + e);
      store_streaming(reinterpret_cast<Values*>(dz + c), result);
    }
  }
  for (int64_t k = thread; k < parts.singles(); k += kLanes) {
    const int64_t c = parts.single(k);
    dz[c] = gradient(z[c], c);
  }
}

}  // namespace mixing
}  // namespace ssl_kernels
