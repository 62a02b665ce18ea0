// Which pairs of a tile of `contrastive` are looked up (positives) and which are left out of its sums (ids,
// and in the square case the diagonal; additions.h has what is left out by its size).
#pragma once

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "contrastive.h"
#include "schedule.h"
#include "tile_math.h"

namespace ssl_kernels::cpu {

class Pairs {
 public:
  explicit Pairs(const ContrastiveArgs& args)
      : square_(!args.columns),
        keep_diagonal_(args.keep_diagonal && !square_),
        only_equal_(args.additions.only_equal_ids),
        leaves_partner_out_(args.leaves_partner_out),
        m_(square_ ? args.row_count() : args.columns->size(0)),
        partner_(args.partner),
        positives_per_row_(args.partner >= 0 ? 1
                           : args.positives  ? args.positives->numel() / args.row_count()
                                             : 0) {
    if (args.row_ids) {
      row_ids_ = args.row_ids->contiguous();
      column_ids_ = square_ ? row_ids_ : args.column_ids->contiguous();
    }
    if (!args.positives) return;
    positives_ = args.positives->contiguous();
    const int64_t* index = positives_.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < positives_.numel(); ++k)
      TORCH_CHECK_INDEX(-m_ <= index[k] && index[k] < m_, "contrastive: positives must be in [", -m_, ", ",
                        m_, "), got ", index[k]);
  }

  // Entries left out of the sums become -inf, in the tile s of rows i and columns j.
  template <class acc_t>
  void mask(acc_t* s, int64_t ld, Block i, Block j) const {
    constexpr acc_t left_out = -std::numeric_limits<acc_t>::infinity();
    const int64_t first = std::max(i.begin, j.begin), last = std::min(i.begin + i.size, j.begin + j.size);
    const auto on_diagonal = [&](int64_t k) -> acc_t& { return s[(k - i.begin) * ld + k - j.begin]; };
    if (row_ids_.defined()) {
      std::vector<acc_t> diagonal;
      if (keep_diagonal_)
        for (int64_t k = first; k < last; ++k) diagonal.push_back(on_diagonal(k));
      const auto& math = tile_math<acc_t>();
      (only_equal_ ? math.mask_unequal_ids : math.mask_equal_ids)(
          s, ld, i.size, j.size, row_ids_.const_data_ptr<int64_t>() + i.begin,
          column_ids_.const_data_ptr<int64_t>() + j.begin);
      for (size_t k = 0; k < diagonal.size(); ++k) on_diagonal(first + k) = diagonal[k];
    }
    if (square_)
      for (int64_t k = first; k < last; ++k) on_diagonal(k) = left_out;
    if (leaves_partner_out_)
      for_each_positive(i, j, [&](int64_t, int64_t row, int64_t column) {
        s[(row - i.begin) * ld + column - j.begin] = left_out;
      });
  }

  // The same of the transposed tile, columns j by rows i, where columns are given.
  template <class acc_t>
  void mask_transposed(acc_t* s, int64_t ld, Block i, Block j) const {
    if (!row_ids_.defined()) return;
    std::vector<std::pair<int64_t, acc_t>> diagonal;
    const int64_t first = std::max(i.begin, j.begin), last = std::min(i.begin + i.size, j.begin + j.size);
    for (int64_t k = first; keep_diagonal_ && k < last; ++k) {
      const int64_t place = (k - j.begin) * ld + k - i.begin;
      diagonal.emplace_back(place, s[place]);
    }
    const auto& math = tile_math<acc_t>();
    (only_equal_ ? math.mask_unequal_ids : math.mask_equal_ids)(
        s, ld, j.size, i.size, column_ids_.const_data_ptr<int64_t>() + j.begin,
        row_ids_.const_data_ptr<int64_t>() + i.begin);
    for (const auto& [place, value] : diagonal) s[place] = value;
  }

  // Whether a pair takes part in the sums.
  bool allowed(int64_t row, int64_t column) const {
    if (row == column && (square_ || keep_diagonal_)) return !square_;
    if (leaves_partner_out_ && column == partner_of(row)) return false;
    return !row_ids_.defined() || (row_ids_.const_data_ptr<int64_t>()[row] ==
                                   column_ids_.const_data_ptr<int64_t>()[column]) == only_equal_;
  }

  // visit(flat index of the positive, its row, its column) for the positives of the rows of `i` that lie in
  // `j`.
  template <class Visit>
  void for_each_positive(Block i, Block j, const Visit& visit) const {
    if (!positives_per_row_) return;
    if (partner_ >= 0) {
      for (int64_t row = i.begin; row < i.begin + i.size; ++row) {
        const int64_t column = partner_of(row);
        if (column >= j.begin && column < j.begin + j.size) visit(row, row, column);
      }
      return;
    }
    const int64_t* positives = positives_.const_data_ptr<int64_t>();
    for (int64_t row = i.begin; row < i.begin + i.size; ++row)
      for (int64_t k = row * positives_per_row_; k < (row + 1) * positives_per_row_; ++k) {
        const int64_t column = positives[k] < 0 ? positives[k] + m_ : positives[k];  // negative: from the end
        if (column >= j.begin && column < j.begin + j.size) visit(k, row, column);
      }
  }

  int64_t positives_per_row() const { return positives_per_row_; }

 private:
  int64_t partner_of(int64_t row) const { return row + partner_ < m_ ? row + partner_ : row + partner_ - m_; }

  bool square_, keep_diagonal_, only_equal_, leaves_partner_out_;
  int64_t m_, partner_, positives_per_row_;
  at::Tensor positives_, row_ids_, column_ids_;
};

}  // namespace ssl_kernels::cpu
