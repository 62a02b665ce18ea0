// Which rows are the positives of which in `class_contrastive`, and their sums over the tiles of logits.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

#include "schedule.h"
#include "tile_math.h"

namespace ssl_kernels::cpu {

// `positives` says for which pairs (i, j) of different rows j is a positive of i: (N,) int64, equal labels;
// (N, W) int64, sets of bits that share one; (N, N) bool, the pairs themselves, which need not be symmetric.
class Classes {
 public:
  Classes(const at::Tensor& positives, int64_t n)
      : values_(positives.contiguous()),
        n_(n),
        kind_(positives.scalar_type() == at::kBool ? Kind::kMask
              : positives.dim() == 1               ? Kind::kLabels
                                                   : Kind::kSets) {
    TORCH_CHECK(positives.size(0) == n && positives.dim() <= 2 &&
                    (kind_ == Kind::kMask ? positives.dim() == 2 && positives.size(1) == n
                                          : positives.scalar_type() == at::kLong),
                "class_contrastive: positives must be (N,) or (N, W) int64 or (N, N) bool");
    if (kind_ != Kind::kLabels) return;
    const int64_t* label = values_.const_data_ptr<int64_t>();
    labels_.assign(label, label + n);
    if (std::equal(labels_.begin(), labels_.end(), label)) return;
    std::vector<int64_t> known(label, label + n);
    std::sort(known.begin(), known.end());
    for (int64_t i = 0; i < n; ++i)
      labels_[i] =
          static_cast<int32_t>(std::lower_bound(known.begin(), known.end(), label[i]) - known.begin());
  }

  bool symmetric() const { return kind_ != Kind::kMask; }

  // A number of each row, where equal numbers are all that makes positives, else null.
  const int32_t* labels() const { return labels_.empty() ? nullptr : labels_.data(); }

  // The labels as given.
  const int64_t* ids() const { return values_.const_data_ptr<int64_t>(); }

  // Without labels: match[k] = 1 where row j.begin + k is a positive of `row`, else 0; match_back[k] the
  // other way round.
  template <class acc_t>
  void match(int64_t row, Block j, acc_t* match, acc_t* match_back) const {
    if (kind_ == Kind::kMask) {
      const bool* mask = values_.const_data_ptr<bool>();
      for (int64_t k = 0; k < j.size; ++k) match[k] = mask[row * n_ + j.begin + k];
      for (int64_t k = 0; k < j.size; ++k) match_back[k] = mask[(j.begin + k) * n_ + row];
    } else {
      const int64_t words = values_.size(1);
      const int64_t* sets = values_.const_data_ptr<int64_t>();
      tile_math<acc_t>().match_bits(match, sets + j.begin * words, words, j.size, sets + row * words);
    }
    if (row >= j.begin && row < j.begin + j.size) match[row - j.begin] = match_back[row - j.begin] = 0;
  }

 private:
  enum class Kind { kLabels, kSets, kMask };
  at::Tensor values_;
  int64_t n_;
  Kind kind_;
  std::vector<int32_t> labels_;  // or their ranks: of 32 bits, twice as many fit in a vector
};

// For each row the sum of the logits of its positives, and how many they are.
struct ClassSums {
  explicit ClassSums(int64_t n) : logits(n, 0.), counts(n, 0.) {}

  template <class acc_t>
  void add(Block block, const acc_t* sum, const acc_t* count) {
    for (int64_t k = 0; k < block.size; ++k) {
      logits[block.begin + k] += sum[k];
      counts[block.begin + k] += count[k];
    }
  }
  void add(const ClassSums& other) {
    add({0, static_cast<int64_t>(logits.size())}, other.logits.data(), other.counts.data());
  }

  std::vector<double> logits, counts;
};

}  // namespace ssl_kernels::cpu
