// row_pairs on the CPU. With u_k = y^_k (product) or x^ - y^_k (distance), y_1 = y and y_2 = z:
//   m_k = <u_k, x^> or |u_k|      value = m_1 - m_2      p_k = <u_k, x^>
//   with w_1 = g, w_2 = -g, for the distance over |u_k|, 0 where that is 0:
//   dx = r_x (sum_k w_k u_k - (sum_k w_k p_k) x^)
//   dy_k = r_k w_k (x^ - p_k y^_k), or -r_k w_k (u_k - (p_k - m_k^2) y^_k)
//   without the term along the row where that is not normalised, or shorter than 1e-12 and only scaled.
// Tiling: threads share the rows. Operands and gradients of one row are scratch in acc_t, in the first-level
//   cache for all usual widths; what is summed of a row in the forward is kept in `saved`, so that the
//   backward has no reduction.
// Traffic: the forward reads each operand once and writes 1 + 4 k numbers per row, the backward reads the
//   operands once and writes the gradients that are needed once.
// Memory: at most 3 rows of acc_t a thread.
// Numerics: in acc_t, sums of squares that leave its range again in double. A product of normalised rows is
//   <x, y_k> r_x r_k, one pass for all three sums; for a distance x^ and y^_k are rounded before they are
//   subtracted, so equal rows have the distance 0. Gradients are rounded once.
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <vector>

#include "../ops/row_pairs.h"
#include "rows.h"

namespace ssl_kernels::cpu {
namespace {

using at::Tensor;

// What the forward keeps of each pair of rows.
template <class acc_t>
struct Saved {
  acc_t x_rnorm, y_rnorm, measure, projection;  // r_x, r_k, m_k, p_k
};

// An operand with neighbouring elements in memory.
template <class scalar_t>
struct Operand {
  explicit Operand(const Tensor& rows)
      : tensor(rows.size(1) == 1 || rows.stride(1) == 1 ? rows : rows.contiguous()),
        data(tensor.const_data_ptr<scalar_t>()),
        stride(tensor.stride(0)) {}
  const scalar_t* row(int64_t i) const { return data + i * stride; }
  Tensor tensor;
  const scalar_t* data;
  int64_t stride;
};

template <class scalar_t>
std::vector<Operand<scalar_t>> operands_of(const Tensor& x, const Tensor& y, const OptionalTensor& z) {
  std::vector<Operand<scalar_t>> operands{Operand<scalar_t>(x), Operand<scalar_t>(y)};
  if (z) operands.emplace_back(*z);
  return operands;
}

template <class scalar_t, class acc_t>
std::tuple<Tensor, Tensor> measure_pairs(const Tensor& x, const Tensor& y, const OptionalTensor& z,
                                         bool normalize, bool distance) {
  const auto operands = operands_of<scalar_t>(x, y, z);
  const int64_t n = x.size(0), d = x.size(1), pairs = static_cast<int64_t>(operands.size()) - 1;
  const Tensor values = pooled({n}, x.options().dtype(at::kDouble));
  const Tensor saved = pooled({n, pairs, 4}, x.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
  double* value = values.mutable_data_ptr<double>();
  auto* keep = reinterpret_cast<Saved<acc_t>*>(saved.template mutable_data_ptr<acc_t>());
  const auto& math = tile_math<acc_t>();
  const auto& convert = row_conversion<scalar_t, acc_t>();
  const auto rnorm_of = [&](double squares) {
    return normalize ? reciprocal_norm<acc_t>(std::sqrt(squares)) : 1;
  };
  const auto longer_than_eps = [](double squares) { return std::max(std::sqrt(squares), kNormEpsilon); };
  // The product of unit rows without what rounding left beyond ±1. NaN stays.
  const auto cosine = [&](double product) {
    return normalize && std::abs(product) > 1 ? std::copysign(1., product) : product;
  };
  at::parallel_for(0, n, rows_per_task(d), [&](int64_t begin, int64_t end) {
    std::vector<acc_t> scratch(2 * d);
    acc_t *unit = scratch.data(), *other = unit + d;
    for (int64_t i = begin; i < end; ++i) {
      std::optional<double> x_rnorm;  // set once `unit` is loaded
      double sum = 0;
      for (int64_t k = 0; k < pairs; ++k) {
        const scalar_t *x_row = operands[0].row(i), *y_row = operands[1 + k].row(i);
        Saved<double> pair;
        if (const auto sums = distance ? std::nullopt : convert.products(x_row, y_row, d)) {
          pair.x_rnorm = rnorm_of(sums->xx);
          pair.y_rnorm = rnorm_of(sums->yy);
          pair.projection = sums->xy;
          if (normalize) pair.projection /= longer_than_eps(sums->xx) * longer_than_eps(sums->yy);
          pair.measure = cosine(pair.projection);
        } else {
          if (!x_rnorm) x_rnorm = load_row<scalar_t, acc_t>(unit, x_row, d, normalize).rnorm;
          pair.x_rnorm = *x_rnorm;
          pair.y_rnorm = load_row<scalar_t, acc_t>(other, y_row, d, normalize).rnorm;
          if (distance) {
            const auto [squares, along] = math.difference_sums(unit, other, d);
            pair.measure = std::sqrt(squares);
            pair.projection = along;
          } else {
            pair.projection = math.dot(other, unit, d);
            pair.measure = cosine(pair.projection);
          }
        }
        keep[i * pairs + k] = {static_cast<acc_t>(pair.x_rnorm), static_cast<acc_t>(pair.y_rnorm),
                               static_cast<acc_t>(pair.measure), static_cast<acc_t>(pair.projection)};
        sum += k ? -pair.measure : pair.measure;
      }
      value[i] = sum;
    }
  });
  return {values, saved};
}

template <class scalar_t, class acc_t>
std::tuple<Tensor, Tensor, Tensor> differentiate(const Tensor& grad_values, const Tensor& x, const Tensor& y,
                                                 const OptionalTensor& z, const Tensor& saved, bool normalize,
                                                 bool distance, std::array<bool, 3> needs_grad) {
  const auto operands = operands_of<scalar_t>(x, y, z);
  const int64_t n = x.size(0), d = x.size(1), pairs = static_cast<int64_t>(operands.size()) - 1;
  Tensor grads[3];
  scalar_t* out[3] = {};
  for (int64_t k = 0; k < 3; ++k) {
    const bool wanted = k <= pairs && needs_grad[k];
    grads[k] = pooled(wanted ? x.sizes() : at::IntArrayRef({0}), x.options());
    if (wanted) out[k] = grads[k].mutable_data_ptr<scalar_t>();
  }
  const Tensor upstream = grad_values.contiguous();
  const double* g = upstream.const_data_ptr<double>();
  const auto* kept = reinterpret_cast<const Saved<acc_t>*>(saved.template const_data_ptr<acc_t>());
  const auto& convert = row_conversion<scalar_t, acc_t>();
  const acc_t clamped = static_cast<acc_t>(1 / kNormEpsilon);
  at::parallel_for(0, n, rows_per_task(d), [&](int64_t begin, int64_t end) {
    std::vector<acc_t> scratch(3 * d);
    acc_t* const unit = scratch.data();
    for (int64_t i = begin; i < end; ++i) {
      const Saved<acc_t>* pair = kept + i * pairs;
      convert.load_scaled(unit, operands[0].row(i), pair->x_rnorm, d);
      PairGradient<acc_t> by_x{
          unit, {}, {}, 0, pair->x_rnorm, distance, normalize && pair->x_rnorm != clamped};
      double along = 0;
      for (int64_t k = 0; k < pairs; ++k) {
        const auto [x_rnorm, y_rnorm, measure, projection] = pair[k];
        double weight = k ? -g[i] : g[i];
        if (distance) weight = measure == 0 ? 0 : weight / measure;
        along += weight * projection;
        acc_t* const other = unit + (1 + k) * d;
        convert.load_scaled(other, operands[1 + k].row(i), y_rnorm, d);
        by_x.y[k] = other;
        by_x.weight[k] = static_cast<acc_t>(weight);
        if (!out[1 + k]) continue;
        // The measure is symmetric: <y^ - x^, y^> = m^2 - <x^ - y^, x^>.
        const acc_t onto_other = distance ? measure * measure - projection : projection;
        convert.pair_gradient(out[1 + k] + i * d,
                              {other, {unit}, {1}, onto_other, by_x.weight[k] * y_rnorm, distance,
                               normalize && y_rnorm != clamped},
                              d);
      }
      by_x.along = static_cast<acc_t>(along);
      if (out[0]) convert.pair_gradient(out[0] + i * d, by_x, d);
    }
  });
  return {grads[0], grads[1], grads[2]};
}

// values, saved
std::tuple<Tensor, Tensor> row_pairs_fwd(const Tensor& x, const Tensor& y, const OptionalTensor& z,
                                         bool normalize, std::string_view measure) {
  check_row_pairs(x, y, z, measure);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return SSL_KERNELS_DISPATCH(x.scalar_type(), "row_pairs", [&] {
    return measure_pairs<scalar_t, acc_t>(x, y, z, normalize, measure == "distance");
  });
}

// grad_x, grad_y, grad_z; (0,) where none is needed
std::tuple<Tensor, Tensor, Tensor> row_pairs_bwd(const Tensor& grad_values, const Tensor& x, const Tensor& y,
                                                 const OptionalTensor& z, const Tensor& saved, bool normalize,
                                                 std::string_view measure, bool x_needs_grad,
                                                 bool y_needs_grad, bool z_needs_grad) {
  check_row_pairs(x, y, z, measure);
  check_row_pairs_grad(grad_values, saved, x, z);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return SSL_KERNELS_DISPATCH(x.scalar_type(), "row_pairs", [&] {
    return differentiate<scalar_t, acc_t>(grad_values, x, y, z, saved.contiguous(), normalize,
                                          measure == "distance", {x_needs_grad, y_needs_grad, z_needs_grad});
  });
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("row_pairs_fwd.native", &row_pairs_fwd);
  library.impl("row_pairs_bwd.native", &row_pairs_bwd);
}

}  // namespace
}  // namespace ssl_kernels::cpu
