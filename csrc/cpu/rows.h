// Row passes before and after the tile loop: normalisation, and the gradient through it.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "../ops/operands.h"
#include "pool.h"
#include "product.h"
#include "tile_math.h"

// Dispatches over the four storage types: `scalar_t` is the storage type, `acc_t` what is computed in.
#define SSL_KERNELS_DISPATCH(dtype, name, ...)                                                          \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, name, [&] {                          \
    using acc_t [[maybe_unused]] = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>; \
    return __VA_ARGS__();                                                                               \
  })

namespace ssl_kernels::cpu {

// visit(scalar_t()) with the storage type `dtype`, one of those that accumulate in acc_t.
template <class acc_t, class Visit>
auto dispatch_storage(at::ScalarType dtype, const Visit& visit) {
  if constexpr (std::is_same_v<acc_t, double>) {
    return visit(double());
  } else {
    if (dtype == at::kHalf) return visit(c10::Half());
    if (dtype == at::kBFloat16) return visit(c10::BFloat16());
    return visit(float());
  }
}

constexpr double kNormEpsilon = 1e-12;  // as F.normalize

// bfloat16 rows that are longer or, unless they are 0, shorter than 1 by more than this factor are multiplied
// in float32: the product of two reciprocal norms, which enters the coefficients, may not bring these near
// the ends of float32's range.
constexpr double kLengths = 1 << 20;

inline bool is_in_range(double length) { return length == 0 || (length > 1 / kLengths && length < kLengths); }

// Rows in acc_t, normalised or as they are, and what came of it.
struct Rows {
  at::Tensor values;  // (N, D) acc_t, contiguous
  at::Tensor rnorm;   // (N,) acc_t, 1 / max(norm, eps); (0,) where nothing is normalised
  double longest;     // largest row norm of `values`; NaN or inf if a row holds one
  // (N, stride) int32: bfloat16 rows as they came, or float32 ones rounded where torch's settings allow it,
  // two numbers each, 0 behind the last; undefined where products of them are not made in bfloat16.
  at::Tensor units;
  Precision precision = Precision::kFloat32;  // of products of `values`
};

// exp2_of hands on a NaN only where the low bits of its payload are 0, as they are in this one.
inline double without_payload(double x) {
  return std::isnan(x) ? std::numeric_limits<double>::quiet_NaN() : x;
}

// `rows`, to be multiplied in float32 if so. Of logits that are all 0, as with a scale of 0, or that are more
// than products, what coefficients lose by rounding cannot be told.
inline Rows in_float32_if(Rows rows, bool wanted) {
  if (wanted) rows.units = at::Tensor();
  return rows;
}

inline int64_t rows_per_task(int64_t width) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
}

struct RowNorm {
  double norm;  // of the row as written
  double rnorm;
  double length;  // of the row as read
};

template <class acc_t>
double reciprocal_norm(double norm) {
  return static_cast<acc_t>(1 / (norm < kNormEpsilon ? kNormEpsilon : norm));
}

// One row in acc_t, normalised if asked. A row with a NaN becomes NaN throughout.
template <class scalar_t, class acc_t>
RowNorm load_row(acc_t* out, const scalar_t* in, int64_t d, bool normalize) {
  const double norm = without_payload(std::sqrt(row_conversion<scalar_t, acc_t>().load(out, in, d)));
  if (std::isnan(norm)) std::fill_n(out, d, static_cast<acc_t>(norm));
  if (!normalize) return {norm, 1, norm};
  const double rnorm = reciprocal_norm<acc_t>(norm);
  tile_math<acc_t>().scale(out, static_cast<acc_t>(rnorm), d);
  return {norm * rnorm, rnorm, norm};
}

// Units of two bfloat16 numbers that a row takes up, whole vectors of them; not a multiple of 1 KB, which
// would bring the rows of a strip into the same sets of a cache.
inline int64_t padded_units(int64_t d) {
  const int64_t units = (d + 31) / 32 * 16;
  return units % 256 == 0 ? units + 16 : units;
}

// Rows that are to stay as they are, and lie one behind the other, without a copy. Those that are 0, not
// finite or of a length whose square might leave the range of acc_t are left to `load_rows`.
template <class acc_t>
std::optional<Rows> borrowed_rows(const at::Tensor& x) {
  const int64_t n = x.size(0), d = x.size(1);
  const Precision precision = allowed_precision(x.scalar_type());
  if (x.stride(1) != 1 || x.stride(0) != d || precision == Precision::kBf16) return std::nullopt;
  const acc_t* in = x.const_data_ptr<acc_t>();
  const auto& math = tile_math<acc_t>();
  std::vector<double> squares(n);
  at::parallel_for(0, n, rows_per_task(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) squares[i] = math.dot(in + i * d, in + i * d, d);
  });
  double largest = 0;
  for (double square : squares) {
    if (!(square > 1e-30 && square < 1e30)) return std::nullopt;
    largest = std::max(largest, square);
  }
  return Rows{x, pooled({0}, x.options()), std::sqrt(largest), {}, precision};
}

// Rows of `x` and, below them, of `more`. may_borrow: nobody writes to `values`.
template <class scalar_t, class acc_t>
Rows load_rows(const at::Tensor& x, bool normalize, const at::Tensor* more = nullptr,
               bool may_borrow = false) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    if (may_borrow && !normalize && !more)
      if (auto rows = borrowed_rows<acc_t>(x)) return *std::move(rows);
  }
  const at::Tensor upper = with_neighbours(x), lower = more ? with_neighbours(*more) : upper;
  const int64_t first = x.size(0), n = first + (more ? more->size(0) : 0), d = x.size(1);
  const auto acc = x.options().dtype(c10::CppTypeToScalarType<acc_t>::value);
  Rows rows{pooled({n, d}, acc),
            pooled({normalize ? n : 0}, acc),
            normalize ? 1. : 0.,
            {},
            allowed_precision(x.scalar_type())};
  const int64_t stride = padded_units(d);
  constexpr bool is_bfloat16 = std::is_same_v<scalar_t, c10::BFloat16>;
  if ((is_bfloat16 || rows.precision == Precision::kBf16) && isa() >= Isa::kAvx512Bf16)
    rows.units = pooled({n, stride}, acc.dtype(at::kInt));
  char* const units = rows.units.defined() ? static_cast<char*>(rows.units.mutable_data_ptr()) : nullptr;
  std::atomic<bool> in_range{true};
  const auto row_of = [&](int64_t i) {
    const at::Tensor& source = i < first ? upper : lower;
    return source.const_data_ptr<scalar_t>() + (i < first ? i : i - first) * source.stride(0);
  };
  acc_t* out = rows.values.template mutable_data_ptr<acc_t>();
  acc_t* rnorm = rows.rnorm.template mutable_data_ptr<acc_t>();
  std::vector<double> norms(n);
  at::parallel_for(0, n, rows_per_task(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowNorm row = load_row<scalar_t, acc_t>(out + i * d, row_of(i), d, normalize);
      norms[i] = row.norm;
      if (units) {
        char* to = units + i * stride * sizeof(int32_t);
        if constexpr (std::is_same_v<scalar_t, float>)
          row_conversion<c10::BFloat16, float>().store(reinterpret_cast<c10::BFloat16*>(to), row_of(i), d);
        else
          std::memcpy(to, row_of(i), d * sizeof(c10::BFloat16));
        std::memset(to + d * sizeof(c10::BFloat16), 0, stride * sizeof(int32_t) - d * sizeof(c10::BFloat16));
        if (!is_in_range(row.length)) in_range = false;
      }
      if (normalize) rnorm[i] = static_cast<acc_t>(row.rnorm);
    }
  });
  for (double norm : norms)
    if (!(norm <= rows.longest) && !std::isnan(rows.longest)) rows.longest = norm;
  if (!in_range) rows.units = at::Tensor();
  return rows;
}

// Rows of any storage type that accumulates in acc_t.
template <class acc_t>
Rows load_rows_of(const at::Tensor& x, bool normalize, bool may_borrow = false) {
  return dispatch_storage<acc_t>(x.scalar_type(), [&](auto storage) {
    return load_rows<decltype(storage), acc_t>(x, normalize, /*more=*/nullptr, may_borrow);
  });
}

// What finish_gradient makes: the gradient by the input, and sum_i <x^_i, grad_i>, where it is wanted or
// normalisation needs it.
struct InputGradient {
  at::Tensor values;
  double dots = 0;
};

// From grad (N, D) = A y, the gradient by the rows before `scale` and normalisation, which is overwritten:
// scale * rnorm * (grad - <grad, x^> x^), rounded once to the storage type. has_rnorm: each row of grad is
// rnorm * A y.
template <class scalar_t, class acc_t>
InputGradient finish_gradient(const at::Tensor& grad, const Rows& rows, double scale,
                              const at::TensorOptions& options, bool has_rnorm = false,
                              bool wants_dots = true) {
  constexpr bool in_place = std::is_same_v<scalar_t, acc_t>;
  const int64_t n = grad.size(0), d = grad.size(1);
  const bool normalize = rows.rnorm.numel() > 0;
  const at::Tensor values = in_place ? grad : pooled({n, d}, options);
  acc_t* g = grad.mutable_data_ptr<acc_t>();
  scalar_t* out = values.mutable_data_ptr<scalar_t>();
  const acc_t* unit = rows.values.template const_data_ptr<acc_t>();
  const acc_t* rnorm = normalize ? rows.rnorm.template const_data_ptr<acc_t>() : nullptr;
  const acc_t clamped = static_cast<acc_t>(1 / kNormEpsilon);
  std::vector<double> dots(n);
  const auto& math = tile_math<acc_t>();
  const auto& convert = row_conversion<scalar_t, acc_t>();
  at::parallel_for(0, n, rows_per_task(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double dot = normalize || wants_dots ? math.dot(g + i * d, unit + i * d, d) : 0;
      dots[i] = normalize && has_rnorm ? dot / rnorm[i] : dot;
      const acc_t factor = static_cast<acc_t>(normalize && !has_rnorm ? scale * rnorm[i] : scale);
      const bool on_sphere = normalize && rnorm[i] != clamped;
      if (on_sphere)
        math.project_out(g + i * d, unit + i * d, factor, static_cast<acc_t>(dot), d);
      else
        math.scale(g + i * d, factor, d);
      if (!in_place) convert.store(out + i * d, g + i * d, d);
    }
  });
  double sum = 0;
  for (double dot : dots) sum += dot;
  return {values, sum};
}

}  // namespace ssl_kernels::cpu
