// The loop that every loss over pairs of rows runs: x^ . y^T cut into tiles, one product each, in a scratch a
// thread. What is made of a tile is the loss's own: its visit(block_i, block_j, thread) calls scratch and
// multiply, and adds up what belongs to the tile's rows and columns. N x M never exists.
// Products are packed products (packed.h) on AVX-512, and on AMX of bfloat16 rows. Where the processor
// multiplies bfloat16 numbers, those of bfloat16 rows are made of the rows as they came: exact in float32,
// they take the reciprocal norms as factors afterwards. Coefficients take these factors as well and are
// rounded to bfloat16 once, with a relative error of 2^-8 each. On others they are small products (product.h)
// where these run: they want their right operand as it is read, so the columns are kept transposed as well
// (M*D more), and what a backward adds to columns is summed up transposed.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "packed.h"
#include "pool.h"
#include "product.h"
#include "rows.h"
#include "schedule.h"

namespace ssl_kernels::cpu {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// A tile of 256 x 256 float32 numbers, 256 KB, stays in the L2 cache.
constexpr int64_t kLargestTile = 256, kSmallestTile = 64;
// Up to so many rows and columns of few products a second thread costs more, in moving rows between caches,
// than it saves. Of columns that are not the rows it saves a quarter of the time from so many multiplications
// on, forward and backward of one block on two cores of Zen 4, and from fewer on where the threads have
// loaded as many rows each: 150 x 150 rows of 128 take 0.30 ms with it and 0.37 without.
constexpr int64_t kOneThread = 256, kManyProducts = int64_t{1} << 22, kManyOfLoaded = int64_t{5} << 19;
// Up to so many rows and threads each thread adds up sums of its own (`parts`): their memory and their
// merging cost less than the rounds they spare. Of columns that are not the rows there must be many more.
// With parts the square case is worth a second thread earlier.
constexpr int64_t kPartRows = 512, kMostParts = 4, kManyColumns = 4;

// Blocks of `n` for `ways` of parallelism, balanced and as large as the cache allows.
inline Blocks cut(int64_t n, int64_t ways) {
  const int64_t wanted = std::min(kLargestTile, std::max(kSmallestTile, (n + ways - 1) / ways));
  const int64_t count = (n + wanted - 1) / wanted;
  const int64_t size = (n + count - 1) / count;
  return {n, std::min(kLargestTile, (size + 15) / 16 * 16)};
}

// A pointer into a row-major matrix with leading dimension ld.
template <class acc_t>
struct Tile {
  Block i, j;
  acc_t* s;
  int64_t ld;
  acc_t& at(int64_t row, int64_t column) const { return s[(row - i.begin) * ld + column - j.begin]; }
};

// The logits that the coefficients of a tile are made of: factor * (entry + shift), or with the entry's
// logarithm, base 2, where these are exponentials. Read where products are in bfloat16.
template <class acc_t>
struct Logits {
  Tile<acc_t> tile;
  bool exponentials;
  double factor, shift;
};

// Blocks of a task that moves rows, as many as a task that loads them has (rows.h), so that a thread gets the
// rows that it loaded. Those of another lie in the cache of its core: 256 KB take 12 us from there where the
// two cores share no cache, and 4 where they do (Zen 4).
inline int64_t blocks_per_task(const Blocks& blocks, int64_t d) {
  return std::max<int64_t>(1, rows_per_task(d) / blocks.size);
}

// The rows of `values` block by block, each block transposed: (blocks, D, blocks.size), the ragged end unset.
template <class acc_t>
at::Tensor transposed_blocks(const at::Tensor& values, const Blocks& blocks) {
  const int64_t d = values.size(1), ld = blocks.size;
  at::Tensor result = pooled({blocks.count(), d, ld}, values.options());
  const acc_t* from = values.const_data_ptr<acc_t>();
  acc_t* to = result.mutable_data_ptr<acc_t>();
  at::parallel_for(0, blocks.count(), blocks_per_task(blocks, d), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      tile_math<acc_t>().transpose(from + blocks[b].begin * d, d, to + b * d * ld, ld, blocks[b].size, d);
  });
  return result;
}

// Sums over tiles that are rows: values_i += sum_j c_ij y_j, where tiles are added from the side of their
// rows, and values_j += sum_i c_ij x_i from the side of their columns. `parts` of them, each with sums of its
// own.
template <class acc_t>
struct RowSums {
  RowSums(int64_t n, int64_t d, const Blocks& blocks, bool transpose, int64_t parts,
          const at::TensorOptions& options)
      : blocks(blocks),
        values(pooled({parts, n, d}, options)),
        begun(parts * blocks.count()),
        transposed_begun(blocks.count()) {
    if (transpose) transposed = pooled({blocks.count(), d, blocks.size}, options);
  }

  // Whether a part's block has sums already, and that it has from now on. A block of a part has one owner at
  // a time.
  bool begin_rows(Block block, int part) {
    return std::exchange(begun[part * blocks.count() + index(block)], true);
  }
  bool begin_columns(Block block) { return std::exchange(transposed_begun[index(block)], true); }

  acc_t* of_rows(Block block, int part) const {
    return values.template mutable_data_ptr<acc_t>() + part * values.stride(0) +
           block.begin * values.stride(1);
  }
  acc_t* of_columns(Block block) const {
    return transposed.template mutable_data_ptr<acc_t>() + block.begin * transposed.size(1);
  }

  // The sums, (n, d), over all parts. Once, after the last tile.
  at::Tensor result() const {
    const int64_t d = values.size(2), ld = blocks.size, parts = values.size(0);
    const at::Tensor sums = values[0];
    if (parts == 1 && !transposed.defined()) return sums;
    const auto& math = tile_math<acc_t>();
    at::parallel_for(0, blocks.count(), blocks_per_task(blocks, d), [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const int64_t size = blocks[b].size;
        acc_t* out = of_rows(blocks[b], 0);
        bool add = begun[b];
        for (int64_t part = 1; part < parts; ++part) {
          if (!begun[part * blocks.count() + b]) continue;
          const acc_t* more = of_rows(blocks[b], part);
          if (add)
            math.add_scaled(out, more, 1, size * d);
          else
            std::copy_n(more, size * d, out);
          add = true;
        }
        if (transposed.defined() && transposed_begun[b])
          (add ? math.add_transposed : math.transpose)(of_columns(blocks[b]), ld, out, d, d, size);
      }
    });
    return sums;
  }

  int64_t index(Block block) const { return block.begin / blocks.size; }

  Blocks blocks;
  at::Tensor values, transposed;
  // Blocks of `values` and `transposed` that hold sums; the others are unset.
  std::vector<char> begun, transposed_begun;
};

// Rows and columns in acc_t, how they are cut, and the tile of any pair of blocks.
template <class acc_t>
class Tiles {
 public:
  // Without columns the square case: they are the rows, and tiles below the diagonal are not visited.
  // `in_parts`: tiles are visited by for_each_in_parts.
  Tiles(const Rows& rows, const std::optional<Rows>& columns, bool in_parts = false)
      : square(!columns),
        rows(rows),
        columns(square ? rows : *columns),
        n(rows.values.size(0)),
        m(this->columns.values.size(0)),
        d(rows.values.size(1)),
        in_bfloat16(rows.units.defined() && this->columns.units.defined()),
        precision_(std::min(rows.precision, this->columns.precision)),
        packs_(in_bfloat16 || (std::is_same_v<acc_t, float> && packed::is_chosen_for_float32())),
        threads(std::max(n, m) > (square && in_parts && has_small_products<acc_t>() ? kOneThread / 2
                                                                                    : kOneThread) ||
                        (!square && n * m * d >= (n > rows_per_task(d) ? kManyOfLoaded : kManyProducts))
                    ? at::get_num_threads()
                    : 1),
        parts(in_parts && has_small_products<acc_t>() && n <= kPartRows &&
                      (square || m >= kManyColumns * n) && threads <= kMostParts
                  ? threads
                  : 1),
        row_blocks(cut(n, parts > 1 && !square ? 1 : ways())),
        column_blocks(square ? row_blocks : cut(m, ways())),
        scratch_(pooled({in_bfloat16 ? 2 * threads : threads, row_blocks.size, column_blocks.size + kPadding},
                        rows.values.options())),
        lost_(threads, 0.) {}

  // A second tile in the thread's scratch, where products are in bfloat16: for the coefficients, beside the
  // logits.
  Tile<acc_t> second_scratch(int64_t block_i, int64_t block_j, int thread) const {
    return scratch(block_i, block_j, static_cast<int>(threads) + thread);
  }

  // The tile in the thread's scratch.
  Tile<acc_t> scratch(int64_t block_i, int64_t block_j, int thread) const {
    acc_t* s = scratch_.template mutable_data_ptr<acc_t>() + thread * scratch_.stride(0);
    return {row_blocks[block_i], column_blocks[block_j], s, scratch_.stride(1)};
  }

  int64_t ld() const { return scratch_.stride(1); }

  // Makes what `multiply` and `add` to sums of either kind need. Before the loop.
  void prepare(bool to_multiply, bool to_add_to_rows, bool to_add_to_columns) {
    if (packs_) return pack(to_multiply, to_add_to_rows, to_add_to_columns);
    if (!has_small_products<acc_t>()) return;
    if (to_multiply || (to_add_to_columns && square && !flips()))
      columns_transposed_ = transposed_blocks<acc_t>(columns.values, column_blocks);
    if (!to_add_to_columns) return;
    if (flips())
      flipped_ = pooled({threads, column_blocks.size, row_blocks.size + kPadding}, rows.values.options());
    else
      rows_transposed_ = square ? columns_transposed_ : transposed_blocks<acc_t>(rows.values, row_blocks);
  }

  RowSums<acc_t> sums_of_rows(bool wanted, bool from_columns) const {
    return {wanted ? n : 0, d, row_blocks, from_columns && transposes_sums(), parts, rows.values.options()};
  }
  RowSums<acc_t> sums_of_columns(bool wanted) const {
    return {wanted ? m : 0, d, column_blocks, transposes_sums(), 1, rows.values.options()};
  }

  // Fills a tile with <x^_i, y^_j>, all pairs.
  void multiply(const Tile<acc_t>& tile) const {
    if (packs_)
      multiply_packed(tile);
    else if (has_small_products<acc_t>())
      multiply_small<acc_t>(tile.i.size, tile.j.size, d, row(rows, tile.i), d,
                            block(columns_transposed_, tile.j), column_blocks.size, tile.s, tile.ld, false,
                            precision_);
    else
      blas(matrix(tile), slice(rows.values, tile.i), slice(columns.values, tile.j).t(), 0);
  }

  // Fills a tile with factor * <x^_i, y^_j>.
  void multiply(const Tile<acc_t>& tile, acc_t factor) const {
    multiply(tile);
    for (int64_t row = 0; row < tile.i.size; ++row)
      tile_math<acc_t>().scale(tile.s + row * tile.ld, factor, tile.j.size);
  }

  // of_rows_i += sum_j c_ij y^_j and of_columns_j += sum_i c_ij x^_i for the coefficients c of a tile, each
  // unless it is null; in bfloat16 these are rnorm_i and rnorm_j times that. In the square case both may be
  // the same.
  void add(RowSums<acc_t>* of_rows, RowSums<acc_t>* of_columns, const Tile<acc_t>& c,
           const Logits<acc_t>& logits, int thread, int part) {
    if (packs_) return add_packed(of_rows, of_columns, c, logits, thread, part);
    if (of_rows) add_to_rows(*of_rows, c, part);
    if (of_columns) add_to_columns(*of_columns, c, part);
  }

  bool packs() const { return packs_; }

  // What the row dots <x^_i, sum_j c_ij y^_j>, added up, lack since the coefficients were rounded: those of
  // the rows, or of the columns, and in the square case of both.
  double lost_dots() const {
    double sum = 0;
    for (double of_thread : lost_) sum += of_thread;
    return sum;
  }

  // Visits every tile (square: on and above the diagonal), no two at once that share what is `owned`; the
  // square case owns both its blocks.
  template <class Visit>
  void for_each(Owned owned, const Visit& visit) const {
    if (square)
      for_each_pair(row_blocks.count(), 2 * threads, visit);
    else
      for_each_tile(row_blocks.count(), column_blocks.count(), owned, threads, visit);
  }

  // As for_each, visit(block_i, block_j, thread, part). What a visit adds up for rows is its part's own, and
  // `parts` then meet in one round rather than many.
  template <class Visit>
  void for_each_in_parts(Owned owned, const Visit& visit) const {
    const auto visit_part = [&](int64_t i, int64_t j, int part) { visit(i, j, part, part); };
    if (parts == 1)
      for_each(owned, [&](int64_t i, int64_t j, int thread) { visit(i, j, thread, 0); });
    else if (square)
      for_each_pair_in_parts(row_blocks, parts, visit_part);
    else
      for_each_tile_in_parts(row_blocks.count(), column_blocks.count(), parts, visit_part);
  }

  const bool square;
  const Rows rows, columns;
  const int64_t n, m, d;
  const bool in_bfloat16;  // products are; and sums have the reciprocal norms of their rows in them

 private:
  const Precision precision_;  // of small products
  const bool packs_;           // right operands are packed (packed.h)

 public:
  const int64_t threads;  // 1: outside a parallel region, where the BLAS has the others
  const int64_t parts;    // in which for_each_in_parts visits the tiles
  const Blocks row_blocks, column_blocks;

 private:
  // Into how many blocks rows or columns are to be cut at least: the tournament of the square case plays
  // count / 2 tiles at once; on one thread, the more tiles the square case has, the fewer entries are made
  // twice.
  int64_t ways() const {
    if (threads > 1) return square ? 2 * threads : threads;
    return square && has_small_products<acc_t>() ? kOneThread / kSmallestTile : 1;
  }
  // Where rows and columns are few, transposing the coefficients moves less than transposing rows and sums.
  bool flips() const { return (threads == 1 || (square && parts > 1)) && has_small_products<acc_t>(); }
  bool transposes_sums() const { return !packs_ && has_small_products<acc_t>() && !flips(); }

  void add_to_rows(RowSums<acc_t>& sums, const Tile<acc_t>& c, int part) const {
    const bool add = sums.begin_rows(c.i, part);
    if (has_small_products<acc_t>())
      multiply_small<acc_t>(c.i.size, d, c.j.size, c.s, c.ld, row(columns, c.j), d, sums.of_rows(c.i, part),
                            d, add, precision_);
    else
      blas(slice(sums.values[part], c.i), matrix(c), slice(columns.values, c.j), add);
  }

  void add_to_columns(RowSums<acc_t>& sums, const Tile<acc_t>& c, int part) const {
    const bool add = sums.transposed.defined() ? sums.begin_columns(c.j) : sums.begin_rows(c.j, part);
    if (flips()) {
      acc_t* flipped = flipped_.template mutable_data_ptr<acc_t>() + part * flipped_.stride(0);
      const int64_t ld = flipped_.stride(1);
      tile_math<acc_t>().transpose(c.s, c.ld, flipped, ld, c.i.size, c.j.size);
      multiply_small<acc_t>(c.j.size, d, c.i.size, flipped, ld, row(rows, c.i), d, sums.of_rows(c.j, part), d,
                            add, precision_);
    } else if (has_small_products<acc_t>()) {
      multiply_small<acc_t>(d, c.j.size, c.i.size, block(rows_transposed_, c.i), row_blocks.size, c.s, c.ld,
                            sums.of_columns(c.j), column_blocks.size, add, precision_);
    } else {
      blas(slice(sums.values[part], c.j), matrix(c).t(), slice(rows.values, c.i), add);
    }
  }

  // Units of so many numbers that lie next to each other along the depth.
  int64_t units(int64_t numbers) const { return in_bfloat16 ? (numbers + 1) / 2 : numbers; }
  int64_t rounded_ld() const { return units(column_blocks.size) + kPadding; }
  const at::Tensor& left(const Rows& of) const { return in_bfloat16 ? of.units : of.values; }

  // Blocks of rows as right operands (packed.h): `across`, of products whose columns they are; else of
  // products that add them up.
  at::Tensor packed_blocks(const Rows& of, const Blocks& blocks, bool across) const {
    const at::Tensor& source = left(of);
    const int64_t ld = source.stride(0);
    const int64_t full =
        across ? packed::size_of(units(d), blocks.size) : packed::size_of(units(blocks.size), d);
    at::Tensor result = pooled({blocks.count(), full}, source.options());
    uint32_t* to = units_of(result);
    at::parallel_for(0, blocks.count(), blocks_per_task(blocks, d), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const uint32_t* from = units_of(source) + blocks[b].begin * ld;
        if (across)
          packed::pack_transposed(from, ld, blocks[b].size, units(d), to + b * full);
        else if (in_bfloat16)
          packed::pack_bfloat16(reinterpret_cast<const uint16_t*>(from), 2 * ld, blocks[b].size, d,
                                to + b * full);
        else
          packed::pack_float32(reinterpret_cast<const float*>(from), ld, blocks[b].size, d, to + b * full);
      }
    });
    return result;
  }
  static uint32_t* units_of(const at::Tensor& units) {
    return static_cast<uint32_t*>(units.mutable_data_ptr());
  }
  static const uint32_t* block_of(const at::Tensor& packed, int64_t index) {
    return units_of(packed) + index * packed.stride(0);
  }

  void pack(bool to_multiply, bool to_add_to_rows, bool to_add_to_columns) {
    if (to_multiply) columns_across_ = packed_blocks(columns, column_blocks, true);
    if (to_add_to_rows) columns_along_ = packed_blocks(columns, column_blocks, false);
    if (to_add_to_columns)
      rows_along_ = square && to_add_to_rows ? columns_along_ : packed_blocks(rows, row_blocks, false);
    if (!in_bfloat16) return;
    if (to_add_to_rows || to_add_to_columns)
      rounded_ =
          pooled({threads, row_blocks.size * rounded_ld() + units(row_blocks.size) * column_blocks.size},
                 rows.units.options());
    row_factor_ = rows.rnorm;
    column_factor_ = columns.rnorm;
    if (row_factor_.numel() == 0 && column_factor_.numel() == 0) return;
    if (row_factor_.numel() == 0) row_factor_ = at::ones({n}, rows.values.options());
    if (column_factor_.numel() == 0) column_factor_ = at::ones({m}, rows.values.options());
    column_inverse_.resize(m);
    for (int64_t j = 0; j < m; ++j)
      column_inverse_[j] = 1 / column_factor_.template const_data_ptr<float>()[j];
  }
  const float* factor_of(const at::Tensor& factor, Block block) const {
    return factor.defined() && factor.numel() ? factor.template const_data_ptr<float>() + block.begin
                                              : nullptr;
  }

  void multiply_packed(const Tile<acc_t>& tile) const {
    if constexpr (std::is_same_v<acc_t, float>) {
      const int64_t ld = left(rows).stride(0);
      packed::multiply(in_bfloat16,
                       {tile.i.size, tile.j.size, units(d), units_of(left(rows)) + tile.i.begin * ld, ld, 1,
                        block_of(columns_across_, index(column_blocks, tile.j)), tile.s, tile.ld, false,
                        factor_of(row_factor_, tile.i), factor_of(column_factor_, tile.j)});
    }
  }

  void add_packed(RowSums<acc_t>* of_rows, RowSums<acc_t>* of_columns, const Tile<acc_t>& c,
                  const Logits<acc_t>& logits, int thread, int part) {
    if constexpr (std::is_same_v<acc_t, float>) {
      const uint32_t *by_rows = reinterpret_cast<const uint32_t*>(c.s), *by_columns = by_rows;
      int64_t ld_rows = c.ld, ld_columns = c.ld;
      if (in_bfloat16) {
        uint32_t* const to_rows = units_of(rounded_) + thread * rounded_.stride(0);
        uint32_t* const to_columns = to_rows + row_blocks.size * rounded_ld();
        by_rows = to_rows, by_columns = to_columns, ld_rows = rounded_ld(), ld_columns = column_blocks.size;
        float coefficients[kLargestTile], products[kLargestTile];
        const float *row_factor = factor_of(row_factor_, c.i),
                    *column_factor = factor_of(column_factor_, c.j);
        packed::round_to_bfloat16(
            c.s, c.ld, c.i.size, c.j.size, row_factor, column_factor, of_rows ? to_rows : nullptr, ld_rows,
            of_columns ? to_columns : nullptr, ld_columns,
            {logits.tile.s, logits.tile.ld, logits.exponentials,
             column_factor ? column_inverse_.data() + c.j.begin : nullptr, coefficients, products});
        double lost = 0;
        for (int64_t k = 0; k < c.i.size; ++k)
          lost += (products[k] + logits.shift * coefficients[k]) / (row_factor ? row_factor[k] : 1);
        lost_[thread] += (square && of_columns ? 2 : 1) * logits.factor * lost;
      }
      if (of_rows)
        packed::multiply(in_bfloat16, {c.i.size, d, units(c.j.size), by_rows, ld_rows, 1,
                                       block_of(columns_along_, index(column_blocks, c.j)),
                                       of_rows->of_rows(c.i, part), d, of_rows->begin_rows(c.i, part)});
      const int own = of_columns && of_columns->values.size(0) > 1 ? part : 0;
      if (of_columns)
        packed::multiply(in_bfloat16, {c.j.size, d, units(c.i.size), by_columns, 1, ld_columns,
                                       block_of(rows_along_, index(row_blocks, c.i)),
                                       of_columns->of_rows(c.j, own), d, of_columns->begin_rows(c.j, own)});
    }
  }
  static int64_t index(const Blocks& blocks, Block block) { return block.begin / blocks.size; }

  // Keeps the rows of a tile off one another's cache sets.
  static constexpr int64_t kPadding = 16;

  const acc_t* row(const Rows& of, Block block) const {
    return of.values.template const_data_ptr<acc_t>() + block.begin * d;
  }
  // A block of what transposed_blocks made: its blocks are full but for the last.
  const acc_t* block(const at::Tensor& transposed, Block block) const {
    return transposed.const_data_ptr<acc_t>() + block.begin * d;
  }
  static at::Tensor slice(const at::Tensor& values, Block block) {
    return values.narrow(0, block.begin, block.size);
  }
  at::Tensor matrix(const Tile<acc_t>& tile) const {
    return at::from_blob(tile.s, {tile.i.size, tile.j.size}, {tile.ld, 1}, scratch_.options());
  }
  static void blas(at::Tensor out, const at::Tensor& a, const at::Tensor& b, int beta) {
    const c10::InferenceMode below_autograd;
    at::addmm_out(out, out, a, b, beta, 1);
  }

  at::Tensor scratch_, columns_transposed_, rows_transposed_, flipped_;
  // Where right operands are packed: see packed_blocks. In bfloat16: coefficients of a thread; reciprocal
  // norms.
  at::Tensor columns_across_, columns_along_, rows_along_, rounded_, row_factor_, column_factor_;
  std::vector<float> column_inverse_;
  std::vector<double> lost_;  // see lost_dots; of each thread
};

}  // namespace ssl_kernels::cpu
