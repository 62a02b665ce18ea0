// Which pairs of a tile are looked up (positives) and which are left out of its sums (ids).
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "schedule.h"
#include "tile_math.h"

namespace ssl_kernels::cpu {

class Pairs {
 public:
  // The rectangular case; entry (i, i) stays in the sums with keep_diagonal.
  Pairs(int64_t n, int64_t m, const std::optional<at::Tensor>& positives, const std::optional<at::Tensor>& row_ids,
        const std::optional<at::Tensor>& column_ids, bool keep_diagonal)
      : m_(m), positives_per_row_(positives ? positives->numel() / n : 0), keep_diagonal_(keep_diagonal) {
    if (row_ids) row_ids_ = row_ids->contiguous();
    if (column_ids) column_ids_ = column_ids->contiguous();
    if (!positives) return;
    positives_ = positives->contiguous();
    const int64_t* index = positives_.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < positives_.numel(); ++k)
      TORCH_CHECK_INDEX(-m <= index[k] && index[k] < m, "contrastive: positives must lie in [", -m, ", ", m,
                        "), got ", index[k]);
  }

  // Entries left out of the sums become -inf.
  template <class acc_t>
  void mask(acc_t* s, int64_t ld, Block i, Block j) const {
    if (!row_ids_.defined()) return;
    const int64_t first = std::max(i.begin, j.begin), last = std::min(i.begin + i.size, j.begin + j.size);
    const auto at = [&](int64_t k) -> acc_t& { return s[(k - i.begin) * ld + k - j.begin]; };
    std::vector<acc_t> diagonal;
    if (keep_diagonal_)
      for (int64_t k = first; k < last; ++k) diagonal.push_back(at(k));
    tile_math<acc_t>().mask_equal_ids(s, ld, i.size, j.size, row_ids_.const_data_ptr<int64_t>() + i.begin,
                                      column_ids_.const_data_ptr<int64_t>() + j.begin);
    for (size_t k = 0; k < diagonal.size(); ++k) at(first + k) = diagonal[k];
  }

  // visit(flat index of the positive, its row, its column) for the positives of the rows of `i` that lie in `j`.
  template <class Visit>
  void for_each_positive(Block i, Block j, const Visit& visit) const {
    if (!positives_per_row_) return;
    const int64_t* positives = positives_.const_data_ptr<int64_t>();
    for (int64_t row = i.begin; row < i.begin + i.size; ++row)
      for (int64_t k = row * positives_per_row_; k < (row + 1) * positives_per_row_; ++k) {
        const int64_t column = positives[k] < 0 ? positives[k] + m_ : positives[k];  // negative: from the end
        if (column >= j.begin && column < j.begin + j.size) visit(k, row, column);
      }
  }

 private:
  int64_t m_, positives_per_row_;
  bool keep_diagonal_;
  at::Tensor positives_, row_ids_, column_ids_;
};

}  // namespace ssl_kernels::cpu
