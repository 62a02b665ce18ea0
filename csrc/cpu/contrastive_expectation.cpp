// contrastive where the columns need no gradient. x^, y^ the rows and columns, s_ij = scale * <x^_i, y^_j>,
//   lse_i = log sum_{j allowed} exp(s_ij)        E_i = sum_{j allowed} exp(s_ij - lse_i) y^_j
// in one pass over the columns, attention with V = K: E_i is d lse_i / d(scale * x^_i), so that backward is
// O(N*D).
// Tiling: tiles of at most 256 x 256 logits in a scratch per thread. A task is one block of rows with one
//   part of the columns, and adds up E for it; where there are fewer blocks of rows than threads, the
//   columns fall into as many parts as there are threads, which are merged in their order. Every sum has
//   one owner: no atomics, and the same bits for the same number of threads.
// Work: 2 * 2*N*M*D operations (half where no backward follows: without E), one exponential per entry, each
//   tile's columns packed twice (packed.h) or transposed (small products read their right operand by rows,
//   product.h).
// Memory: rows in acc_t and E (2*N*D), one more E a part but the first, and a thread 256 KB of logits and 3
//   tiles of columns. Columns in acc_t that need no normalisation are read where they lie: once per block of
//   rows.
// Numerics: products, softmax and sums over a tile in acc_t (float32, float64 for float64), sums over tiles
//   in double. Each row has a running maximum: a tile that raises it rescales what the row has added up so
//   far. Where the processor multiplies bfloat16 numbers, bfloat16 rows and columns are multiplied as they
//   came, with the reciprocal norms as factors afterwards, and E adds up exponentials rounded to bfloat16,
//   once and each by 2^-8 of itself, while lse adds up what they were. A tile with columns of extreme length
//   is multiplied in float32.
#include "contrastive_expectation.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "additions.h"
#include "packed.h"
#include "pairs.h"
#include "pool.h"
#include "product.h"
#include "rows.h"
#include "schedule.h"
#include "tile_math.h"
#include "tiles.h"

namespace ssl_kernels::cpu {
namespace {

constexpr int64_t kPad = 16;

// The columns a tile at a time, in acc_t and normalised if asked: where they lie, or converted into scratch.
template <class acc_t>
class ColumnReader {
 public:
  ColumnReader(const at::Tensor& columns, bool normalize)
      : d_(columns.size(1)),
        source_(with_neighbours(columns)),
        normalize_(normalize),
        in_place_(!normalize && source_.scalar_type() == c10::CppTypeToScalarType<acc_t>::value &&
                  source_.stride(0) >= d_),
        rnorm(pooled({normalize ? columns.size(0) : 0},
                     columns.options().dtype(c10::CppTypeToScalarType<acc_t>::value))) {}

  // Elements of scratch for a tile.
  int64_t scratch_size() const { return in_place_ ? 0 : kLargestTile * d_; }

  struct View {
    const acc_t* values;
    int64_t ld;
    bool in_range = false;  // whether bfloat16 columns may be multiplied as they are
  };

  // With `note`, the reciprocal norms are written to `rnorm`; `factor`, unless it is null, gets them in any
  // case.
  View read(Block block, acc_t* scratch, bool note, acc_t* factors = nullptr) const {
    if (in_place_)
      return {source_.template const_data_ptr<acc_t>() + block.begin * source_.stride(0), source_.stride(0)};
    bool in_range = true;
    dispatch_storage<acc_t>(source_.scalar_type(), [&](auto storage) {
      using scalar_t = decltype(storage);
      const scalar_t* in = source_.template const_data_ptr<scalar_t>();
      acc_t* out_rnorm =
          note && normalize_ ? rnorm.template mutable_data_ptr<acc_t>() + block.begin : nullptr;
      for (int64_t k = 0; k < block.size; ++k) {
        const RowNorm norm = load_row<scalar_t, acc_t>(
            scratch + k * d_, in + (block.begin + k) * source_.stride(0), d_, normalize_);
        if (out_rnorm) out_rnorm[k] = norm.rnorm;
        if (factors) factors[k] = norm.rnorm;
        in_range &= is_in_range(norm.length);
      }
    });
    return {scratch, d_, in_range};
  }

  bool is_bfloat16() const { return source_.scalar_type() == at::kBFloat16; }

  // bfloat16 columns as they lie, one after the other in units of two numbers: in place, or copied into
  // scratch.
  struct Raw {
    const uint32_t* units = nullptr;
    int64_t ld = 0;
  };
  Raw raw(Block block, uint32_t* scratch) const {
    const char* from =
        static_cast<const char*>(source_.const_data_ptr()) + block.begin * source_.stride(0) * 2;
    if (d_ % 2 == 0 && source_.stride(0) % 2 == 0 &&
        reinterpret_cast<uintptr_t>(from) % sizeof(uint32_t) == 0) {
      return {reinterpret_cast<const uint32_t*>(from), source_.stride(0) / 2};
    }
    const int64_t ld = padded_units(d_);
    for (int64_t k = 0; k < block.size; ++k) {
      char* to = reinterpret_cast<char*>(scratch + k * ld);
      std::memcpy(to, from + k * source_.stride(0) * 2, 2 * d_);
      std::memset(to + 2 * d_, 0, sizeof(uint32_t) * ld - 2 * d_);
    }
    return {scratch, ld};
  }

 private:
  int64_t d_;
  at::Tensor source_;
  bool normalize_, in_place_;

 public:
  at::Tensor rnorm;
};

// c (m, n) = a (m, k) * b (k, n), or += with `add`, by the BLAS; with b_is_transposed b lies as (n, k).
template <class acc_t>
void blas(int64_t m, int64_t n, int64_t k, const acc_t* a, int64_t ld_a, const acc_t* b, int64_t ld_b,
          bool b_is_transposed, acc_t* c, int64_t ld_c, bool add, const at::TensorOptions& options) {
  const auto matrix = [&](const acc_t* data, int64_t rows, int64_t columns, int64_t ld) {
    return at::from_blob(const_cast<acc_t*>(data), {rows, columns}, {ld, 1}, options);
  };
  at::Tensor out = matrix(c, m, n, ld_c);
  const at::Tensor right = b_is_transposed ? matrix(b, n, k, ld_b).t() : matrix(b, k, n, ld_b);
  at::addmm_out(out, out, matrix(a, m, k, ld_a), right, add ? 1 : 0, 1);
}

// What one task knows of its rows: the running maximum, the sum of 2^(s - top), and E times that sum.
template <class acc_t>
struct Part {
  acc_t* top;
  double *total, *lost;  // lost: what E lacks along x^ since exponentials were rounded, times scale * log2 e
  acc_t* sums;  // (rows, D)
};

template <class acc_t>
ContrastiveFwd forward(const ContrastiveArgs& args) {
  const Rows rows = load_rows_of<acc_t>(args.rows, args.normalize_rows);
  const ColumnReader<acc_t> columns(*args.columns, args.normalize_columns);
  const auto& math = tile_math<acc_t>();
  const auto options = rows.values.options();
  const int64_t n = rows.values.size(0), d = rows.values.size(1), m = args.columns->size(0);
  const Pairs pairs(args);
  const Additions<acc_t> additions(args, kLn2);
  const double scale = without_payload(*args.scale.const_data_ptr<acc_t>());
  // The rows take the factor: a BLAS may take one that is NaN for 1.
  acc_t* x = rows.values.template mutable_data_ptr<acc_t>();
  math.scale(x, static_cast<acc_t>(scale * kLog2E), n * d);

  const int64_t threads = n * m <= kLargestTile * kLargestTile ? 1 : at::get_num_threads();
  int64_t blocks = (n + kLargestTile - 1) / kLargestTile;
  if (blocks >= threads) blocks = (blocks + threads - 1) / threads * threads;
  const Blocks row_blocks{
      n, std::min<int64_t>(kLargestTile, ((n + blocks - 1) / blocks + kPad - 1) / kPad * kPad)};
  const Blocks column_blocks{m, std::min<int64_t>(kLargestTile, (m + kPad - 1) / kPad * kPad)};
  const int64_t parts = row_blocks.count() >= threads ? 1 : std::min(threads, column_blocks.count());

  const int64_t width = args.keep ? d : 0;  // of E
  const at::Tensor kept = args.keep ? pooled({n, d}, options) : pooled({0}, options);
  const at::Tensor other_sums = pooled({parts - 1, n, width}, options);
  std::vector<acc_t> tops(parts * n, -std::numeric_limits<acc_t>::infinity());
  std::vector<double> totals(parts * n, 0.), losts(parts * n, 0.);
  acc_t* first_sums = kept.template mutable_data_ptr<acc_t>();
  acc_t* more_sums = other_sums.template mutable_data_ptr<acc_t>();
  const auto part_of = [&](int64_t part, int64_t row) {
    acc_t* sums = part ? more_sums + (part - 1) * n * width : first_sums;
    return Part<acc_t>{tops.data() + part * n + row, totals.data() + part * n + row,
                       losts.data() + part * n + row, sums + row * width};
  };
  at::Tensor positive_logits = pooled(args.positives ? args.positives->sizes() : at::IntArrayRef({0}),
                                         options.dtype(at::kDouble));
  double* positive = positive_logits.mutable_data_ptr<double>();

  const bool small = has_small_products<acc_t>();
  const Precision precision = std::min(rows.precision, allowed_precision(args.columns->scalar_type()));
  const bool in_bfloat16 = rows.units.defined() && columns.is_bfloat16() && !changes_logits(args.additions);
  const bool packs = std::is_same_v<acc_t, float> && (in_bfloat16 || packed::is_chosen_for_float32());
  const int64_t ld = column_blocks.size + kPad, rounded_ld = (column_blocks.size + 1) / 2 + kPad;
  const int64_t tile_size = row_blocks.size * ld;
  const int64_t transposed_size =
      packs   ? std::max(packed::size_of(d, kLargestTile), packed::size_of(kLargestTile, d))
      : small ? d * ld
              : 0;
  const int64_t units_size = in_bfloat16 ? row_blocks.size * rounded_ld + kLargestTile * padded_units(d) : 0;
  const int64_t scratch_size = tile_size + transposed_size + columns.scratch_size() + units_size;
  // What the dot products of bfloat16 rows as they came take, and what their coefficients do.
  std::vector<acc_t> row_factor(in_bfloat16 ? n : 0, static_cast<acc_t>(scale * kLog2E)),
      ones(in_bfloat16 ? d : 0, 1);
  if (in_bfloat16 && args.normalize_rows)
    for (int64_t i = 0; i < n; ++i)
      row_factor[i] = static_cast<acc_t>(scale * kLog2E * rows.rnorm.template const_data_ptr<acc_t>()[i]);
  const int64_t tasks = row_blocks.count() * parts;
  const at::Tensor scratch = pooled({std::min(threads, tasks), scratch_size}, options);

  using View = typename ColumnReader<acc_t>::View;
  using Raw = typename ColumnReader<acc_t>::Raw;
  const auto run = [&](int64_t task, int thread) {
    const c10::InferenceMode below_autograd;
    const int64_t block_i = task / parts, number = task % parts;
    const Block i = row_blocks[block_i];
    const Part<acc_t> part = part_of(number, i.begin);
    acc_t* s = scratch.template mutable_data_ptr<acc_t>() + thread * scratch_size;
    acc_t* transposed = s + tile_size;
    const acc_t* rows_here = x + i.begin * d;
    std::vector<acc_t> before(i.size), sum(i.size), of_top(i.size), per_top(i.size);
    // As packed products; the columns' tile lies in `y`, of bfloat16 ones as they came in `raw`.
    uint32_t* const panels = reinterpret_cast<uint32_t*>(transposed);
    uint32_t* const rounded = panels + transposed_size + columns.scratch_size();
    const auto multiply_packed = [&](Block j, const View& y, const Raw& raw, const acc_t* factors) {
      if constexpr (!std::is_same_v<acc_t, double>) {
        if (raw.units) {
          const int64_t stride = rows.units.stride(0), pairs_of_features = (d + 1) / 2;
          packed::pack_transposed(raw.units, raw.ld, j.size, pairs_of_features, panels);
          packed::multiply(
              true, {i.size, j.size, pairs_of_features,
                     static_cast<const uint32_t*>(rows.units.const_data_ptr()) + i.begin * stride, stride, 1,
                     panels, s, ld, false, row_factor.data() + i.begin, factors});
        } else {
          packed::pack_transposed(reinterpret_cast<const uint32_t*>(y.values), y.ld, j.size, d, panels);
          packed::multiply(false, {i.size, j.size, d, reinterpret_cast<const uint32_t*>(rows_here), d, 1,
                                   panels, s, ld, false});
        }
      }
    };
    const auto add_packed = [&](Block j, const View& y, const Raw& raw, const acc_t* factors, bool add) {
      if constexpr (!std::is_same_v<acc_t, double>) {
        if (raw.units) {
          // Of normalised columns the exponentials take the reciprocal norms, in units of that of the row's
          // top: as 1 it loses nothing by rounding, and a softmax near its target is as near to it as it was.
          const bool normalized = args.normalize_columns;
          for (int64_t k = 0; normalized && k < i.size; ++k) {
            const acc_t* row = s + k * ld;
            const int64_t at =
                before[k] == part.top[k] ? j.size : std::find(row, row + j.size, acc_t(1)) - row;
            of_top[k] = at < j.size ? factors[at] : acc_t(1);
            per_top[k] = 1 / of_top[k];
          }
          acc_t inverse[kLargestTile], coefficients[kLargestTile], products[kLargestTile];
          for (int64_t k = 0; normalized && k < j.size; ++k) inverse[k] = 1 / factors[k];
          packed::round_to_bfloat16(
              s, ld, i.size, j.size, normalized ? per_top.data() : nullptr, factors, rounded, rounded_ld,
              nullptr, 0,
              {s, ld, /*exponentials=*/true, normalized ? inverse : nullptr, coefficients, products});
          for (int64_t k = 0; k < i.size; ++k)
            if (std::isfinite(part.top[k]))
              part.lost[k] +=
                  (products[k] + double(part.top[k]) * coefficients[k]) * (normalized ? of_top[k] : 1);
          packed::pack_bfloat16(reinterpret_cast<const uint16_t*>(raw.units), 2 * raw.ld, j.size, d, panels);
          packed::multiply(true,
                           {i.size, d, (j.size + 1) / 2, rounded, rounded_ld, 1, panels, part.sums, d, add,
                            normalized ? of_top.data() : nullptr, normalized ? ones.data() : nullptr});
        } else {
          packed::pack_float32(y.values, y.ld, j.size, d, panels);
          packed::multiply(false, {i.size, d, j.size, reinterpret_cast<const uint32_t*>(s), ld, 1, panels,
                                   part.sums, d, add});
        }
      }
    };
    const int64_t first = number * column_blocks.count() / parts,
                  last = (number + 1) * column_blocks.count() / parts;
    for (int64_t block_j = first; block_j < last; ++block_j) {
      const Block j = column_blocks[block_j];
      acc_t factors[kLargestTile];
      const auto y = columns.read(j, transposed + transposed_size, block_i == 0, factors);
      const Raw raw =
          in_bfloat16 && y.in_range ? columns.raw(j, rounded + row_blocks.size * rounded_ld) : Raw{};
      if (packs) {
        multiply_packed(j, y, raw, factors);
      } else if (small) {
        math.transpose(y.values, y.ld, transposed, ld, j.size, d);
        multiply_small<acc_t>(i.size, j.size, d, rows_here, d, transposed, ld, s, ld, false, precision);
      } else {
        blas(i.size, j.size, d, rows_here, d, y.values, y.ld, true, s, ld, false, options);
      }
      pairs.for_each_positive(i, j, [&](int64_t k, int64_t row, int64_t column) {
        positive[k] = kLn2 * s[(row - i.begin) * ld + column - j.begin];
      });
      additions.limit(pairs, s, ld, i, j, /*of_columns=*/false);
      pairs.mask(s, ld, i, j);
      additions.add(s, ld, i, j, /*of_columns=*/false);
      std::copy_n(part.top, i.size, before.data());
      math.softmax_rows(s, ld, i.size, j.size, part.top, sum.data());
      for (int64_t k = 0; k < i.size; ++k) {
        if (before[k] != part.top[k] && block_j != first) {
          const acc_t factor = std::exp2(before[k] - part.top[k]);  // 0 for the first entries of a row
          part.total[k] *= factor;
          part.lost[k] *= factor;
          math.scale(part.sums + k * width, factor, width);
        }
        part.total[k] += sum[k];
      }
      if (!args.keep) continue;
      if (packs)
        add_packed(j, y, raw, factors, block_j != first);
      else if (small)
        multiply_small<acc_t>(i.size, d, j.size, s, ld, y.values, y.ld, part.sums, d, block_j != first,
                              precision);
      else
        blas(i.size, d, j.size, s, ld, y.values, y.ld, false, part.sums, d, block_j != first, options);
    }
  };
  if (threads == 1)
    for (int64_t task = 0; task < tasks; ++task) run(task, 0);
  else
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) run(task, at::get_thread_num());
    });

  const at::Tensor lse = pooled({n}, options.dtype(at::kDouble));
  double* out = lse.mutable_data_ptr<double>();
  const auto merge = [&](int64_t row) {
    const Part<acc_t> into = part_of(0, row);
    double top = *into.top;
    for (int64_t p = 1; p < parts; ++p) top = std::max<double>(top, *part_of(p, row).top);
    double total = 0, lost = 0;
    for (int64_t p = 0; p < parts; ++p) {
      const Part<acc_t> part = part_of(p, row);
      // A part in which nothing is allowed has no maximum.
      const double weight = *part.total == 0 ? 0 : std::exp2(*part.top - top);
      total += *part.total * weight;
      if (weight != 0) lost += *part.lost * weight;
      if (p == 0) {
        if (weight != 1) math.scale(into.sums, static_cast<acc_t>(weight), width);
      } else {
        math.add_scaled(into.sums, part.sums, static_cast<acc_t>(weight), width);
      }
    }
    out[row] = total == 0 ? -std::numeric_limits<double>::infinity() : kLn2 * (top + std::log2(total));
    if (total != 0) math.scale(into.sums, static_cast<acc_t>(1 / total), width);
    if (!in_bfloat16 || total == 0 || width == 0) return;
    // The gradient of scale is made of <x^, E>.
    const acc_t* scaled = x + row * d;
    const double square = math.dot(scaled, scaled, d);
    if (square > 0) math.add_scaled(into.sums, scaled, static_cast<acc_t>(lost / total / square), width);
  };
  at::parallel_for(0, n, rows_per_task(d), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) merge(row);
  });
  return {lse, pooled({0}, options.dtype(at::kDouble)), positive_logits, rows.rnorm, columns.rnorm, kept};
}

template <class scalar_t, class acc_t>
ContrastiveBwd backward(const ContrastiveArgs& args, const ContrastiveSaved& saved) {
  const Rows rows = load_rows<scalar_t, acc_t>(args.rows, args.normalize_rows);
  const auto options = rows.values.options();
  const int64_t n = rows.values.size(0), d = rows.values.size(1);
  const double scale = *args.scale.const_data_ptr<acc_t>();
  const at::Tensor kept = saved.kept.contiguous();
  const at::Tensor grad = pooled({n, d}, options);
  const at::Tensor grad_lse = saved.grad_lse ? saved.grad_lse->contiguous() : at::Tensor();
  at::Tensor grad_positive;
  Rows columns;
  if (args.positives && saved.grad_positive_logits && args.positives->numel()) {
    TORCH_CHECK(args.columns, "contrastive: columns must be given with positives and their gradient");
    grad_positive = saved.grad_positive_logits->contiguous();
    const int64_t m = args.columns->size(0);
    const at::Tensor index = args.positives->reshape({-1}).remainder(m);
    columns = load_rows_of<acc_t>(at::index_select(*args.columns, 0, index), args.normalize_columns);
  }
  const acc_t* expectation = kept.template const_data_ptr<acc_t>();
  const double* g = grad_lse.defined() ? grad_lse.const_data_ptr<double>() : nullptr;
  const double* q = grad_positive.defined() ? grad_positive.const_data_ptr<double>() : nullptr;
  const acc_t* y = q ? columns.values.template const_data_ptr<acc_t>() : nullptr;
  const int64_t positives_per_row = q ? grad_positive.numel() / n : 0;
  const double* lse = saved.lse.const_data_ptr<double>();
  acc_t* out = grad.template mutable_data_ptr<acc_t>();
  const auto& math = tile_math<acc_t>();
  at::parallel_for(0, n, rows_per_task(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::fill_n(out + i * d, d, acc_t(0));
      if (g && g[i] != 0 && lse[i] != -std::numeric_limits<double>::infinity())
        math.add_scaled(out + i * d, expectation + i * d, static_cast<acc_t>(g[i]), d);
      for (int64_t k = i * positives_per_row; k < (i + 1) * positives_per_row; ++k)
        if (q[k] != 0) math.add_scaled(out + i * d, y + k * d, static_cast<acc_t>(q[k]), d);
    }
  });
  const InputGradient by_rows = finish_gradient<scalar_t, acc_t>(grad, rows, scale, args.rows.options());
  const auto none = [&] { return pooled({0}, args.rows.options()); };
  const at::Tensor no_bias = pooled({0}, options);
  return {saved.rows_need_grad ? by_rows.values : none(), none(), number<acc_t>(by_rows.dots), no_bias,
          no_bias.clone()};
}

}  // namespace

ContrastiveFwd contrastive_expectation_fwd(const ContrastiveArgs& args) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return args.rows.scalar_type() == at::kDouble ? forward<double>(args) : forward<float>(args);
}

ContrastiveBwd contrastive_expectation_bwd(const ContrastiveArgs& args, const ContrastiveSaved& saved) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return SSL_KERNELS_DISPATCH(args.rows.scalar_type(), "contrastive_bwd",
                              [&] { return backward<scalar_t, acc_t>(args, saved); });
}

}  // namespace ssl_kernels::cpu
