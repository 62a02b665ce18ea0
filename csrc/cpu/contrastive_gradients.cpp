// contrastive in one direction, where columns and rows need gradients and the rows' losses are added up or
// averaged. With p_ij = exp(s_ij - lse_i), 0 where (i, j) is left out, and c_ij = p_ij less 1 where j is the
// one positive of row i:
//   forward   lse_i;  X_i = sum_j c_ij y^_j,  Y_j = sum_i c_ij x^_i,  b_j = sum_i p_ij
//   backward  g times these, g being the gradient of every lse_i, plus what positives' logits get beyond -g
// Both gradients are made while the logits of a block of rows are there, all of them: 3 units of 2*N*M*D
// operations in all, and nothing of N x M is kept. Where the gradients of the lse turn out to differ from row
// to row, backward is the one of contrastive.cpp, which needs nothing of these.
// Tiling: blocks of up to 256 rows, one after the other; the threads share the columns of each. Tiles lie
//   transposed, columns by rows, in panels of 64 rows: that is a right operand of packed.h as it lies, and a
//   left one, so that the columns are read where they are and only the rows of the block are packed. First
//   every tile is multiplied and turned into exponentials relative to what is the largest so far; then, the
//   sums of rows known, into p and c, and both products follow. Y_j has one owner, and what the threads add
//   up for X_i is merged in their order: no atomics, and the same bits for the same number of threads.
// Work: one exponential per entry.
// Traffic: a block of rows reads the columns twice and Y once and writes it, 16 bytes for 6 * 256 operations;
//   its logits are written and read twice, 16 bytes for 6 * D operations.
// Memory: X, Y and b (N*D + M*D + M), the columns normalised (M*D), the logits of a block (kScratch) and, a
//   thread, X of a block.
// Numerics: float32 throughout, sums over tiles of exponentials in double.
// One file, although a long one: what forward keeps, and in which layout, backward alone reads.
#include "contrastive_gradients.h"

#include <ATen/Parallel.h>
#include <c10/core/Storage.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
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

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kPanel = packed::kPanel, kLargestBlock = 256, kTileColumns = 256;
// Bytes of a block's logits, or a quarter of what is kept where that is more.
constexpr int64_t kScratch = 16 << 20;
constexpr int64_t kColumnsOfThread = 128, kMostThreads = 8;
// Gradients that differ by less, of themselves, are the same.
constexpr double kSame = 1e-9;
// What `kept` shows first, where tiles show their size.
constexpr float kMark = -1;

// Rows of a block, or 0 where the logits of the smallest would be too many.
int64_t rows_of_block(int64_t n, int64_t m, int64_t d) {
  const int64_t bytes = std::max<int64_t>(kScratch, (n + m) * d);
  const int64_t fitting = bytes / (m * static_cast<int64_t>(sizeof(float))) / kPanel * kPanel;
  return std::min({kLargestBlock, fitting, packed::rounded_up(n, packed::kLanes)});
}

// X, Y and b behind the header of `kept`.
struct Gradients {
  float *by_rows, *by_columns, *by_bias;
};

int64_t room_for(int64_t n, int64_t m, int64_t d) { return (n + m) * d + m; }

at::Tensor kept_gradients(int64_t n, int64_t m, int64_t d, const at::TensorOptions& options) {
  const at::Tensor all = pooled({kKeptHeader + room_for(n, m, d)}, options);
  float* header = all.mutable_data_ptr<float>();
  std::fill_n(header, kKeptHeader, 0.f);
  header[0] = kMark;
  at::Tensor kept = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(all.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), options.dtype());
  kept.unsafeGetTensorImpl()->set_sizes_contiguous({kKeptHeader});
  return kept;
}

// Nothing where `kept` is of another kind, or a copy, which has its header alone.
std::optional<Gradients> gradients_in(const at::Tensor& kept, int64_t n, int64_t m, int64_t d) {
  if (!comes_from_gradients(kept) || room_of<float>(kept) < room_for(n, m, d)) return std::nullopt;
  float* x = kept.mutable_data_ptr<float>() + kKeptHeader;
  return Gradients{x, x + n * d, x + (n + m) * d};
}

// Rows of any storage type, one at a time in float32 and normalised if asked.
class RowReader {
 public:
  RowReader(const at::Tensor& rows, bool normalize)
      : d_(rows.size(1)), normalize_(normalize), source_(with_neighbours(rows)) {}

  RowNorm read(int64_t i, float* out) const {
    return dispatch_storage<float>(source_.scalar_type(), [&](auto storage) {
      using scalar_t = decltype(storage);
      const scalar_t* in = source_.template const_data_ptr<scalar_t>() + i * source_.stride(0);
      return load_row<scalar_t, float>(out, in, d_, normalize_);
    });
  }

 private:
  int64_t d_;
  bool normalize_;
  at::Tensor source_;
};

// Logits of one block of rows: panels of 64 rows, each (M, width) with a leading dimension of whole vectors.
class Panels {
 public:
  Panels(int64_t rows, int64_t m, const at::TensorOptions& options)
      : m_(m), logits_(pooled({packed::rounded_up(rows, packed::kLanes) * m}, options)) {}

  // For the block of rows that follows.
  void begin(Block i) { i_ = i; }

  int64_t count() const { return (i_.size + kPanel - 1) / kPanel; }
  Block rows(int64_t panel) const {
    return {i_.begin + panel * kPanel, std::min(kPanel, i_.size - panel * kPanel)};
  }
  int64_t ld(int64_t panel) const { return packed::rounded_up(rows(panel).size, packed::kLanes); }
  float* tile(int64_t panel, Block j) const {
    return logits_.mutable_data_ptr<float>() + panel * kPanel * m_ + j.begin * ld(panel);
  }
  float& at(int64_t row, int64_t column) const {
    const int64_t panel = (row - i_.begin) / kPanel;
    return tile(panel, {column, 1})[(row - i_.begin) % kPanel];
  }

 private:
  int64_t m_;
  at::Tensor logits_;
  Block i_{0, 0};
};

const uint32_t* units(const float* values) { return reinterpret_cast<const uint32_t*>(values); }

class Forward {
 public:
  explicit Forward(const ContrastiveArgs& args)
      : args_(args),
        math_(tile_math<float>()),
        rows_(args.rows, args.normalize_rows),
        columns_(load_rows_of<float>(*args.columns, args.normalize_columns, /*may_borrow=*/true)),
        n_(args.rows.size(0)),
        m_(args.columns->size(0)),
        d_(args.rows.size(1)),
        options_(columns_.values.options()),
        scale_(without_payload(*args.scale.const_data_ptr<float>())),
        pairs_(args),
        additions_(args, kLn2),
        threads_(at::get_num_threads()),
        row_blocks_{n_, rows_of_block(n_, m_, d_)},
        tiles_{m_, tile_size()},
        panels_(row_blocks_.size, m_, options_),
        x_(pooled({row_blocks_.size, d_}, options_)),
        across_(pooled({packed::size_of(d_, row_blocks_.size)}, options_)),
        along_(pooled({(row_blocks_.size + kPanel - 1) / kPanel, packed::size_of(kPanel, d_)}, options_)),
        sums_(pooled({threads_, d_, row_blocks_.size}, options_)),
        top_(threads_ * row_blocks_.size),
        tile_top_(tiles_.count() * row_blocks_.size),
        total_(threads_ * row_blocks_.size),
        factor_(tiles_.count() * row_blocks_.size),
        kept(kept_gradients(n_, m_, d_, options_)),
        made_(*gradients_in(kept, n_, m_, d_)),
        by_bias_(args.additions.column_bias ? m_ : 0, 0.),
        row_rnorm(pooled({args.normalize_rows ? n_ : 0}, options_)),
        lse(pooled({n_}, options_.dtype(at::kDouble))) {
    const int64_t one_each[] = {args.partner >= 0 ? n_ : 0};
    positive_logits = pooled(args.positives ? args.positives->sizes() : at::IntArrayRef(one_each),
                             options_.dtype(at::kDouble));
  }

  // Whether every sum is finite, or empty.
  bool run() {
    for (int64_t block = 0; block < row_blocks_.count(); ++block) {
      const Block i = row_blocks_[block];
      panels_.begin(i);
      in_parallel(panels_.count(), [&](int64_t panel) { load(panel); });
      in_parallel(threads_, [&](int64_t thread) { sum_up(i, thread); });
      if (!merge_sums(i)) return false;
      in_parallel(threads_, [&](int64_t thread) { add_up(i, thread, block > 0); });
      in_parallel(panels_.count(), [&](int64_t panel) { merge_rows(i, panel); });
    }
    for (size_t j = 0; j < by_bias_.size(); ++j) made_.by_bias[j] = static_cast<float>(by_bias_[j]);
    settle();
    return true;
  }

  at::Tensor column_rnorm() const { return columns_.rnorm; }

 private:
  // As many tiles for each thread.
  int64_t tile_size() const {
    const int64_t count = (m_ + kTileColumns - 1) / kTileColumns;
    const int64_t even = (count + threads_ - 1) / threads_ * threads_;
    return std::min(kTileColumns, packed::rounded_up((m_ + even - 1) / even, packed::kLanes));
  }

  template <class Visit>
  static void in_parallel(int64_t count, const Visit& visit) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) visit(k);
    });
  }

  std::pair<int64_t, int64_t> tiles_of(int64_t thread) const {
    return {thread * tiles_.count() / threads_, (thread + 1) * tiles_.count() / threads_};
  }
  const float* columns(Block j) const { return columns_.values.const_data_ptr<float>() + j.begin * d_; }
  float* block_row(const at::Tensor& of, int64_t row) const {
    return of.mutable_data_ptr<float>() + row * d_;
  }
  const uint32_t* across(int64_t panel) const { return units(block_row(across_, panel * kPanel)); }
  uint32_t* along(int64_t panel) const {
    return reinterpret_cast<uint32_t*>(along_.mutable_data_ptr<float>() + panel * along_.stride(0));
  }

  // The rows of a panel: packed as they are to be added up, and with the scale to be multiplied.
  void load(int64_t panel) {
    const Block i = panels_.rows(panel);
    float* x = block_row(x_, panel * kPanel);
    for (int64_t k = 0; k < i.size; ++k) {
      const double rnorm = rows_.read(i.begin + k, x + k * d_).rnorm;
      if (args_.normalize_rows) row_rnorm.mutable_data_ptr<float>()[i.begin + k] = static_cast<float>(rnorm);
    }
    packed::pack_float32(x, d_, i.size, d_, along(panel));
    math_.scale(x, static_cast<float>(scale_ * kLog2E), i.size * d_);
    packed::pack_transposed(units(x), d_, i.size, d_, const_cast<uint32_t*>(across(panel)));
  }

  // Exponentials of a thread's tiles, each relative to the largest logit of its row up to there.
  void sum_up(Block i, int64_t thread) {
    float* const top = top_.data() + thread * row_blocks_.size;
    double* const total = total_.data() + thread * row_blocks_.size;
    std::fill_n(top, i.size, -std::numeric_limits<float>::infinity());
    std::fill_n(total, i.size, 0.);
    double* const positive = positive_logits.mutable_data_ptr<double>();
    float before[kPanel], sum[kPanel];
    const auto [first, last] = tiles_of(thread);
    for (int64_t number = first; number < last; ++number) {
      const Block j = tiles_[number];
      for (int64_t panel = 0; panel < panels_.count(); ++panel)
        packed::multiply(false,
                         {j.size, panels_.rows(panel).size, d_, units(columns(j)), d_, 1, across(panel),
                          panels_.tile(panel, j), panels_.ld(panel), false});
      pairs_.for_each_positive(i, j, [&](int64_t k, int64_t row, int64_t column) {
        positive[k] = kLn2 * panels_.at(row, column);
      });
      for (int64_t panel = 0; panel < panels_.count(); ++panel) {
        const Block rows = panels_.rows(panel);
        float* const s = panels_.tile(panel, j);
        const int64_t ld = panels_.ld(panel), at = panel * kPanel;
        additions_.limit_transposed(pairs_, s, ld, rows, j);
        pairs_.mask_transposed(s, ld, rows, j);
        additions_.add_transposed(s, ld, rows, j);
        std::copy_n(top + at, rows.size, before);
        math_.softmax_columns(s, ld, j.size, rows.size, top + at, sum);
        for (int64_t k = 0; k < rows.size; ++k) {
          if (before[k] != top[at + k]) total[at + k] *= std::exp2(before[k] - top[at + k]);
          total[at + k] += sum[k];
        }
      }
      std::copy_n(top, i.size, tile_top_.data() + number * row_blocks_.size);
    }
  }

  // The log-sum-exps of a block, and what the exponentials of each tile are to be multiplied by.
  bool merge_sums(Block i) {
    const int64_t size = row_blocks_.size;
    double* const out = lse.mutable_data_ptr<double>() + i.begin;
    for (int64_t k = 0; k < i.size; ++k) {
      float top = top_[k];
      for (int64_t thread = 1; thread < threads_; ++thread) top = std::max(top, top_[thread * size + k]);
      double total = 0;
      for (int64_t thread = 0; thread < threads_; ++thread)
        if (total_[thread * size + k] != 0)
          total += total_[thread * size + k] * std::exp2(static_cast<double>(top_[thread * size + k]) - top);
      if (!std::isfinite(total)) return false;
      out[k] = total == 0 ? -kInfinity : kLn2 * (top + std::log2(total));
      for (int64_t number = 0; number < tiles_.count(); ++number) {
        const float tile_top = tile_top_[number * size + k];
        const bool nothing = tile_top == -std::numeric_limits<float>::infinity();
        factor_[number * size + k] = nothing ? 0 : std::exp2(tile_top - top) / static_cast<float>(total);
      }
    }
    return true;
  }

  // What a thread's tiles add to the gradients, from the last one, which is still in a cache.
  void add_up(Block i, int64_t thread, bool add) {
    const auto [first, last] = tiles_of(thread);
    float* const sums = sums_.mutable_data_ptr<float>() + thread * sums_.stride(0);
    const double* const l = lse.const_data_ptr<double>();
    for (int64_t number = last - 1; number >= first; --number) {
      const Block j = tiles_[number];
      const float* const factor = factor_.data() + number * row_blocks_.size;
      for (int64_t panel = 0; panel < panels_.count(); ++panel) {
        const int64_t width = panels_.rows(panel).size, ld = panels_.ld(panel);
        float* const s = panels_.tile(panel, j);
        math_.scale_columns(s, ld, j.size, width, factor + panel * kPanel);
        if (by_bias_.empty()) continue;
        float sum[kTileColumns];
        math_.sums(s, ld, j.size, width, sum, nullptr);
        for (int64_t k = 0; k < j.size; ++k) by_bias_[j.begin + k] += sum[k];
      }
      if (pairs_.positives_per_row() == 1)
        pairs_.for_each_positive(i, j, [&](int64_t, int64_t row, int64_t column) {
          if (l[row] != -kInfinity) panels_.at(row, column) -= 1;
        });
      float* const by_columns = made_.by_columns + j.begin * d_;
      for (int64_t panel = 0; panel < panels_.count(); ++panel) {
        const int64_t width = panels_.rows(panel).size, ld = panels_.ld(panel);
        const uint32_t* const s = units(panels_.tile(panel, j));
        packed::multiply(false, {d_, width, j.size, units(columns(j)), 1, d_, s, sums + panel * kPanel,
                                 row_blocks_.size, number + 1 < last});
        packed::multiply(
            false, {j.size, d_, width, s, ld, 1, along(panel), by_columns, d_, add || panel > 0});
      }
    }
  }

  // What the threads have added up for the rows of a panel.
  void merge_rows(Block, int64_t panel) {
    const Block i = panels_.rows(panel);
    float* const out = made_.by_rows + i.begin * d_;
    bool add = false;
    for (int64_t thread = 0; thread < threads_; ++thread) {
      const auto [first, last] = tiles_of(thread);
      if (first == last) continue;
      const float* from = sums_.const_data_ptr<float>() + thread * sums_.stride(0) + panel * kPanel;
      (add ? math_.add_transposed : math_.transpose)(from, row_blocks_.size, out, d_, d_, i.size);
      add = true;
    }
  }

  // No sum is below the logit of a positive that takes part in it, however its exponentials were rounded.
  void settle() {
    double* const l = lse.mutable_data_ptr<double>();
    const double* const positive = positive_logits.const_data_ptr<double>();
    pairs_.for_each_positive({0, n_}, {0, m_}, [&](int64_t k, int64_t row, int64_t column) {
      const double bias = kLn2 * additions_.column_bias(column);
      if (pairs_.allowed(row, column) && positive[k] + bias > l[row]) l[row] = positive[k] + bias;
    });
  }

  const ContrastiveArgs& args_;
  const TileMath<float>& math_;
  const RowReader rows_;
  const Rows columns_;
  const int64_t n_, m_, d_;
  const at::TensorOptions options_;
  const double scale_;
  const Pairs pairs_;
  const Additions<float> additions_;
  const int64_t threads_;
  const Blocks row_blocks_, tiles_;
  Panels panels_;
  // Of the block at hand: its rows, packed (packed.h) in panels of 64 rows, and what threads add up for it,
  // transposed.
  const at::Tensor x_, across_, along_, sums_;
  // (threads, rows) and (tiles, rows): the largest logit, and the sum relative to it; what exponentials are
  // relative to, and what makes them probabilities.
  std::vector<float> top_, tile_top_;
  std::vector<double> total_;
  std::vector<float> factor_;

 public:
  const at::Tensor kept;

 private:
  const Gradients made_;
  std::vector<double> by_bias_;

 public:
  const at::Tensor row_rnorm, lse;
  at::Tensor positive_logits;
};

// What the positives' logits give the gradients beyond what they were expected to.
struct Extra {
  int64_t row, column;
  float weight;
};

// The gradient by rows, or by columns: factor * made_i, plus weight * (normalised) other row of each extra of
// i, through scale and normalisation. Returns sum_i <x^_i, gradient before the scale>.
template <class scalar_t, class OwnerOf, class OtherOf>
std::pair<at::Tensor, double> finish(const at::Tensor& source, bool normalize, const float* made,
                                     double factor, double scale, std::vector<Extra> extras,
                                     const RowReader& others, const OwnerOf& owner, const OtherOf& other) {
  const int64_t n = source.size(0), d = source.size(1);
  const RowReader reader(source, normalize);
  const at::Tensor values = pooled({n, d}, source.options());
  scalar_t* const out = values.mutable_data_ptr<scalar_t>();
  std::stable_sort(extras.begin(), extras.end(),
                   [&](const Extra& a, const Extra& b) { return owner(a) < owner(b); });
  std::vector<double> dots(n);
  const auto& math = tile_math<float>();
  const auto& convert = row_conversion<scalar_t, float>();
  const float clamped = static_cast<float>(1 / kNormEpsilon);
  at::parallel_for(0, n, rows_per_task(d), [&](int64_t begin, int64_t end) {
    std::vector<float> unit(d), grad(d), more(d);
    auto extra = std::lower_bound(extras.begin(), extras.end(), begin,
                                  [&](const Extra& each, int64_t i) { return owner(each) < i; });
    for (int64_t i = begin; i < end; ++i) {
      const float rnorm = static_cast<float>(reader.read(i, unit.data()).rnorm);
      std::copy_n(made + i * d, d, grad.data());
      math.scale(grad.data(), static_cast<float>(factor), d);
      for (; extra != extras.end() && owner(*extra) == i; ++extra) {
        others.read(other(*extra), more.data());
        math.add_scaled(grad.data(), more.data(), extra->weight, d);
      }
      dots[i] = math.dot(grad.data(), unit.data(), d);
      const float through = static_cast<float>(normalize ? scale * rnorm : scale);
      if (normalize && rnorm != clamped)
        math.project_out(grad.data(), unit.data(), through, static_cast<float>(dots[i]), d);
      else
        math.scale(grad.data(), through, d);
      convert.store(out + i * d, grad.data(), d);
    }
  });
  double sum = 0;
  for (double dot : dots) sum += dot;
  return {values, sum};
}

}  // namespace

// Logits of smaller calls are kept by contrastive.cpp: by a twentieth faster, and of 16 MB at most.
int64_t& fewest_pairs() {
  static thread_local int64_t pairs = int64_t{1} << 22;
  return pairs;
}

bool comes_from_gradients(const at::Tensor& kept) {
  return kept.numel() == kKeptHeader && kept.scalar_type() == at::kFloat && kept.is_contiguous() &&
         kept.const_data_ptr<float>()[0] == kMark;
}

bool makes_gradients(const ContrastiveArgs& args) {
  if (!args.equal_weights || !args.keep || !args.columns_need_grad || !args.columns || args.both_directions)
    return false;
  if (args.rows.scalar_type() == at::kDouble || !packed::is_chosen_for_float32()) return false;
  const auto in_bfloat16 = [](const at::Tensor& rows) {
    return rows.scalar_type() == at::kBFloat16 ||
           allowed_precision(rows.scalar_type()) == Precision::kBf16;
  };
  // Whose products are faster.
  if (isa() >= Isa::kAvx512Bf16 && in_bfloat16(args.rows) && in_bfloat16(*args.columns) &&
      !changes_logits(args.additions))
    return false;
  const int64_t n = args.rows.size(0), m = args.columns->size(0), threads = at::get_num_threads();
  return n * m >= fewest_pairs() && threads <= kMostThreads && m >= kColumnsOfThread * threads &&
         rows_of_block(n, m, args.rows.size(1)) > 0;
}

std::optional<ContrastiveFwd> contrastive_gradients_fwd(const ContrastiveArgs& args) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Forward forward(args);
  if (!forward.run()) return std::nullopt;
  return ContrastiveFwd{forward.lse,
                        pooled({0}, forward.lse.options()),
                        forward.positive_logits,
                        forward.row_rnorm,
                        forward.column_rnorm(),
                        forward.kept};
}

std::optional<ContrastiveBwd> contrastive_gradients_bwd(const ContrastiveArgs& args,
                                                        const ContrastiveSaved& saved) {
  if (!args.columns || args.both_directions || !saved.grad_lse) return std::nullopt;
  const at::Tensor &x = args.rows, &y = *args.columns;
  const int64_t n = x.size(0), m = y.size(0), d = x.size(1);
  const auto made = gradients_in(saved.kept, n, m, d);
  if (!made) return std::nullopt;
  const at::Tensor grad_lse = saved.grad_lse->contiguous();
  const double *g = grad_lse.const_data_ptr<double>(), *lse = saved.lse.const_data_ptr<double>();
  const auto is_empty = [&](int64_t i) { return lse[i] == -kInfinity; };
  int64_t first = 0;
  while (first < n && is_empty(first)) ++first;
  const double factor = first < n ? g[first] : 0;
  for (int64_t i = first; i < n; ++i)
    if (!is_empty(i) && !(std::abs(g[i] - factor) <= kSame * std::abs(factor))) return std::nullopt;

  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Pairs pairs(args);
  std::vector<Extra> extras;
  at::Tensor grad_positive;
  if (args.has_positives() && saved.grad_positive_logits)
    grad_positive = saved.grad_positive_logits->contiguous();
  const double* q = grad_positive.defined() ? grad_positive.const_data_ptr<double>() : nullptr;
  const bool expected = pairs.positives_per_row() == 1;
  pairs.for_each_positive({0, n}, {0, m}, [&](int64_t k, int64_t row, int64_t column) {
    const double weight = (q ? q[k] : 0) + (expected && !is_empty(row) ? factor : 0);
    if (weight != 0) extras.push_back({row, column, static_cast<float>(weight)});
  });

  const double scale = without_payload(*args.scale.const_data_ptr<float>());
  const bool columns_wanted = saved.columns_need_grad, rows_wanted = saved.rows_need_grad || !columns_wanted;
  const RowReader rows(x, args.normalize_rows), columns(y, args.normalize_columns);
  const auto row_of = [](const Extra& extra) { return extra.row; };
  const auto column_of = [](const Extra& extra) { return extra.column; };
  std::pair<at::Tensor, double> by_rows, by_columns;
  if (rows_wanted)
    by_rows = dispatch_storage<float>(x.scalar_type(), [&](auto storage) {
      return finish<decltype(storage)>(x, args.normalize_rows, made->by_rows, factor, scale, extras, columns,
                                       row_of, column_of);
    });
  if (columns_wanted)
    by_columns = dispatch_storage<float>(y.scalar_type(), [&](auto storage) {
      return finish<decltype(storage)>(y, args.normalize_columns, made->by_columns, factor, scale, extras,
                                       rows, column_of, row_of);
    });
  const auto none = [&] { return pooled({0}, x.options()); };
  const auto acc = x.options().dtype(at::kFloat);
  const at::Tensor by_bias = pooled({saved.column_bias_needs_grad ? m : 0}, acc);
  float* const bias = by_bias.mutable_data_ptr<float>();
  for (int64_t j = 0; j < by_bias.numel(); ++j) bias[j] = static_cast<float>(factor * made->by_bias[j]);
  return ContrastiveBwd{saved.rows_need_grad ? by_rows.first : none(),
                        columns_wanted ? by_columns.first : none(),
                        number<float>(rows_wanted ? by_rows.second : by_columns.second), by_bias,
                        pooled({0}, acc)};
}

}  // namespace ssl_kernels::cpu
