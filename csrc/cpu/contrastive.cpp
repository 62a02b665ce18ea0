// contrastive on the CPU. x^, y^ the rows and columns (normalised if asked), s_ij = scale * <x^_i, y^_j>,
//   lse_i = log sum_{j allowed} exp(s_ij), column_lse_j likewise over i, and the logits at `positives`.
// Tiling: tiles of at most 256 x 256 dot products (tiles.h), one matrix product each, in a scratch of
//   256 KB per thread that stays in its L2 cache; N x M never exists. In the square case (columns are the
//   rows) only tiles on and above the diagonal are made, each serving its rows and, transposed, its columns.
//   Tiles of a parallel round share no block (schedule.h), so every sum has one owner: no atomics, no buffer
//   a thread. Up to kPartRows rows the rounds would cost more than the buffers: there each thread has sums of
//   its own.
// Work, in units of 2*N*M*D: forward 1 (square: 1/2); backward 1 + 1 for each side that needs a
//   gradient (square: 1/2 + 1, less what was kept). One exponential per entry, two where rows and columns
//   need shifts of their own, none in backward for what was kept under a fixed shift.
// Memory: the rows in acc_t and transposed (2*N*D), the gradient and a transposed part of it (2*N*D), 5
//   numbers per row, the scratch, and from forward to backward as many tiles as fit (kKeptBytes, and
//   kKeptBudget for all losses of the process): they need not be recomputed. The results have the same bits
//   either way. Where all are kept, backward is 1 unit: of 128 features up to about 7000 rows of the square
//   case.
// Numerics: products, softmax and sums over a tile in acc_t (float32, float64 for float64), sums over tiles
//   in double; of bfloat16 rows products in bfloat16, where the processor has them (tiles.h). What
//   coefficients lose by their rounding goes to grad_scale: there backward makes exponentials and
//   coefficients apart, in a second scratch. While |s| <= |scale| * longest row * longest column stays below
//   kFixedShift, that bound is the shift of every row and column: tiles hold dot products v, scale enters
//   with the exponent, 2^(factor * v - shift), and of kept tiles these exponentials are kept. Above it tiles
//   hold s * log2 e, and rows and columns get running maxima, whose entries then count exactly 1.
// Sums over other classes and over a row's own (classes_apart) are of one walk: of the same exponentials
//   under a fixed shift, else of two copies of the tile, which takes twice the exponentials.
// Calls in one direction whose rows weigh alike are made otherwise where that pays: contrastive_gradients.h.
// One file, although a long one: forward and backward are walks over the tiles of one `Problem`, and what one
//   keeps the other reads.
#include "contrastive.h"

#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../ops/contrastive.h"
#include "additions.h"
#include "class_math.h"
#include "classes.h"
#include "contrastive_expectation.h"
#include "contrastive_gradients.h"
#include "kept_limit.h"
#include "pairs.h"
#include "pool.h"
#include "rows.h"
#include "tile_math.h"
#include "tiles.h"

namespace ssl_kernels::cpu {

int64_t& kept_at_most() {
  static thread_local int64_t bytes = std::numeric_limits<int64_t>::max();
  return bytes;
}

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Largest bound on |s| * log2 e that a fixed shift is used for: every term lies in [2^-86, 1], and a factor
// of 2^40 in the incoming gradient still fits float32.
constexpr double kFixedShift = 43;

// Bytes of logits kept for backward: kKeptBytes, or half of the matrix, all of it of wide rows, if with the
// rows and their gradients it stays below the budget, as far as other losses have left it. Logits of narrow
// rows are recomputed: their products cost about as much as reading a tile back (an estimate).
constexpr int64_t kKeptBytes = 24 << 20, kNarrow = 32, kWide = 256;
// More threads than this share too little memory bandwidth to keep more than kKeptBytes (an estimate).
constexpr int64_t kFewThreads = 8;

template <class acc_t>
void copy_entries(const Tile<acc_t>& from, const Tile<acc_t>& to) {
  for (int64_t row = 0; row < from.i.size; ++row)
    std::copy_n(from.s + row * from.ld, from.j.size, to.s + row * to.ld);
}

// One call: its tiles of logits in units of log 2, and what is masked and looked up in them.
template <class scalar_t, class acc_t>
class Problem : public Tiles<acc_t> {
 public:
  using Base = Tiles<acc_t>;
  using Base::columns, Base::column_blocks, Base::d, Base::m, Base::n, Base::row_blocks, Base::rows,
      Base::square, Base::threads;
  using Tile = ssl_kernels::cpu::Tile<acc_t>;

  explicit Problem(const ContrastiveArgs& args)
      : Base(in_float32_if(load_rows<scalar_t, acc_t>(args.rows, args.normalize_rows, args.more_rows,
                                                      /*may_borrow=*/true),
                           *args.scale.const_data_ptr<acc_t>() == 0 || changes_logits(args.additions)),
             args.columns ? std::optional(load_rows_of<acc_t>(*args.columns, args.normalize_columns,
                                                              /*may_borrow=*/true))
                          : std::nullopt,
             /*in_parts=*/true),
        scale(without_payload(*args.scale.const_data_ptr<acc_t>())),
        bound(static_cast<acc_t>(std::abs(scale) * kLog2E * rows.longest * columns.longest +
                                 kLog2E * Additions<acc_t>::largest(args))),
        fixed_shift(bound <= kFixedShift),  // false for NaN
        factor(fixed_shift && scale > 0 ? static_cast<acc_t>(scale * kLog2E) : acc_t(1)),
        additions(args, factor * kLn2),
        pairs_(args) {
    if (additions.two_sided() || (args.classes_apart && !fixed_shift))
      second_ = pooled({threads, row_blocks.size, Base::ld()}, rows.values.options());
  }

  // The tile's place among the logits kept for backward, if it has one. Where not all fit, those that do are
  // spread evenly over the tiles, so that all threads have as much to recompute.
  std::optional<Tile> kept(int64_t block_i, int64_t block_j, const at::Tensor& kept_logits) const {
    if (kept_logits.numel() == 0 || kept_tiles(kept_logits) == 0) return std::nullopt;
    const Block i = row_blocks[block_i], j = column_blocks[block_j];
    int64_t begin = kKeptHeader;
    if (keeps_everything(kept_logits)) {
      begin += kept_offset(i, j);
    } else {
      const int64_t place = number(block_i, block_j) * kept_tiles(kept_logits) / tiles();
      const int64_t next = (number(block_i, block_j) + 1) * kept_tiles(kept_logits) / tiles();
      if (place == next) return std::nullopt;
      begin += place * row_blocks.size * column_blocks.size;
    }
    return Tile{i, j, kept_logits.mutable_data_ptr<acc_t>() + begin, j.size};
  }

  bool keeps_everything(const at::Tensor& kept_logits) const {
    return kept_logits.numel() > 0 && kept_tiles(kept_logits) == tiles();
  }

  // Room for what forward keeps. It begins with the size of the tiles and how many there are: the number of
  // threads, which decides both, may have changed when backward comes.
  at::Tensor keep(const at::TensorOptions& options) const {
    constexpr int64_t size = sizeof(acc_t);
    const int64_t tile = row_blocks.size * column_blocks.size;
    int64_t count = 0, room = 0;
    if (d >= kNarrow && !additions.two_sided()) {
      // Backward of kept tiles alone has no more of packed rows than these, one packed copy and the gradient.
      const bool wide = d >= kWide && !square && this->packs();
      const int64_t half = square ? n * (n + kLargestTile) / 2 : wide ? n * m : n * m / 2;
      const int64_t rest =
          static_cast<int64_t>(kKeptBudget) / size - (wide ? 3 : 4) * (square ? n : n + m) * d;
      int64_t most = kKeptBytes / size;
      if (threads <= kFewThreads) most = std::max(most, std::min(half, rest));
      most = std::min(most, kept_at_most() / size);
      const Block last_i = row_blocks[row_blocks.count() - 1],
                  last_j = column_blocks[column_blocks.count() - 1];
      const int64_t all = kept_offset(last_i, last_j) + last_i.size * last_j.size;
      room = all <= most ? all : most / tile * tile;
      count = all <= most ? tiles() : most / tile;
    }
    at::Tensor kept_logits = kept_for_backward<acc_t>(kKeptHeader, room, tile, options);
    const int64_t granted = room_of<acc_t>(kept_logits);
    acc_t* header = kept_logits.mutable_data_ptr<acc_t>();
    header[0] = static_cast<acc_t>(row_blocks.size);
    header[1] = static_cast<acc_t>(column_blocks.size);
    header[2] = static_cast<acc_t>(granted == room ? count : granted / tile);
    return kept_logits;
  }

  // Whether `kept_logits` are from tiles as these, and still there: a copy of the tensor has its header
  // alone.
  bool has_tiles_of(const at::Tensor& kept_logits) const {
    if (kept_logits.numel() != kKeptHeader || !kept_logits.is_contiguous()) return false;
    const acc_t* header = kept_logits.const_data_ptr<acc_t>();
    if (header[0] != static_cast<acc_t>(row_blocks.size) ||
        header[1] != static_cast<acc_t>(column_blocks.size))
      return false;
    const int64_t count = kept_tiles(kept_logits);
    if (count == 0) return false;
    const Block last_i = row_blocks[row_blocks.count() - 1],
                last_j = column_blocks[column_blocks.count() - 1];
    const int64_t needed = count == tiles() ? kept_offset(last_i, last_j) + last_i.size * last_j.size
                                            : count * row_blocks.size * column_blocks.size;
    return room_of<acc_t>(kept_logits) >= needed;
  }

  // Fills a tile, all pairs.
  void multiply(const Tile& tile) const {
    if (factor != 1)
      Base::multiply(tile);
    else
      Base::multiply(tile, static_cast<acc_t>(scale * kLog2E));
    // Backward takes exp(s_ij - lse_j) from the entry above the diagonal: where rounding leaves logits far
    // apart, lse_j must come from the same number.
    if (square && tile.i.begin == tile.j.begin && !fixed_shift)
      for (int64_t row = 1; row < tile.i.size; ++row)
        for (int64_t column = 0; column < row; ++column)
          tile.s[row * tile.ld + column] = tile.s[column * tile.ld + row];
  }

  // A tile of logits as it enters the sums of its rows (not two_sided: of its columns too): entries left out
  // become -inf, the others take their bias.
  void settle_entries(const Tile& tile) const {
    additions.limit(pairs_, tile.s, tile.ld, tile.i, tile.j, /*of_columns=*/false);
    pairs_.mask(tile.s, tile.ld, tile.i, tile.j);
    additions.add(tile.s, tile.ld, tile.i, tile.j, /*of_columns=*/false);
  }

  // Where two_sided: a copy of the tile, as it enters the sums of its columns. Before `settle_entries`.
  Tile second(const Tile& tile, int thread) const {
    const Tile copy = copied(tile, thread);
    additions.limit(pairs_, copy.s, copy.ld, copy.i, copy.j, /*of_columns=*/true);
    pairs_.mask(copy.s, copy.ld, copy.i, copy.j);
    additions.add(copy.s, copy.ld, copy.i, copy.j, /*of_columns=*/true);
    return copy;
  }

  // A copy of the tile without the pairs of other classes (own), or of equal ones; and -inf in place of them.
  Tile of_classes(bool own, const Classes& classes, const Tile& tile, int thread) const {
    const Tile copy = copied(tile, thread);
    leave_out(!own, classes, copy);
    return copy;
  }
  void leave_out(bool own, const Classes& classes, const Tile& tile) const {
    const auto& math = tile_math<acc_t>();
    (own ? math.mask_equal_ids : math.mask_unequal_ids)(tile.s, tile.ld, tile.i.size, tile.j.size,
                                                        classes.ids() + tile.i.begin,
                                                        classes.ids() + tile.j.begin);
  }

  bool allowed(int64_t row, int64_t column) const { return pairs_.allowed(row, column); }

  // What a tile holds for a pair that its sums leave out.
  acc_t entry(int64_t row, int64_t column, bool exponential) const {
    const acc_t* x = rows.values.template const_data_ptr<acc_t>() + row * d;
    const acc_t* y = columns.values.template const_data_ptr<acc_t>() + column * d;
    const double product = tile_math<acc_t>().dot(x, y, d);
    const double value = factor != 1 ? product : product * scale * kLog2E;
    return static_cast<acc_t>(exponential ? std::exp2(factor * value - bound) : value);
  }

  template <class Visit>
  void for_each_positive(Block i, Block j, const Visit& visit) const {
    pairs_.for_each_positive(i, j, visit);
  }

  // No sum is below the logit of a positive that takes part in it, however its exponentials were rounded. A
  // softmax over an infinite logit is NaN, as torch's is; an infinite lse is left to rows none of whose
  // positives takes part.
  void settle(double* lse, double* column_lse, const double* positive_logits) const {
    constexpr char kOutside = 1, kInside = 2;
    std::vector<char> where(n);
    for_each_positive({0, n}, {0, m}, [&](int64_t k, int64_t row, int64_t column) {
      const double unit = kLn2 * factor, bias = unit * additions.column_bias(column);
      const bool inside = pairs_.allowed(row, column) && bias != -kInfinity;
      where[row] |= inside ? kInside : kOutside;
      if (inside && positive_logits[k] + bias > lse[row]) lse[row] = positive_logits[k] + bias;
      if (!column_lse || !pairs_.allowed(row, column)) return;
      const double of_column = positive_logits[k] + unit * additions.row_bias(row);
      if (of_column > column_lse[column]) column_lse[column] = of_column;
    });
    const auto refuse = [](double& x) { x = x == kInfinity ? std::numeric_limits<double>::quiet_NaN() : x; };
    for (int64_t i = 0; i < n; ++i)
      if (where[i] != kOutside) refuse(lse[i]);
    for (int64_t j = 0; column_lse && j < m; ++j) refuse(column_lse[j]);
  }

  const double scale;
  const double bound;      // of |s| * log2 e
  const bool fixed_shift;  // whether `bound` serves as the shift of every row and column
  const acc_t factor;      // > 0; times it, entries of tiles are logits in units of log 2
  const Additions<acc_t> additions;

 private:
  Tile copied(const Tile& tile, int thread) const {
    const Tile copy{tile.i, tile.j, second_.template mutable_data_ptr<acc_t>() + thread * second_.stride(0),
                    second_.stride(1)};
    copy_entries(tile, copy);
    return copy;
  }

  // Where the tile of rows i and columns j begins if all are kept: row blocks one after the other, of the
  // triangle without what lies below the diagonal.
  int64_t kept_offset(Block i, Block j) const {
    if (!square) return i.begin * m + i.size * j.begin;
    return i.begin * n - i.begin * (i.begin - row_blocks.size) / 2 + i.size * (j.begin - i.begin);
  }
  // Tiles in that order, and how many of them are kept.
  int64_t number(int64_t i, int64_t j) const {
    return square ? i * row_blocks.count() - i * (i - 1) / 2 + j - i : i * column_blocks.count() + j;
  }
  int64_t tiles() const { return number(row_blocks.count() - 1, column_blocks.count() - 1) + 1; }
  int64_t kept_tiles(const at::Tensor& kept_logits) const {
    return static_cast<int64_t>(kept_logits.const_data_ptr<acc_t>()[2]);
  }

  Pairs pairs_;
  at::Tensor second_;  // scratch of `copied`
};

// Running sum of 2^(s - shift) for each row (or column).
class LogSumExp {
 public:
  LogSumExp(int64_t n, bool fixed_shift, double shift)
      : fixed_shift_(fixed_shift), shift_(n, fixed_shift ? shift : -kInfinity), sum_(n, 0.) {}

  // Adds the sums of a tile; `shift` holds their shifts, and is not read where the shift is fixed.
  template <class acc_t>
  void add(Block block, const acc_t* shift, const acc_t* sum) {
    for (int64_t k = 0; k < block.size; ++k) {
      double& total = sum_[block.begin + k];
      double& top = shift_[block.begin + k];
      if (sum[k] == 0) continue;
      if (fixed_shift_ || shift[k] == top) {
        total += sum[k];
      } else if (!(shift[k] < top)) {
        total = sum[k] + (total == 0 ? 0 : total * std::exp2(top - shift[k]));
        top = shift[k];
      } else {
        total += sum[k] * std::exp2(shift[k] - top);
      }
    }
  }

  void add(const LogSumExp& other) {
    add({0, static_cast<int64_t>(sum_.size())}, other.shift_.data(), other.sum_.data());
  }

  at::Tensor result(const at::TensorOptions& options) const {
    at::Tensor lse = pooled({static_cast<int64_t>(sum_.size())}, options.dtype(at::kDouble));
    double* out = lse.mutable_data_ptr<double>();
    for (size_t i = 0; i < sum_.size(); ++i)
      out[i] = sum_[i] == 0 ? -kInfinity : kLn2 * (shift_[i] + std::log2(sum_[i]));
    return lse;
  }

 private:
  bool fixed_shift_;
  std::vector<double> shift_, sum_;
};

// What the terms of a row of logits, the largest of which is infinite, add up to in units of that one.
template <class acc_t>
acc_t sum_at_infinity(const acc_t* logits, int64_t stride, int64_t n) {
  for (int64_t k = 0; k < n; ++k)
    if (std::isnan(logits[k * stride])) return logits[k * stride];
  return 1;
}

template <class acc_t>
acc_t finite_or_zero_if_nothing(acc_t top) {
  return top == -std::numeric_limits<acc_t>::infinity() ? acc_t(0) : top;
}

// Weights for the tile's coefficients: grad_i exp(s - lse_i) = weight_i * 2^(s' - shift_i), with shift_i
// rounded to acc_t and the rounding taken into the weight.
template <class acc_t>
struct SoftmaxWeights {
  SoftmaxWeights(const std::optional<at::Tensor>& grad, const at::Tensor& lse, bool fixed_shift, double bound)
      : shift(fixed_shift ? 0 : lse.numel(), std::numeric_limits<acc_t>::infinity()), weight(lse.numel()) {
    // Weights of 0, times 2^-inf, as for every gradient of 0: torch.compile passes zeros for none.
    if (!grad) return;
    const at::Tensor contiguous = grad->contiguous();
    const double* g = contiguous.const_data_ptr<double>();
    const double* l = lse.const_data_ptr<double>();
    std::vector<double> factor(weight.size());
    for (size_t i = 0; i < weight.size(); ++i) {
      const double log2_sum = l[i] == -kInfinity ? 0 : l[i] * kLog2E;
      const double used = fixed_shift ? bound : static_cast<acc_t>(log2_sum);
      if (!fixed_shift && g[i] != 0) shift[i] = static_cast<acc_t>(used);
      factor[i] = used - log2_sum;
    }
    tile_math<acc_t>().exp2(factor.data(), factor.size());
    for (size_t i = 0; i < weight.size(); ++i)
      weight[i] = l[i] == -kInfinity || g[i] == 0 ? acc_t(0) : static_cast<acc_t>(g[i] * factor[i]);
  }
  bool all_zero() const {
    return std::all_of(weight.begin(), weight.end(), [](acc_t w) { return w == 0; });
  }

  std::vector<acc_t> shift, weight;
};

// Adds a tile's entries for positives to the sums of its rows and, of a mirrored tile, of its columns. Before
// masking.
template <class acc_t>
void add_class_sums(ClassSums& sums, const Classes& classes, const Tile<acc_t>& tile, bool mirrored) {
  acc_t row_sum[kLargestTile] = {}, row_count[kLargestTile] = {}, column_sum[kLargestTile] = {},
      column_count[kLargestTile] = {};
  acc_t* const of_columns = mirrored ? column_sum : nullptr;
  if (const int32_t* labels = classes.labels()) {
    class_math<acc_t>().sums(tile.s, tile.ld, tile.i.size, tile.j.size, labels + tile.i.begin,
                             labels + tile.j.begin, tile.i.begin == tile.j.begin, row_sum, row_count,
                             of_columns, column_count);
  } else {
    acc_t forth[kLargestTile], back[kLargestTile];
    acc_t* const match_back = classes.symmetric() ? forth : back;
    for (int64_t k = 0; k < tile.i.size; ++k) {
      classes.match(tile.i.begin + k, tile.j, forth, match_back);
      tile_math<acc_t>().matched_sums(tile.s + k * tile.ld, tile.j.size, forth, match_back, row_sum + k,
                                      row_count + k, of_columns, column_count);
    }
  }
  sums.add(tile.i, row_sum, row_count);
  if (mirrored) sums.add(tile.j, column_sum, column_count);
}

// A_ij less class_weight_i where j is a positive of i, and with A's transpose as much where i is one of j.
// Here and not in a sum of its own: a softmax near its target leaves little of two large numbers.
template <class acc_t>
void subtract_class_weights(const Tile<acc_t>& tile, const Classes& classes, const acc_t* weight) {
  if (const int32_t* labels = classes.labels()) {
    class_math<acc_t>().subtract(tile.s, tile.ld, tile.i.size, tile.j.size, labels + tile.i.begin,
                                 labels + tile.j.begin, tile.i.begin == tile.j.begin, weight + tile.i.begin,
                                 weight + tile.j.begin);
    return;
  }
  acc_t forth[kLargestTile], back[kLargestTile];
  acc_t* const match_back = classes.symmetric() ? forth : back;
  for (int64_t k = 0; k < tile.i.size; ++k) {
    classes.match(tile.i.begin + k, tile.j, forth, match_back);
    tile_math<acc_t>().subtract_matched(tile.s + k * tile.ld, tile.j.size, forth, match_back,
                                        weight[tile.i.begin + k], weight + tile.j.begin);
  }
}

// Sums over a tile, of its rows or its columns: `sum` relative to 2^shift, which a fixed shift leaves unset.
template <class acc_t>
struct TileSums {
  acc_t shift[kLargestTile], sum[kLargestTile];
};

// The sums of a tile's rows and, unless null, of its columns. With `keep`, under a fixed shift exponentials
// take the place of its logits.
template <class Problem, class acc_t>
void add_up(const Problem& problem, const Tile<acc_t>& tile, TileSums<acc_t>& of_rows,
            TileSums<acc_t>* of_columns, bool keep) {
  constexpr acc_t infinity = std::numeric_limits<acc_t>::infinity();
  const auto& math = tile_math<acc_t>();
  const int64_t rows = tile.i.size, columns = of_columns ? tile.j.size : 0;
  acc_t* const column_sum = of_columns ? of_columns->sum : nullptr;
  acc_t* const column_shift = of_columns ? of_columns->shift : nullptr;
  if (of_columns) std::fill_n(column_sum, columns, acc_t(0));
  if (problem.fixed_shift) {
    math.exp_sums(tile.s, tile.ld, rows, tile.j.size, problem.factor, static_cast<acc_t>(problem.bound),
                  of_rows.sum, column_sum, keep);
    return;
  }
  if (of_columns) std::fill_n(column_shift, columns, -infinity);
  math.maxima(tile.s, tile.ld, rows, tile.j.size, of_rows.shift, column_shift);
  for (int64_t k = 0; k < rows; ++k)
    of_rows.shift[k] = problem.factor * finite_or_zero_if_nothing(of_rows.shift[k]);
  for (int64_t k = 0; k < columns; ++k)
    column_shift[k] = problem.factor * finite_or_zero_if_nothing(column_shift[k]);
  math.exp_sums_shifted(tile.s, tile.ld, rows, tile.j.size, problem.factor, of_rows.shift, column_shift,
                        of_rows.sum, column_sum);
  for (int64_t k = 0; k < rows; ++k)
    if (of_rows.shift[k] == infinity) of_rows.sum[k] = sum_at_infinity(tile.s + k * tile.ld, 1, tile.j.size);
  for (int64_t k = 0; k < columns; ++k)
    if (column_shift[k] == infinity) column_sum[k] = sum_at_infinity(tile.s + k, tile.ld, rows);
}

// The same for pairs of other classes (sums[0]) and of the row's own (sums[1]).
template <class Problem, class acc_t>
void add_up_apart(const Problem& problem, const Classes& classes, const Tile<acc_t>& tile, int thread,
                  TileSums<acc_t> (&of_rows)[2], TileSums<acc_t> (*of_columns)[2]) {
  if (!problem.fixed_shift) {
    for (const bool own : {false, true})
      add_up(problem, problem.of_classes(own, classes, tile, thread), of_rows[own],
             of_columns ? *of_columns + own : nullptr, /*keep=*/false);
    return;
  }
  TileSums<acc_t> of_all;
  add_up(problem, tile, of_all, static_cast<TileSums<acc_t>*>(nullptr), /*keep=*/true);
  ByClass<acc_t> by_columns{nullptr, nullptr};
  if (of_columns) {
    by_columns = {(*of_columns)[0].sum, (*of_columns)[1].sum};
    for (acc_t* sum : {by_columns.other, by_columns.own}) std::fill_n(sum, tile.j.size, acc_t(0));
  }
  class_math<acc_t>().sums_apart(tile.s, tile.ld, tile.i.size, tile.j.size, classes.labels() + tile.i.begin,
                                 classes.labels() + tile.j.begin, {of_rows[0].sum, of_rows[1].sum},
                                 by_columns);
}

template <class scalar_t, class acc_t>
ContrastiveFwd forward(const ContrastiveArgs& args) {
  Problem<scalar_t, acc_t> problem(args);
  problem.prepare(/*to_multiply=*/true, /*to_add_to_rows=*/false, /*to_add_to_columns=*/false);
  const auto& math = tile_math<acc_t>();
  const auto options = problem.rows.values.options();
  const bool by_columns = problem.square || args.both_directions;
  const acc_t factor = problem.factor;
  // For each row.
  std::vector<LogSumExp> over_columns(problem.parts, {problem.n, problem.fixed_shift, problem.bound});
  LogSumExp over_rows(args.both_directions ? problem.m : 0, problem.fixed_shift, problem.bound);
  std::vector<LogSumExp> over_own;
  if (args.classes_apart) over_own = over_columns;
  const int64_t one_each[] = {args.partner >= 0 ? problem.n : 0};
  const at::Tensor positive_logits = pooled(
      args.positives ? args.positives->sizes() : at::IntArrayRef(one_each), options.dtype(at::kDouble));
  double* positive = positive_logits.mutable_data_ptr<double>();
  const at::Tensor kept_logits = args.keep ? problem.keep(options) : pooled({0}, options);

  std::vector<ClassSums> class_sums;
  if (args.class_sums) class_sums.assign(problem.parts, ClassSums(problem.n));

  const auto visit = [&](int64_t block_i, int64_t block_j, int thread, int part) {
    const auto kept = problem.kept(block_i, block_j, kept_logits);
    const auto tile = kept ? *kept : problem.scratch(block_i, block_j, thread);
    problem.multiply(tile);
    const bool mirrored = problem.square && block_i != block_j;
    if (args.class_sums) add_class_sums(class_sums[part], *args.classes, tile, mirrored);
    problem.for_each_positive(tile.i, tile.j, [&](int64_t k, int64_t row, int64_t column) {
      positive[k] = kLn2 * factor * tile.at(row, column);
    });
    if (mirrored)
      problem.for_each_positive(tile.j, tile.i, [&](int64_t k, int64_t row, int64_t column) {
        positive[k] = kLn2 * factor * tile.at(column, row);
      });
    const bool columns_too = by_columns && (mirrored || !problem.square);
    std::optional<Tile<acc_t>> apart;  // what the columns add up, where it is not the tile
    if (columns_too && problem.additions.two_sided()) apart = problem.second(tile, thread);
    problem.settle_entries(tile);

    if (args.classes_apart) {
      TileSums<acc_t> of_rows[2], of_columns[2];
      add_up_apart(problem, *args.classes, tile, thread, of_rows, columns_too ? &of_columns : nullptr);
      for (const bool own : {false, true}) {
        LogSumExp& total = (own ? over_own : over_columns)[part];
        total.add(tile.i, of_rows[own].shift, of_rows[own].sum);
        if (columns_too) total.add(tile.j, of_columns[own].shift, of_columns[own].sum);
      }
      return;
    }
    TileSums<acc_t> of_rows, of_columns;
    add_up(problem, tile, of_rows, columns_too && !apart ? &of_columns : nullptr, kept.has_value());
    over_columns[part].add(tile.i, of_rows.shift, of_rows.sum);
    if (!columns_too) return;
    TileSums<acc_t> unused;
    if (apart) add_up(problem, *apart, unused, &of_columns, /*keep=*/false);
    (problem.square ? over_columns[part] : over_rows).add(tile.j, of_columns.shift, of_columns.sum);
  };
  problem.for_each_in_parts(by_columns ? Owned::kBoth : Owned::kRows, visit);

  for (int64_t part = 1; part < problem.parts; ++part) over_columns[0].add(over_columns[part]);
  for (size_t part = 1; part < over_own.size(); ++part) over_own[0].add(over_own[part]);
  for (const ClassSums& sums : class_sums) args.class_sums->add(sums);
  if (args.class_sums)
    for (double& sum : args.class_sums->logits) sum *= kLn2 * factor;
  const at::Tensor none = pooled({0}, options);
  const at::Tensor lse = over_columns[0].result(options),
                   column_lse = (args.classes_apart ? over_own[0] : over_rows).result(options);
  const bool both = args.both_directions || args.classes_apart;
  problem.settle(lse.mutable_data_ptr<double>(), both ? column_lse.mutable_data_ptr<double>() : nullptr,
                 positive);
  return {lse, column_lse, positive_logits, problem.rows.rnorm,
          problem.square ? none : problem.columns.rnorm, kept_logits};
}

template <class scalar_t, class acc_t>
ContrastiveBwd backward(const ContrastiveArgs& args, const ContrastiveSaved& saved) {
  Problem<scalar_t, acc_t> problem(args);
  const auto& math = tile_math<acc_t>();
  const auto options = problem.rows.values.options();
  const acc_t factor = problem.factor;
  const acc_t bound = static_cast<acc_t>(problem.bound);
  const bool both_terms = problem.square || args.both_directions;
  const SoftmaxWeights<acc_t> of_rows(saved.grad_lse, saved.lse, problem.fixed_shift, bound);
  const SoftmaxWeights<acc_t> of_columns(saved.grad_column_lse, saved.column_lse, problem.fixed_shift, bound);
  const SoftmaxWeights<acc_t>& transposed = problem.square ? of_rows : of_columns;
  const bool positives_alone =
      of_rows.all_zero() && (!both_terms || transposed.all_zero()) && !args.classes_apart;
  at::Tensor grad_positive;
  if (args.has_positives() && saved.grad_positive_logits)
    grad_positive = saved.grad_positive_logits->contiguous();
  const at::Tensor kept_logits = problem.has_tiles_of(saved.kept) ? saved.kept : pooled({0}, options);
  const double* q = grad_positive.defined() ? grad_positive.const_data_ptr<double>() : nullptr;
  std::vector<acc_t> class_weight;
  if (saved.class_weight) class_weight.assign(saved.class_weight, saved.class_weight + problem.n);

  // The gradient of scale comes out of the row dots of either side, so one side is always made.
  const bool columns_wanted = saved.columns_need_grad && !problem.square;
  const bool rows_wanted = saved.rows_need_grad || !columns_wanted;
  const bool mirrored = problem.square && problem.row_blocks.count() > 1;
  problem.prepare(/*to_multiply=*/!problem.keeps_everything(kept_logits), rows_wanted,
                  columns_wanted || mirrored);
  RowSums<acc_t> grad_rows = problem.sums_of_rows(rows_wanted, mirrored);
  RowSums<acc_t> grad_columns = problem.sums_of_columns(columns_wanted);

  // The gradient by a bias is what its column or row adds up of the softmax's own coefficients: of a part's
  // own sums.
  const bool by_column_bias = saved.column_bias_needs_grad, by_row_bias = saved.row_bias_needs_grad;
  const bool two_sided = problem.additions.two_sided();
  using Numbers = std::vector<std::vector<double>>;
  Numbers of_column_bias(problem.parts, std::vector<double>(by_column_bias ? problem.m : 0, 0.));
  Numbers of_row_bias(problem.parts, std::vector<double>(by_row_bias ? problem.n : 0, 0.));
  const auto add_bias = [&](const Tile<acc_t>& c, std::vector<double>* of_rows,
                            std::vector<double>* of_columns) {
    acc_t row_sum[kLargestTile], column_sum[kLargestTile];
    math.sums(c.s, c.ld, c.i.size, c.j.size, of_rows ? row_sum : nullptr, of_columns ? column_sum : nullptr);
    for (int64_t k = 0; of_rows && k < c.i.size; ++k) (*of_rows)[c.i.begin + k] += row_sum[k];
    for (int64_t k = 0; of_columns && k < c.j.size; ++k) (*of_columns)[c.j.begin + k] += column_sum[k];
  };
  // With `classes_apart` those of a row's own class are `of_columns`.
  const auto coefficients_apart = [&](const Tile<acc_t>& logits, const Tile<acc_t>& tile, int thread) {
    const auto of = [&](Block block) {
      return ByClass<const acc_t>{of_rows.weight.data() + block.begin,
                                  of_columns.weight.data() + block.begin};
    };
    const Classes& classes = *args.classes;
    if (problem.fixed_shift) {
      class_math<acc_t>().coefficients_apart(logits.s, logits.ld, tile.s, tile.ld, tile.i.size, tile.j.size,
                                             classes.labels() + tile.i.begin, classes.labels() + tile.j.begin,
                                             of(tile.i), of(tile.j));
      return;
    }
    const auto shifted = [&](const Tile<acc_t>& t, const SoftmaxWeights<acc_t>& weights) {
      const acc_t *shift = weights.shift.data(), *weight = weights.weight.data();
      const int64_t i = t.i.begin, j = t.j.begin;
      math.coefficients_shifted(t.s, t.ld, t.s, t.ld, t.i.size, t.j.size, factor, shift + i, weight + i,
                                shift + j, weight + j);
    };
    const auto own = problem.of_classes(/*own=*/true, classes, logits, thread);
    if (tile.s != logits.s) copy_entries(logits, tile);
    problem.leave_out(/*own=*/true, classes, tile);
    shifted(tile, of_rows);
    shifted(own, of_columns);
    for (int64_t k = 0; k < tile.i.size; ++k)
      math.add_scaled(tile.s + k * tile.ld, own.s + k * own.ld, acc_t(1), tile.j.size);
  };
  // Weights of 0 with exponentials of 0, however large the logits are.
  const std::vector<acc_t> no_weight(two_sided ? problem.row_blocks.size : 0, acc_t(0));
  const std::vector<acc_t> no_exponential(no_weight.size(), std::numeric_limits<acc_t>::infinity());

  const auto visit = [&](int64_t block_i, int64_t block_j, int thread, int part) {
    const auto kept = problem.kept(block_i, block_j, kept_logits);
    const auto recomputed = problem.scratch(block_i, block_j, thread);
    const auto tile = problem.in_bfloat16 ? problem.second_scratch(block_i, block_j, thread) : recomputed;
    const bool recomputes = !kept && (!positives_alone || problem.in_bfloat16);
    std::optional<Tile<acc_t>> apart;
    if (recomputes) {
      problem.multiply(recomputed);
      if (two_sided) apart = problem.second(recomputed, thread);
      problem.settle_entries(recomputed);
    }
    const auto& logits = kept ? *kept : recomputed;
    const bool exponentials = problem.fixed_shift && (kept || problem.in_bfloat16 || args.classes_apart);
    acc_t row_sum[kLargestTile];
    if (exponentials && recomputes)
      math.exp_sums(logits.s, logits.ld, tile.i.size, tile.j.size, factor, bound, row_sum, nullptr,
                    /*keep=*/true);
    const int64_t i0 = tile.i.begin, j0 = tile.j.begin;
    const acc_t* const all_column_weights = both_terms ? transposed.weight.data() + j0 : nullptr;
    const acc_t* column_weight = apart ? nullptr : all_column_weights;
    const acc_t* row_weight = of_rows.weight.data() + i0;
    if (positives_alone)
      for (int64_t k = 0; k < tile.i.size; ++k) std::fill_n(tile.s + k * tile.ld, tile.j.size, acc_t(0));
    else if (args.classes_apart)
      coefficients_apart(logits, tile, thread);
    else if (exponentials)
      math.coefficients_of_kept(logits.s, logits.ld, tile.s, tile.ld, tile.i.size, tile.j.size, row_weight,
                                column_weight);
    else if (problem.fixed_shift)
      math.coefficients(tile.s, tile.ld, tile.s, tile.ld, tile.i.size, tile.j.size, factor, bound, row_weight,
                        column_weight);
    else
      math.coefficients_shifted(logits.s, logits.ld, tile.s, tile.ld, tile.i.size, tile.j.size, factor,
                                of_rows.shift.data() + i0, row_weight,
                                both_terms ? transposed.shift.data() + j0 : nullptr, column_weight);
    if (by_column_bias && !positives_alone) add_bias(tile, nullptr, &of_column_bias[part]);
    if (apart) {
      if (problem.fixed_shift)
        math.coefficients(apart->s, apart->ld, apart->s, apart->ld, tile.i.size, tile.j.size, factor, bound,
                          no_weight.data(), all_column_weights);
      else
        math.coefficients_shifted(apart->s, apart->ld, apart->s, apart->ld, tile.i.size, tile.j.size, factor,
                                  no_exponential.data(), no_weight.data(), transposed.shift.data() + j0,
                                  all_column_weights);
      if (by_row_bias) add_bias(*apart, &of_row_bias[part], nullptr);
      if (problem.square && by_column_bias && block_i != block_j)
        add_bias(*apart, &of_column_bias[part], nullptr);
      for (int64_t k = 0; k < tile.i.size; ++k)
        math.add_scaled(tile.s + k * tile.ld, apart->s + k * apart->ld, acc_t(1), tile.j.size);
    }
    // Entries left out of the sums that have a coefficient, and what they were.
    std::vector<std::pair<acc_t*, acc_t>> shown;
    if (q) {
      const auto add_positive = [&](int64_t k, int64_t row, int64_t column) {
        tile.at(row, column) += static_cast<acc_t>(q[k]);
        if (!problem.in_bfloat16 || problem.allowed(row, column)) return;
        acc_t& entry = logits.at(row, column);
        shown.emplace_back(&entry, entry);
        entry = problem.entry(row, column, exponentials);
      };
      problem.for_each_positive(tile.i, tile.j, add_positive);
      if (problem.square)
        problem.for_each_positive(
            tile.j, tile.i, [&](int64_t k, int64_t row, int64_t column) { add_positive(k, column, row); });
    }
    if (saved.class_weight) subtract_class_weights(tile, *args.classes, class_weight.data());
    const bool columns_too = columns_wanted || (problem.square && block_i != block_j);
    problem.add(rows_wanted ? &grad_rows : nullptr,
                !columns_too     ? nullptr
                : problem.square ? &grad_rows
                                 : &grad_columns,
                tile,
                {logits, exponentials, 1 / (factor == 1 ? problem.scale * kLog2E : factor),
                 exponentials ? bound : 0.},
                thread, part);
    for (auto entry = shown.rbegin(); entry != shown.rend(); ++entry) *entry->first = entry->second;
  };
  const bool bias_wanted = by_column_bias || by_row_bias;
  problem.for_each_in_parts((rows_wanted && columns_wanted) || bias_wanted ? Owned::kBoth
                            : rows_wanted                                  ? Owned::kRows
                                                                           : Owned::kColumns,
                            visit);

  InputGradient by_rows, by_columns;
  const auto storage = args.rows.options();
  if (rows_wanted)
    by_rows = finish_gradient<scalar_t, acc_t>(grad_rows.result(), problem.rows, problem.scale, storage,
                                               problem.in_bfloat16, saved.scale_needs_grad);
  if (columns_wanted)
    by_columns = dispatch_storage<acc_t>(args.columns->scalar_type(), [&](auto type) {
      return finish_gradient<decltype(type), acc_t>(grad_columns.result(), problem.columns, problem.scale,
                                                    args.columns->options(), problem.in_bfloat16,
                                                    saved.scale_needs_grad && !rows_wanted);
    });
  const double dots = (rows_wanted ? by_rows.dots : by_columns.dots) + problem.lost_dots();
  const double grad_scale = problem.square ? dots / 2 : dots;
  const auto none = [&] { return pooled({0}, storage); };
  const auto by_bias = [&](const Numbers& parts) {
    const at::Tensor grad = pooled({static_cast<int64_t>(parts[0].size())}, options);
    acc_t* out = grad.mutable_data_ptr<acc_t>();
    for (size_t k = 0; k < parts[0].size(); ++k) {
      double sum = 0;
      for (const auto& part : parts) sum += part[k];
      out[k] = static_cast<acc_t>(sum);
    }
    return grad;
  };
  return {saved.rows_need_grad ? by_rows.values : none(), columns_wanted ? by_columns.values : none(),
          number<acc_t>(grad_scale), by_bias(of_column_bias), by_bias(of_row_bias)};
}

}  // namespace

ContrastiveFwd contrastive_fwd(const ContrastiveArgs& args) {
  if (streams_columns(args)) return contrastive_expectation_fwd(args);
  if (makes_gradients(args))
    if (auto made = contrastive_gradients_fwd(args)) return *std::move(made);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return SSL_KERNELS_DISPATCH(args.rows.scalar_type(), "contrastive_fwd",
                              [&] { return forward<scalar_t, acc_t>(args); });
}

ContrastiveBwd contrastive_bwd(const ContrastiveArgs& args, const ContrastiveSaved& saved) {
  if (holds_expectation(saved.kept)) return contrastive_expectation_bwd(args, saved);
  if (auto made = contrastive_gradients_bwd(args, saved)) return *std::move(made);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return SSL_KERNELS_DISPATCH(args.rows.scalar_type(), "contrastive_bwd", [&] {
    if (!comes_from_gradients(saved.kept)) return backward<scalar_t, acc_t>(args, saved);
    const at::Tensor lse = std::get<0>(forward<scalar_t, acc_t>(args));
    return backward<scalar_t, acc_t>(
        args, {saved.grad_lse, saved.grad_column_lse, saved.grad_positive_logits, lse, saved.column_lse,
               saved.row_rnorm, saved.column_rnorm, saved.kept, saved.rows_need_grad, saved.columns_need_grad,
               saved.class_weight, saved.column_bias_needs_grad, saved.row_bias_needs_grad,
               saved.scale_needs_grad});
  });
}

namespace {

const std::optional<at::Tensor> kNone;

ContrastiveArgs square(const at::Tensor& rows, const at::Tensor& scale, const Classes& classes,
                       bool normalize, bool keep) {
  ContrastiveArgs args{rows,
                       kNone,
                       scale,
                       kNone,
                       kNone,
                       kNone,
                       normalize,
                       normalize,
                       /*keep_diagonal=*/false,
                       /*both_directions=*/false,
                       keep};
  args.classes = &classes;
  return args;
}

}  // namespace

ClassContrastiveFwd class_contrastive_fwd(const at::Tensor& rows, const at::Tensor& scale,
                                          const at::Tensor& positives, bool normalize, bool keep) {
  const int64_t n = rows.size(0);
  const Classes classes(positives, n);
  ClassSums sums(n);
  ContrastiveArgs args = square(rows, scale, classes, normalize, keep);
  args.class_sums = &sums;
  const auto [lse, column_lse, positive_logits, row_rnorm, column_rnorm, kept] = contrastive_fwd(args);
  const at::Tensor losses = pooled({n}, lse.options()), counts = pooled({n}, lse.options());
  double *loss = losses.mutable_data_ptr<double>(), *count = counts.mutable_data_ptr<double>();
  const double* l = lse.const_data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) {
    count[i] = sums.counts[i];
    // Never below 0 by definition: under a fixed shift lse is a sum of rounded exponentials.
    const double less = l[i] - sums.logits[i] / count[i];
    loss[i] = count[i] == 0 || less < 0 ? 0 : less;
  }
  return {losses, counts, lse, row_rnorm, kept};
}

std::tuple<at::Tensor, at::Tensor> class_contrastive_bwd(const at::Tensor& grad_losses,
                                                         const at::Tensor& rows, const at::Tensor& scale,
                                                         const at::Tensor& positives,
                                                         const at::Tensor& counts, const at::Tensor& lse,
                                                         const at::Tensor& row_rnorm, const at::Tensor& kept,
                                                         bool normalize, bool rows_need_grad) {
  const int64_t n = rows.size(0);
  const Classes classes(positives, n);
  const at::Tensor upstream = grad_losses.contiguous(), number = counts.contiguous();
  const double *g = upstream.const_data_ptr<double>(), *count = number.const_data_ptr<double>();
  const at::Tensor of_lse = pooled({n}, lse.options());
  double* weight = of_lse.mutable_data_ptr<double>();
  std::vector<double> class_weight(n);
  for (int64_t i = 0; i < n; ++i) {
    weight[i] = count[i] == 0 ? 0 : g[i];
    class_weight[i] = count[i] == 0 ? 0 : g[i] / count[i];
  }
  const std::optional<at::Tensor> grad_lse = of_lse;
  const at::Tensor empty = pooled({0}, lse.options());
  const auto [grad_rows, grad_columns, grad_scale, grad_column_bias, grad_row_bias] =
      contrastive_bwd(square(rows, scale, classes, normalize, /*keep=*/false),
                      {grad_lse, kNone, kNone, lse, empty, row_rnorm, empty, kept, rows_need_grad, false,
                       class_weight.data()});
  return {grad_rows, grad_scale};
}

ContrastiveFwd contrastive_apart_fwd(const at::Tensor& rows, const at::Tensor& scale,
                                     const at::Tensor& classes, bool normalize, bool keep) {
  const Classes labels(classes, rows.size(0));
  ContrastiveArgs args = square(rows, scale, labels, normalize, keep);
  args.classes_apart = true;
  return contrastive_fwd(args);
}

std::tuple<at::Tensor, at::Tensor> contrastive_apart_bwd(
    const at::Tensor& grad_lse, const at::Tensor& grad_column_lse, const at::Tensor& rows,
    const at::Tensor& scale, const at::Tensor& classes, const at::Tensor& lse, const at::Tensor& column_lse,
    const at::Tensor& row_rnorm, const at::Tensor& kept, bool normalize, bool rows_need_grad) {
  const Classes labels(classes, rows.size(0));
  ContrastiveArgs args = square(rows, scale, labels, normalize, /*keep=*/false);
  args.classes_apart = true;
  const std::optional<at::Tensor> by_lse = grad_lse, by_column_lse = grad_column_lse;
  const at::Tensor empty = pooled({0}, lse.options());
  const auto [grad_rows, grad_columns, grad_scale, grad_column_bias, grad_row_bias] = contrastive_bwd(
      args, {by_lse, by_column_lse, kNone, lse, column_lse, row_rnorm, empty, kept, rows_need_grad, false});
  return {grad_rows, grad_scale};
}

}  // namespace ssl_kernels::cpu
