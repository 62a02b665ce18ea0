// Running log-sum-exp of scale * v over a stream of values v (online softmax, arXiv:1805.02867), scale >= 0.
//
//   sum = sum_v 2^(a v - shift(max))     a = scale * log2(e), shift(max) = a * max rounded, or 0 before any v
//
// The products a v are not rounded, the shift is rounded once and used for every term, so neither costs
// accuracy when a v is large. Values of -inf count nothing.
#pragma once

#include "math.cuh"

namespace ssl_kernels {

template <typename T>
struct alignas(2 * sizeof(T)) OnlineSoftmax {
  T max;
  T sum;

  __device__ __forceinline__ void clear() {
    max = -Math<T>::infinity();
    sum = T(0);
  }

  // Base-2 factor a; a zero scale keeps a positive one so that a * -inf stays -inf.
  static __device__ __forceinline__ T base2_scale(T scale) {
    return scale == T(0) ? Math<T>::kTiny : scale * Math<T>::kLog2e;
  }

  static __device__ __forceinline__ T shift_of(T largest, T a) {
    return largest == -Math<T>::infinity() ? T(0) : Math<T>::mul(a, largest);
  }

  // Makes room for values up to `candidate`; returns the shift of the terms that are added to `sum` next.
  __device__ __forceinline__ T raise(T candidate, T a) {
    const T larger = Math<T>::max(max, candidate);
    const T shift = shift_of(larger, a);
    sum *= Math<T>::exp2(Math<T>::mul(a, max) - shift);
    max = larger;
    return shift;
  }

  static __device__ __forceinline__ T term(T v, T a, T shift) {
    return Math<T>::exp2(Math<T>::fma(v, a, -shift));
  }

  __device__ __forceinline__ void merge(T other_max, T other_sum, T a) {
    const T shift = raise(other_max, a);
    sum += other_sum * Math<T>::exp2(Math<T>::mul(a, other_max) - shift);
  }

  // log sum exp(scale * v), natural, -inf if nothing was allowed.
  __device__ __forceinline__ double lse(T a) const {
    if (sum == T(0)) return -Math<double>::infinity();
    const double shift = Math<T>::mul(a, max);
    return (shift + Math<double>::log2(static_cast<double>(sum))) * Math<double>::kLn2;
  }
};

}  // namespace ssl_kernels
