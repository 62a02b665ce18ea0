// Views against a teacher's softmax over prototypes, of few logits, all steps in one call. With unit rows
// x^_i of all views, prototypes y_k of length 1 / r_k and S = x^ y^T r, the teacher's probabilities, which
// SwAV takes of steepness S + potentials, and G the gradient by S of the weighted loss,
//   by x^:  (G r) y
//   by y:   (G r)^T x^ - r_k p_k y^_k,   p_k = sum_i G_ik S_ik = <y^_k, sum_i G_ik x^_i>
// Tiling: one product of all rows with the prototypes as they are serves loss and gradients, and SwAV's
//   codes; r_k are factors of its columns. Rows of logits are then read and become their gradients while they
//   are in the first- or second-level cache, a block of samples at a time, which adds up its own p. Two
//   products at the end.
// Traffic: the prototypes four times (norms, both products, the term along them), their gradient written and
//   changed once; the logits once for each of the steps: potentials, loss with gradient, products.
// Memory: V * N * K and A * N * K numbers, a row of K for each block of samples.
// Numerics: exponentials and sums of a block in acc_t, across blocks in double. Sinkhorn's scaling is of
//   exp(steepness (S - largest)), where its range is so small that no scaled matrix leaves acc_t; else
//   `potentials` makes it of logarithms. Prototypes whose lengths are so far from 1 that a product with them
//   might leave float32 are made unit first.
#include "cluster_loss.h"

#include <ATen/Parallel.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cluster_views.h"
#include "rows.h"

namespace ssl_kernels::cpu {
namespace {

using at::Tensor;

// exp(-2 * 40), the least that sums of terms are divided to, is a normal float32.
constexpr double kSafeRange = 40;

// Rows that a block of samples has of all views, at least.
constexpr int64_t kBlockRows = 32;

// visit(block, begin, end) of n rows in blocks of `size`, in parallel.
template <class Visit>
void each_block(int64_t n, int64_t size, int64_t work, const Visit& visit) {
  const int64_t blocks = (n + size - 1) / size;
  at::parallel_for(0, blocks, rows_per_task(size * work), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) visit(b, b * size, std::min(n, (b + 1) * size));
  });
}

// Rows of numbers for each column, one of each block, and their sum.
template <class T>
class ColumnTotals {
 public:
  ColumnTotals(int64_t n, int64_t size, int64_t k)
      : k_(k), blocks_((n + size - 1) / size), of_block_(blocks_ * k) {}
  T* of(int64_t block) { return of_block_.data() + block * k_; }
  void clear() { std::fill(of_block_.begin(), of_block_.end(), T(0)); }

  // visit(column, total)
  template <class Visit>
  void each_total(const Visit& visit) const {
    for (int64_t k = 0; k < k_; ++k) {
      double total = 0;
      for (int64_t b = 0; b < blocks_; ++b) total += of_block_[b * k_ + k];
      visit(k, total);
    }
  }

 private:
  int64_t k_, blocks_;
  std::vector<T> of_block_;
};

// Prototypes as factors of a product: y^_k = factor_k * values_k.
template <class T>
struct Prototypes {
  Tensor values;  // (K, D)
  std::vector<T> factor, rnorm;
};

template <class scalar_t, class T>
Prototypes<T> load_prototypes(const Tensor& x, bool normalize) {
  const int64_t k = x.size(0), d = x.size(1);
  const Tensor rows = x.contiguous();
  const scalar_t* in = rows.const_data_ptr<scalar_t>();
  const auto& math = tile_math<T>();
  Prototypes<T> made{{}, std::vector<T>(k, T(1)), std::vector<T>(k, T(1))};
  if constexpr (std::is_same_v<scalar_t, T>) {
    if (!normalize) return made.values = rows, made;
    std::vector<double> norms(k);
    at::parallel_for(0, k, rows_per_task(d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) norms[i] = std::sqrt(math.dot(in + i * d, in + i * d, d));
    });
    if (std::all_of(norms.begin(), norms.end(), [](double x) { return x > 1 / kLengths && x < kLengths; })) {
      made.values = rows;
      for (int64_t i = 0; i < k; ++i) made.factor[i] = made.rnorm[i] = static_cast<T>(1 / norms[i]);
      return made;
    }
  }
  made.values = pooled({k, d}, x.options().dtype(c10::CppTypeToScalarType<T>::value));
  T* out = made.values.template mutable_data_ptr<T>();
  at::parallel_for(0, k, rows_per_task(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      made.rnorm[i] = static_cast<T>(load_row<scalar_t, T>(out + i * d, in + i * d, d, normalize).rnorm);
  });
  return made;
}

// exp(steepness * (S - largest)) of the rows of one view, in `terms`, and Sinkhorn's factors of its columns;
// nothing where the logits are too far apart.
template <class T>
std::optional<std::vector<T>> scaled_columns(T* terms, const T* products, Range<T> range, double steepness,
                                             int64_t n, int64_t k, int64_t iterations) {
  const double most = steepness * range.most;
  if (!(most - steepness * range.least <= kSafeRange)) return std::nullopt;  // not so if one is NaN
  const auto& math = tile_math<T>();
  ColumnTotals<T> totals(n, kBlockRows, k);
  std::vector<T> factors(k);
  for (int64_t step = 0; step < iterations; ++step) {
    totals.clear();
    each_block(n, kBlockRows, k, [&](int64_t block, int64_t begin, int64_t end) {
      T* const total = totals.of(block);
      for (int64_t i = begin; i < end; ++i) {
        T* const row = terms + i * k;
        if (step) {
          math.add_scaled(total, row, static_cast<T>(1 / math.dot(row, factors.data(), k)), k);
        } else {
          mixing_math<T>().scale(row, products + i * k, static_cast<T>(steepness), k);
          cross_entropy_math<T>().gradient(row, row, static_cast<T>(most), T(1), T(0), k);
          math.add_scaled(total, row, T(1), k);
        }
      }
    });
    double largest = 0;
    totals.each_total([&](int64_t column, double total) {
      largest = std::max(largest, 1 / total);
      factors[column] = static_cast<T>(1 / total);
    });
    math.scale(factors.data(), static_cast<T>(1 / largest), k);
  }
  return factors;
}

// Rows in T, normalised if asked, those of each view below the ones before.
template <class scalar_t, class T>
Rows load_views(const std::vector<Tensor>& views, bool normalize) {
  const int64_t count = static_cast<int64_t>(views.size()), n = views[0].size(0), d = views[0].size(1);
  const auto acc = views[0].options().dtype(c10::CppTypeToScalarType<T>::value);
  Rows rows{pooled({count * n, d}, acc), pooled({normalize ? count * n : 0}, acc), 0, {}};
  T* const unit = rows.values.template mutable_data_ptr<T>();
  T* const rnorm = rows.rnorm.template mutable_data_ptr<T>();
  at::parallel_for(0, count * n, rows_per_task(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tensor& view = views[i / n];
      const scalar_t* in = view.const_data_ptr<scalar_t>() + i % n * view.stride(0);
      const double r = load_row<scalar_t, T>(unit + i * d, in, d, normalize).rnorm;
      if (normalize) rnorm[i] = static_cast<T>(r);
    }
  });
  return rows;
}

// The teacher's probabilities, row by row: what is there of them before, and how a row becomes one.
template <class T>
struct Codes {
  Tensor rows;  // (A * N, K)
  // Of a teacher with views of its own: their logits lack these factors of columns.
  std::vector<T> factors;
  // Of SwAV, for each view: terms and what they are to be multiplied with, or logits and potentials.
  std::vector<std::optional<std::vector<T>>> scaled;
  std::vector<Tensor> biases;
};

template <class T>
Codes<T> codes_of_teacher(const ClusterCall& call) {
  const Rows rows = load_views<T, T>(call.teacher, call.normalize_rows);
  auto prototypes = load_prototypes<T, T>(call.teacher_prototypes, call.normalize_columns);
  Codes<T> codes;
  codes.rows = pooled({rows.values.size(0), prototypes.values.size(0)}, rows.values.options());
  at::mm_out(codes.rows, rows.values, prototypes.values.t());
  codes.factors = std::move(prototypes.factor);
  codes.scaled.resize(call.teacher.size());
  codes.biases.assign(call.teacher.size(), call.bias);
  return codes;
}

// Of the student's products z (V * N, K) with the prototypes, whose rows of assigned views get `factor`.
template <class T>
Codes<T> codes_by_sinkhorn(const ClusterCall& call, T* z, const T* factor, int64_t n, int64_t k) {
  const int64_t teachers = static_cast<int64_t>(call.assign.size());
  Codes<T> codes;
  codes.rows = pooled({teachers * n, k}, call.prototypes.options().dtype(c10::CppTypeToScalarType<T>::value));
  std::vector<Range<T>> ranges(n);
  for (int64_t a = 0; a < teachers; ++a) {
    T* const products = z + call.assign[a] * n * k;
    each_block(n, 1, k, [&](int64_t i, int64_t, int64_t) {
      ranges[i] = column_math<T>().weigh(products + i * k, factor, k);
    });
    Range<T> range = ranges[0];
    for (const Range<T>& of_row : ranges) {
      range.least = of_row.least < range.least ? of_row.least : range.least;
      range.most = of_row.most > range.most ? of_row.most : range.most;
      if (std::isnan(of_row.most)) range = of_row;
      if (std::isnan(range.most)) break;
    }
    T* const terms = codes.rows.template mutable_data_ptr<T>() + a * n * k;
    codes.scaled.push_back(call.potentials_only ? std::nullopt
                                                : scaled_columns(terms, products, range, call.steepness, n, k,
                                                                 call.iterations));
    codes.biases.emplace_back();
    if (codes.scaled.back()) continue;
    each_block(n, 1, k, [&](int64_t i, int64_t, int64_t) {
      mixing_math<T>().scale(terms + i * k, products + i * k, static_cast<T>(call.steepness), k);
    });
    codes.biases.back() = call.potentials(codes.rows.narrow(0, a * n, n)).contiguous();
  }
  return codes;
}

template <class scalar_t, class T>
ClusterResult run(const ClusterCall& call, const double* weights, bool rows_need_grad, bool columns_need_grad,
                  bool scale_needs_grad) {
  const bool differentiate = rows_need_grad || columns_need_grad || scale_needs_grad;
  const int64_t views = static_cast<int64_t>(call.views.size());
  const int64_t n = call.views[0].size(0), d = call.views[0].size(1), k = call.prototypes.size(0);
  const auto acc = call.prototypes.options().dtype(c10::CppTypeToScalarType<T>::value);
  const auto& math = tile_math<T>();
  const auto& columns = column_math<T>();

  const auto prototypes = load_prototypes<scalar_t, T>(call.prototypes, call.normalize_columns);
  const Rows rows = load_views<scalar_t, T>(call.views, call.normalize_rows);
  const Tensor logits = pooled({views * n, k}, acc);
  {
    Tensor out = logits;
    at::mm_out(out, rows.values, prototypes.values.t());
  }
  T* const z = logits.template mutable_data_ptr<T>();
  const T* const factor = prototypes.factor.data();

  const bool has_teacher = !call.teacher.empty();
  const auto codes = has_teacher ? codes_of_teacher<T>(call) : codes_by_sinkhorn(call, z, factor, n, k);
  std::vector<char> is_weighed(views, false);  // whether its rows have got `factor`
  if (!has_teacher)
    for (const int64_t view : call.assign) is_weighed[view] = true;
  const int64_t teachers = codes.rows.size(0) / n;
  const Targets targets(views, call.pairs);
  const int64_t samples = std::max<int64_t>(1, kBlockRows / views);
  const double share = 2. / static_cast<double>(call.pairs.size());
  ClusterResult made;
  made.losses = at::empty({n}, acc.dtype(at::kDouble));
  double* const loss = made.losses.template mutable_data_ptr<double>();
  ColumnTotals<T> along(differentiate ? n : 0, samples, k);
  each_block(n, samples, (views + teachers) * k, [&](int64_t block, int64_t begin, int64_t end) {
    std::vector<T> scratch((targets.sets() + 1) * k);
    T* const products = scratch.data() + targets.sets() * k;
    std::vector<T*> code(teachers);
    std::vector<const T*> sums(targets.sets());
    for (int64_t i = begin; i < end; ++i) {
      loss[i] = 0;
      for (int64_t a = 0; a < teachers; ++a) {
        code[a] = codes.rows.template mutable_data_ptr<T>() + (a * n + i) * k;
        if (codes.scaled[a]) {
          const T* const scaled = codes.scaled[a]->data();
          columns.weighted(code[a], code[a], scaled, static_cast<T>(1 / math.dot(code[a], scaled, k)), k);
          continue;
        }
        if (has_teacher)
          columns.weighted(code[a], code[a], codes.factors.data(), static_cast<T>(call.steepness), k);
        const Tensor& added = codes.biases[a];
        const T* const bias = added.defined() ? added.template const_data_ptr<T>() : nullptr;
        loss[i] += softmax(code[a], bias, k, call.less_entropy ? products : nullptr) * targets.met(a);
      }
      targets.add_up(sums, code, scratch.data(), k);
      for (int64_t v = 0; v < views; ++v) {
        T* const row = z + (v * n + i) * k;
        if (!targets.count(v)) {
          if (differentiate) std::fill_n(row, k, T(0));
          continue;
        }
        if (is_weighed[v])
          std::copy_n(row, k, products);
        else
          columns.weighted(products, row, factor, T(1), k);
        mixing_math<T>().scale(row, products, static_cast<T>(call.scale), k);
        const double weight = differentiate ? share * weights[i] * call.scale : 1;
        loss[i] += view_loss(row, sums[targets.set_of(v)], targets.count(v), k, differentiate,
                             static_cast<T>(weight));
        if (!differentiate) continue;
        columns.add_products(along.of(block), row, products, k);
        columns.weighted(row, row, factor, T(1), k);
      }
      loss[i] = loss[i] < 0 ? 0 : loss[i] * share;  // below it by rounding alone; NaN stays
    }
  });
  if (!differentiate) return made;

  std::vector<double> radial(k);
  along.each_total([&](int64_t column, double total) {
    radial[column] = total;
    made.grad_scale += total / call.scale;
  });
  if (rows_need_grad) {
    Tensor by_unit = pooled({views * n, d}, acc);
    at::mm_out(by_unit, logits, prototypes.values);
    made.grad_rows =
        finish_gradient<T, T>(by_unit, rows, 1, acc, /*has_rnorm=*/false, /*wants_dots=*/false).values;
  }
  if (columns_need_grad) {
    made.grad_columns = pooled({k, d}, acc);
    at::mm_out(made.grad_columns, logits.t(), rows.values);
    T* const out = made.grad_columns.template mutable_data_ptr<T>();
    const T* const y = prototypes.values.template const_data_ptr<T>();
    const T clamped = static_cast<T>(1 / kNormEpsilon);
    at::parallel_for(0, call.normalize_columns ? k : 0, rows_per_task(d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        // What is there has `factor` already, and so has its dot with y^ once.
        const T left = prototypes.rnorm[i] / factor[i];
        const bool on_sphere = prototypes.rnorm[i] != clamped;
        if (on_sphere)
          math.project_out(out + i * d, y + i * d, left,
                           static_cast<T>(radial[i] * factor[i] * factor[i]), d);
        else
          math.scale(out + i * d, left, d);
      }
    });
  }
  return made;
}

}  // namespace

ClusterResult cluster_loss(const ClusterCall& call, const Tensor& weights, bool rows_need_grad,
                           bool columns_need_grad, bool scale_needs_grad) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Tensor each = weights.contiguous();
  return SSL_KERNELS_DISPATCH(call.prototypes.scalar_type(), "cluster_loss", [&] {
    return run<scalar_t, acc_t>(call, each.const_data_ptr<double>(), rows_need_grad, columns_need_grad,
                                scale_needs_grad);
  });
}

}  // namespace ssl_kernels::cpu
