// Elementwise work of the mixing operations, of momentum_update_, patch_errors and losses against prototypes
// on runs of consecutive elements, in a version for each instruction set.
//
// S is the storage type, T what is computed in (float, double for double); every result is rounded once, to
// nearest even. The loops live in mixing_math.inc and are compiled three times; the functions below pick at
// run time.
#pragma once

#include <cstdint>
#include <type_traits>

namespace ssl_kernels::cpu {

template <class S>
using Accumulation = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S>
struct MixingMath {
  using T = Accumulation<S>;

  // out_i = a x_i + b y_i; out may be x or y. Meanwhile n elements at `next` come into the second-level
  // cache.
  void (*mix)(S* out, const S* x, T a, const S* y, T b, int64_t n, const S* next);

  // out_x_i = a x_i + b y_i and out_y_i = c y_i + d z_i, of what was there: out_x may be x or z, out_y may be
  // y.
  void (*mix_two)(S* out_x, S* out_y, const S* x, T a, const S* y, T b, T c, const S* z, T d, int64_t n);

  // out_i = a x_i; out may be x.
  void (*scale)(S* out, const S* x, T a, int64_t n);

  // out_i = out_i + x_i
  void (*add)(S* out, const S* x, int64_t n);

  // sum_i g_i (x_i - y_i)
  double (*difference_dot)(const S* g, const S* x, const S* y, int64_t n);
};

template <class S>
struct NormalizeMath {
  // out_i = a u_i + b v_i + shift
  void (*plane)(S* out, const uint8_t* u, float a, const uint8_t* v, float b, float shift, int64_t n);

  // out_i = scale_i (a u_i + b v_i) + shift_i
  void (*pixels)(S* out, const uint8_t* u, float a, const uint8_t* v, float b, const float* scale,
                 const float* shift, int64_t n);
};

template <class T>
struct LogitSums {
  T top;             // the largest
  double exp_total;  // sum_i exp(z_i - top)
  double total;      // sum_i z_i
};

template <class S>
struct CrossEntropyMath {
  using T = Accumulation<S>;

  // Meanwhile n elements at `next` come into the second-level cache.
  LogitSums<T> (*sums)(const S* z, int64_t n, const S* next);

  // sum_i w_i z_i, of those whose w_i is not 0
  double (*weighted_total)(const S* z, const T* w, int64_t n);

  // out_i = weight exp(z_i - shift) - offset
  void (*gradient)(S* out, const S* z, T shift, T weight, T offset, int64_t n);

  // out_i = weight exp(z_i - shift) - offset w_i
  void (*weighted_gradient)(S* out, const S* z, T shift, T weight, T offset, const T* w, int64_t n);
};

// Of a patch x and its target t, n numbers each.
template <class T>
struct PatchMath {
  // sum_i t_i
  double (*sum)(const T* t, int64_t n);

  // sum_i (t_i - mean)^2
  double (*deviation)(const T* t, T mean, int64_t n);

  // sum_i (x_i - rstd (t_i - mean))^2
  double (*error)(const T* x, const T* t, T mean, T rstd, int64_t n);

  // out_i = a (x_i - rstd (t_i - mean)); out may be x.
  void (*gradient)(T* out, const T* x, const T* t, T mean, T rstd, T a, int64_t n);
};

template <class T>
struct Range {
  T least, most;  // both NaN where a number is infinite or NaN
};

// Rows whose columns have a number each.
template <class T>
struct ColumnMath {
  // x_i <- x_i w_i, and their range
  Range<T> (*weigh)(T* x, const T* w, int64_t n);

  // out_i = a x_i w_i; out may be x.
  void (*weighted)(T* out, const T* x, const T* w, T a, int64_t n);

  // total_i += x_i y_i
  void (*add_products)(T* total, const T* x, const T* y, int64_t n);
};

// shadow_i = round(master_i), master_i = average + weight (source_i - average) with average = master_i where
// shadow_i was rounded from it, else shadow_i. From the nearer end: source_i + (weight - 1) (source_i -
// average) for weight >= 1/2.
template <class H, class S>
using MomentumMath = void (*)(float* master, H* shadow, const S* source, float weight, int64_t n);

template <class S>
const MixingMath<S>& mixing_math();

template <class S>
const NormalizeMath<S>& normalize_math();

template <class S>
const CrossEntropyMath<S>& cross_entropy_math();

template <class T>
const PatchMath<T>& patch_math();

template <class T>
const ColumnMath<T>& column_math();

template <class H, class S>
MomentumMath<H, S> momentum_math();

}  // namespace ssl_kernels::cpu
