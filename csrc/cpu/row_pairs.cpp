// row_pairs on the CPU. With u_k = y^_k (product) or x^ - y^_k (distance), y_1 = y and y_2 = z:
//   m_k = <u_k, x^> or |u_k|      value = m_1 - m_2      p_k = <u_k, x^>
//   with w_1 = g, w_2 = -g, for the distance over |u_k|, 0 where that is 0:
//   dx = r_x (sum_k w_k u_k - (sum_k w_k p_k) x^)
//   dy_k = r_k w_k (x^ - p_k y^_k), or -r_k w_k (u_k - (p_k - m_k^2) y^_k)
//   without the term along the row where that is not normalised, or shorter than 1e-12 and only scaled.
// Tiling: threads share the rows. Operands and gradients of one row are scratch in acc_t, in the first-level
//   cache for all usual widths; what is summed of a row in the forward is kept in `saved`, so that the
//   backward has no reduction.
//   The products of a reduced loss are made kTogether rows at a time: their roots and quotients, a row's
//   longest chain of latencies, then overlap, and x and y are read again from the cache.
// Traffic: the forward reads each operand once and writes 1 + 4 k numbers per row, the backward reads the
//   operands once and writes the gradients that are needed once.
// Memory: at most 3 rows of acc_t a thread.
// A reduced loss of the values (`row_pairs_loss`) knows the weight of each row at once: its gradients are
//   made in the forward, while the row is there, and the operands read once.
// Numerics: in acc_t, sums of squares that leave its range again in double. A product of normalised rows is
//   <x, y_k> r_x r_k, one pass for all three sums; for a distance x^ and y^_k are rounded before they are
//   subtracted, so equal rows have the distance 0. Gradients are rounded once.
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <vector>

#include "row_pairs.h"
#include "rows.h"

namespace ssl_kernels::cpu {
namespace {

using at::Tensor;

// Rows whose roots and quotients are made together: of 128 numbers they stay in the first-level cache.
constexpr int64_t kTogether = 16;

// What the forward keeps of each pair of rows.
template <class acc_t>
struct Saved {
  acc_t x_rnorm, y_rnorm, measure, projection;  // r_x, r_k, m_k, p_k
};

// An operand with neighbouring elements in memory.
template <class scalar_t>
struct Operand {
  explicit Operand(const Tensor& rows, const int64_t* index = nullptr)
      : tensor(with_neighbours(rows)),
        data(tensor.const_data_ptr<scalar_t>()),
        stride(tensor.stride(0)),
        index(index) {}
  const scalar_t* row(int64_t i) const { return data + (index && index[i] >= 0 ? index[i] : i) * stride; }
  Tensor tensor;
  const scalar_t* data;
  int64_t stride;
  const int64_t* index;  // of the row that stands for each, if not itself
};

// The pairs of a row with one other or two.
template <class scalar_t, class acc_t>
class Pairs {
 public:
  Pairs(const Tensor& x, const Tensor& y, const OptionalTensor& z, bool normalize, bool distance,
        const int64_t* index = nullptr)
      : operands_{Operand<scalar_t>(x), Operand<scalar_t>(y, index)},
        d_(x.size(1)),
        normalize_(normalize),
        distance_(distance) {
    if (z) operands_.emplace_back(*z);
  }

  int64_t count() const { return static_cast<int64_t>(operands_.size()) - 1; }

  // Rows of `scratch` that `measure` and `differentiate` take.
  int64_t scratch_size() const { return (count() + 1) * d_; }

  // Whether `add_up` takes the rows: products of pairs.
  bool is_simple() const { return !distance_ && count() == 1; }

  // losses[k] and the gradients of share times them, as `out` has room for them, for rows begin .. begin +
  // count - 1 of products, kTogether at most.
  template <class Rule>
  void add_up(int64_t begin, int64_t count, const Rule& rule, double share, double* losses,
              scalar_t* const* out, acc_t* scratch) const {
    bool in_range[kTogether];
    double x_rnorm[kTogether], y_rnorm[kTogether], product[kTogether];
    const auto products = row_conversion<scalar_t, acc_t>().products;
    for (int64_t k = 0; k < count; ++k) {
      const auto sums = products(operands_[0].row(begin + k), operands_[1].row(begin + k), d_);
      in_range[k] = sums.has_value();
      const auto [xx, yy, xy] = sums.value_or(ProductSums{1, 1, 0});
      x_rnorm[k] = xx, y_rnorm[k] = yy, product[k] = xy;
    }
    for (int64_t k = 0; normalize_ && k < count; ++k) {
      x_rnorm[k] = 1 / std::max(std::sqrt(x_rnorm[k]), kNormEpsilon);
      y_rnorm[k] = 1 / std::max(std::sqrt(y_rnorm[k]), kNormEpsilon);
      product[k] *= x_rnorm[k] * y_rnorm[k];
    }
    const bool differentiates = out[0] || out[1];
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = begin + k;
      const auto [loss, slope_of_loss] = rule(cosine(product[k]));
      losses[k] = loss;
      if (in_range[k] && !differentiates) continue;
      const double r = normalize_ ? x_rnorm[k] : 1, q = normalize_ ? y_rnorm[k] : 1;
      const double slope = share * slope_of_loss, both = slope * r * q;
      const double along = normalize_ ? slope * product[k] : 0;
      // What lies along a row that is only scaled stays.
      const double by_x = r < 1 / kNormEpsilon ? along * r * r : 0,
                   by_y = q < 1 / kNormEpsilon ? along * q * q : 0;
      if (in_range[k] && is_moderate(both) && is_moderate(by_x) && is_moderate(by_y)) {
        const scalar_t *x = operands_[0].row(i), *y = operands_[1].row(i);
        // both y - by_x x, of the rows as they are.
        const auto combine = row_conversion<scalar_t, acc_t>().pair_gradient;
        const acc_t weight = static_cast<acc_t>(both);
        if (out[0])
          combine(out[0] + i * d_, {x, {y}, {weight}, static_cast<acc_t>(by_x), 1, false, normalize_}, d_);
        if (out[1])
          combine(out[1] + i * d_, {y, {x}, {weight}, static_cast<acc_t>(by_y), 1, false, normalize_}, d_);
        continue;
      }
      Saved<acc_t> saved;
      const auto made = rule(measure(i, scratch, &saved));
      losses[k] = made.value;
      if (differentiates) differentiate(i, scratch, &saved, share * made.slope, out, /*has_rows=*/false);
    }
  }

  // The value of row i, and what its gradient needs beside the rows. Of a distance the rows as used are left
  // in `scratch`.
  double measure(int64_t i, acc_t* scratch, Saved<acc_t>* saved) const {
    Saved<double> pairs[2];
    if (!distance_)
      multiply(i, scratch, pairs);
    else
      subtract(i, scratch, pairs);
    for (int64_t k = 0; k < count(); ++k)
      saved[k] = {static_cast<acc_t>(pairs[k].x_rnorm), static_cast<acc_t>(pairs[k].y_rnorm),
                  static_cast<acc_t>(pairs[k].measure), static_cast<acc_t>(pairs[k].projection)};
    return count() == 1 ? pairs[0].measure : pairs[0].measure - pairs[1].measure;
  }

  // The gradients by what has an `out`, of g times the value of row i. has_rows: `scratch` is as `measure`
  // left it for a distance.
  void differentiate(int64_t i, acc_t* scratch, const Saved<acc_t>* saved, double g, scalar_t* const* out,
                     bool has_rows) const {
    const auto& convert = row_conversion<scalar_t, acc_t>();
    const acc_t clamped = static_cast<acc_t>(1 / kNormEpsilon);
    if (!has_rows) convert.load_scaled(scratch, operands_[0].row(i), saved->x_rnorm, d_);
    PairGradient<acc_t> by_x{
        scratch, {}, {}, 0, saved->x_rnorm, distance_, normalize_ && saved->x_rnorm != clamped};
    double along = 0;
    for (int64_t k = 0; k < count(); ++k) {
      const auto [x_rnorm, y_rnorm, measure, projection] = saved[k];
      double weight = k ? -g : g;
      if (distance_) weight = measure == 0 ? 0 : weight / measure;
      along += weight * projection;
      acc_t* const other = scratch + (1 + k) * d_;
      if (!has_rows) convert.load_scaled(other, operands_[1 + k].row(i), y_rnorm, d_);
      by_x.y[k] = other;
      by_x.weight[k] = static_cast<acc_t>(weight);
      if (!out[1 + k]) continue;
      // The measure is symmetric: <y^ - x^, y^> = m^2 - <x^ - y^, x^>.
      const acc_t onto_other = distance_ ? measure * measure - projection : projection;
      convert.pair_gradient(out[1 + k] + i * d_,
                            {other, {scratch}, {1}, onto_other, by_x.weight[k] * y_rnorm, distance_,
                             normalize_ && y_rnorm != clamped},
                            d_);
    }
    by_x.along = static_cast<acc_t>(along);
    if (out[0]) convert.pair_gradient(out[0] + i * d_, by_x, d_);
  }

 private:
  // Whether a factor of a row is 0 or far from the ends of float32's range, where it would lose digits.
  static bool is_moderate(double factor) {
    return factor == 0 || (std::abs(factor) > 1e-25 && std::abs(factor) < 1e25);
  }

  double rnorm_of(double squares) const {
    return normalize_ ? reciprocal_norm<acc_t>(std::sqrt(squares)) : 1;
  }

  // The product of unit rows without what rounding left beyond ±1. NaN stays.
  double cosine(double product) const {
    return normalize_ && std::abs(product) > 1 ? std::copysign(1., product) : product;
  }

  void multiply(int64_t i, acc_t* scratch, Saved<double>* pairs) const {
    const auto longer_than_eps = [](double squares) { return std::max(std::sqrt(squares), kNormEpsilon); };
    std::optional<double> x_rnorm;  // set once `scratch` has the row
    for (int64_t k = 0; k < count(); ++k) {
      const scalar_t *x_row = operands_[0].row(i), *y_row = operands_[1 + k].row(i);
      Saved<double>& pair = pairs[k];
      if (const auto sums = row_conversion<scalar_t, acc_t>().products(x_row, y_row, d_)) {
        pair.x_rnorm = rnorm_of(sums->xx);
        pair.y_rnorm = rnorm_of(sums->yy);
        pair.projection = sums->xy;
        if (normalize_) pair.projection /= longer_than_eps(sums->xx) * longer_than_eps(sums->yy);
      } else {
        acc_t* const other = scratch + d_;
        if (!x_rnorm) x_rnorm = load_row<scalar_t, acc_t>(scratch, x_row, d_, normalize_).rnorm;
        pair.x_rnorm = *x_rnorm;
        pair.y_rnorm = load_row<scalar_t, acc_t>(other, y_row, d_, normalize_).rnorm;
        pair.projection = tile_math<acc_t>().dot(other, scratch, d_);
      }
      pair.measure = cosine(pair.projection);
    }
  }

  void subtract(int64_t i, acc_t* scratch, Saved<double>* pairs) const {
    const auto& convert = row_conversion<scalar_t, acc_t>();
    const scalar_t* rows[] = {operands_[0].row(i), operands_[1].row(i), operands_.back().row(i)};
    double rnorm[3];
    if (const auto squares = convert.squares(rows[0], rows[1], rows[2], d_)) {
      for (int64_t k = 0; k <= count(); ++k) {
        rnorm[k] = rnorm_of((*squares)[k]);
        convert.load_scaled(scratch + k * d_, rows[k], static_cast<acc_t>(rnorm[k]), d_);
      }
    } else {
      for (int64_t k = 0; k <= count(); ++k)
        rnorm[k] = load_row<scalar_t, acc_t>(scratch + k * d_, rows[k], d_, normalize_).rnorm;
    }
    const auto& math = tile_math<acc_t>();
    std::array<DifferenceSums, 2> sums;
    if (count() == 2)
      sums = math.two_difference_sums(scratch, scratch + d_, scratch + 2 * d_, d_);
    else
      sums[0] = math.difference_sums(scratch, scratch + d_, d_);
    for (int64_t k = 0; k < count(); ++k)
      pairs[k] = {rnorm[0], rnorm[1 + k], std::sqrt(sums[k].squares), sums[k].along};
  }

  std::vector<Operand<scalar_t>> operands_;
  int64_t d_;
  bool normalize_, distance_;
};

template <class scalar_t, class acc_t>
std::tuple<Tensor, Tensor> measure_pairs(const Tensor& x, const Pairs<scalar_t, acc_t>& pairs) {
  const int64_t n = x.size(0), d = x.size(1), count = pairs.count();
  const Tensor values = pooled({n}, x.options().dtype(at::kDouble));
  const Tensor saved = pooled({n, count, 4}, x.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
  double* value = values.mutable_data_ptr<double>();
  auto* keep = reinterpret_cast<Saved<acc_t>*>(saved.template mutable_data_ptr<acc_t>());
  at::parallel_for(0, n, rows_per_task(d), [&](int64_t begin, int64_t end) {
    std::vector<acc_t> scratch(pairs.scratch_size());
    for (int64_t i = begin; i < end; ++i) value[i] = pairs.measure(i, scratch.data(), keep + i * count);
  });
  return {values, saved};
}

// Gradients of the operands that need one, not written yet, else (0,).
struct Gradients {
  Gradients(const Tensor& x, int64_t operands, std::array<bool, 3> needs_grad) {
    for (int64_t k = 0; k < 3; ++k)
      tensors[k] = pooled(k < operands && needs_grad[k] ? x.sizes() : at::IntArrayRef({0}), x.options());
  }
  template <class scalar_t>
  std::array<scalar_t*, 3> out() const {
    std::array<scalar_t*, 3> to;
    for (int64_t k = 0; k < 3; ++k)
      to[k] = tensors[k].numel() ? tensors[k].mutable_data_ptr<scalar_t>() : nullptr;
    return to;
  }
  Tensor tensors[3];
};

template <class scalar_t, class acc_t>
std::tuple<Tensor, Tensor, Tensor> differentiate(const Tensor& grad_values, const Tensor& x,
                                                 const Pairs<scalar_t, acc_t>& pairs, const Tensor& saved,
                                                 std::array<bool, 3> needs_grad) {
  const int64_t n = x.size(0), count = pairs.count();
  const Gradients grads(x, count + 1, needs_grad);
  const auto out = grads.out<scalar_t>();
  const Tensor upstream = grad_values.contiguous();
  const double* g = upstream.const_data_ptr<double>();
  const auto* kept = reinterpret_cast<const Saved<acc_t>*>(saved.template const_data_ptr<acc_t>());
  at::parallel_for(0, n, rows_per_task(x.size(1)), [&](int64_t begin, int64_t end) {
    std::vector<acc_t> scratch(pairs.scratch_size());
    for (int64_t i = begin; i < end; ++i)
      pairs.differentiate(i, scratch.data(), kept + i * count, g[i], out.data(), /*has_rows=*/false);
  });
  return {grads.tensors[0], grads.tensors[1], grads.tensors[2]};
}

}  // namespace

std::tuple<Tensor, Tensor> row_pairs_fwd(const Tensor& x, const Tensor& y, const OptionalTensor& z,
                                         bool normalize, std::string_view measure) {
  check_row_pairs(x, y, z, measure);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return SSL_KERNELS_DISPATCH(x.scalar_type(), "row_pairs", [&] {
    return measure_pairs<scalar_t, acc_t>(x, {x, y, z, normalize, measure == "distance"});
  });
}

std::tuple<Tensor, Tensor, Tensor> row_pairs_bwd(const Tensor& grad_values, const Tensor& x, const Tensor& y,
                                                 const OptionalTensor& z, const Tensor& saved, bool normalize,
                                                 std::string_view measure, bool x_needs_grad,
                                                 bool y_needs_grad, bool z_needs_grad) {
  check_row_pairs(x, y, z, measure);
  check_row_pairs_grad(grad_values, saved, x, z);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return SSL_KERNELS_DISPATCH(x.scalar_type(), "row_pairs", [&] {
    return differentiate<scalar_t, acc_t>(grad_values, x, {x, y, z, normalize, measure == "distance"},
                                          saved.contiguous(), {x_needs_grad, y_needs_grad, z_needs_grad});
  });
}

PairLoss row_pairs_loss(const Tensor& x, const Tensor& y, const OptionalTensor& z, bool normalize,
                        bool distance, const PairRule& rule, double share, std::array<bool, 3> needs_grad) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t n = x.size(0);
  std::vector<double> losses(n);
  const int64_t* const index = y.scalar_type() == at::kLong ? y.const_data_ptr<int64_t>() : nullptr;
  if (index) needs_grad[1] = needs_grad[0];
  Gradients grads(x, z ? 3 : 2, needs_grad);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "row_pairs_loss", [&] {
    const Pairs<scalar_t, scalar_t> pairs(x, index ? x : y, z, normalize, distance, index);
    const auto out = grads.out<scalar_t>();
    const bool differentiate = out[0] || out[1] || out[2];
    at::parallel_for(0, n, rows_per_task(x.size(1)), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> scratch(pairs.scratch_size());
      Saved<scalar_t> saved[2];
      for (int64_t i = begin; pairs.is_simple() && i < end; i += kTogether)
        pairs.add_up(i, std::min(kTogether, end - i), rule, share, losses.data() + i, out.data(),
                     scratch.data());
      for (int64_t i = begin; !pairs.is_simple() && i < end; ++i) {
        const auto [loss, slope] = rule(pairs.measure(i, scratch.data(), saved));
        losses[i] = loss;
        if (differentiate) pairs.differentiate(i, scratch.data(), saved, share * slope, out.data(), distance);
      }
    });
    if (!index || !differentiate) return;
    for (int64_t i = 0, d = x.size(1); i < n; ++i)  // by one thread: rows may stand for several
      tile_math<scalar_t>().add_scaled(out[0] + (index[i] < 0 ? i : index[i]) * d, out[1] + i * d,
                                       scalar_t(1), d);
    grads.tensors[1] = at::Tensor();
  });
  double sum = 0;
  for (const double loss : losses) sum += loss;
  return {sum * share, {grads.tensors[0], grads.tensors[1], grads.tensors[2]}};
}

namespace {

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("row_pairs_fwd.native", &row_pairs_fwd);
  library.impl("row_pairs_bwd.native", &row_pairs_bwd);
}

}  // namespace
}  // namespace ssl_kernels::cpu
