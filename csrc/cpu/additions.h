// What `contrastive` adds to the logits of its sums (biases) and leaves out of them by their size (limits),
// tile by tile.
//   sum of row i over j:     s_ij + column_bias_j;   of column j over i: s_ij + row_bias_i
//   left out of both: s_ij > row_limit_i, unless j is a positive of i or exempt
// The square case reads the tile above the diagonal from both sides: entry (i, j) with the limit of i and the
// bias of j, and as (j, i) with the limit of j and the bias of i.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "contrastive.h"
#include "pairs.h"
#include "schedule.h"
#include "tile_math.h"

namespace ssl_kernels::cpu {

template <class acc_t>
class Additions {
 public:
  // Tiles hold logits divided by `unit`.
  Additions(const ContrastiveArgs& args, double unit)
      : square_(!args.columns), both_directions_(args.both_directions) {
    const auto& given = args.additions;
    const auto in_units = [&](const at::Tensor* tensor, std::vector<acc_t>& to) {
      if (!tensor) return;
      const at::Tensor values = tensor->contiguous();
      const acc_t* from = values.const_data_ptr<acc_t>();
      to.resize(values.numel());
      for (size_t k = 0; k < to.size(); ++k) to[k] = static_cast<acc_t>(from[k] / unit);
    };
    in_units(given.column_bias, column_bias_);
    in_units(given.row_bias, row_bias_);
    in_units(given.row_limit, row_limit_);
    if (!given.row_limit) return;
    constexpr acc_t infinity = std::numeric_limits<acc_t>::infinity();
    const int64_t m = square_ ? args.row_count() : args.columns->size(0);
    floor_.assign(m, -infinity);
    if (!given.exempt) return;
    const at::Tensor exempt = given.exempt->contiguous();
    for (int64_t j = 0; j < m; ++j)
      if (exempt.const_data_ptr<bool>()[j]) floor_[j] = infinity;
  }

  // The largest finite size of a bias, so that |s| + it bounds what enters an exponent; in the dtype's own
  // units.
  static double largest(const ContrastiveArgs& args) {
    double most = 0;
    for (const at::Tensor* bias : {args.additions.column_bias, args.additions.row_bias}) {
      if (!bias) continue;
      const at::Tensor values = bias->contiguous();
      const acc_t* data = values.const_data_ptr<acc_t>();
      for (int64_t k = 0; k < values.numel(); ++k)
        if (data[k] != -std::numeric_limits<acc_t>::infinity()) {
          const double size = std::abs(static_cast<double>(data[k]));
          if (!(size <= most)) most = size;  // NaN stays
          if (std::isnan(most)) return most;
        }
    }
    return most;
  }

  // Whether a tile is one matrix for the sums of its rows and another for those of its columns.
  bool two_sided() const {
    return square_ ? !column_bias_.empty() || !row_limit_.empty()
                   : both_directions_ && (!column_bias_.empty() || !row_bias_.empty());
  }
  bool any() const { return !column_bias_.empty() || !row_bias_.empty() || !row_limit_.empty(); }

  // Logits above their limit become -inf. Before `pairs` masks the tile; `of_columns`: for the sums of
  // columns.
  void limit(const Pairs& pairs, acc_t* s, int64_t ld, Block i, Block j, bool of_columns) const {
    if (row_limit_.empty()) return;
    std::vector<std::pair<int64_t, acc_t>> stay;
    const bool turned = square_ && of_columns;
    const auto note = [&](int64_t row, int64_t column) {
      const int64_t place = (row - i.begin) * ld + column - j.begin;
      stay.emplace_back(place, s[place]);
    };
    if (turned)
      pairs.for_each_positive(j, i, [&](int64_t, int64_t row, int64_t column) { note(column, row); });
    else
      pairs.for_each_positive(i, j, [&](int64_t, int64_t row, int64_t column) { note(row, column); });
    const std::vector<acc_t>&by_row = turned ? floor_ : row_limit_, &by_column = turned ? row_limit_ : floor_;
    tile_math<acc_t>().mask_above(s, ld, i.size, j.size, by_row.data() + i.begin, by_column.data() + j.begin);
    for (const auto& [place, value] : stay) s[place] = value;
  }

  // Adds the biases to what was not left out.
  void add(acc_t* s, int64_t ld, Block i, Block j, bool of_columns) const {
    const auto& math = tile_math<acc_t>();
    if (!of_columns) {
      if (!column_bias_.empty()) math.add_to_columns(s, ld, i.size, j.size, column_bias_.data() + j.begin);
    } else {
      const std::vector<acc_t>& bias = square_ ? column_bias_ : row_bias_;
      if (!bias.empty()) math.add_to_rows(s, ld, i.size, j.size, bias.data() + i.begin);
    }
  }

  // The same of the transposed tile, columns j by rows i, where columns are given: for the sums of rows.
  void limit_transposed(const Pairs& pairs, acc_t* s, int64_t ld, Block i, Block j) const {
    if (row_limit_.empty()) return;
    std::vector<std::pair<int64_t, acc_t>> stay;
    pairs.for_each_positive(i, j, [&](int64_t, int64_t row, int64_t column) {
      const int64_t place = (column - j.begin) * ld + row - i.begin;
      stay.emplace_back(place, s[place]);
    });
    tile_math<acc_t>().mask_above(s, ld, j.size, i.size, floor_.data() + j.begin,
                                  row_limit_.data() + i.begin);
    for (const auto& [place, value] : stay) s[place] = value;
  }
  void add_transposed(acc_t* s, int64_t ld, Block i, Block j) const {
    if (!column_bias_.empty())
      tile_math<acc_t>().add_to_rows(s, ld, j.size, i.size, column_bias_.data() + j.begin);
  }

  // In units of the tiles; 0 without a bias.
  double column_bias(int64_t j) const { return column_bias_.empty() ? 0 : column_bias_[j]; }
  double row_bias(int64_t i) const { return row_bias_.empty() ? 0 : row_bias_[i]; }

 private:
  bool square_, both_directions_;
  std::vector<acc_t> column_bias_, row_bias_, row_limit_, floor_;
};

}  // namespace ssl_kernels::cpu
