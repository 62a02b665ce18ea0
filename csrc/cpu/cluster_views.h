// What the kernels of losses against a teacher's softmax share: which of the teacher's views a view of the
// student meets, and the rows of either.
#pragma once

#include <c10/util/ArrayRef.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "mixing_math.h"
#include "tile_math.h"

namespace ssl_kernels::cpu {

// Which of the teacher's views each view of the student meets.
class Targets {
 public:
  Targets(int64_t views, c10::IntArrayRef pairs) : of_view_(views, -1), counts_(views, 0) {
    std::vector<std::vector<int64_t>> teachers(views);
    for (size_t i = 0; i + 1 < pairs.size(); i += 2) {
      teachers[pairs[i + 1]].push_back(pairs[i]);
      met_.resize(std::max<size_t>(met_.size(), pairs[i] + 1), 0);
      ++met_[pairs[i]];
    }
    for (int64_t v = 0; v < views; ++v) {
      counts_[v] = static_cast<int64_t>(teachers[v].size());
      if (teachers[v].empty()) continue;
      const auto place = std::find(sets_.begin(), sets_.end(), teachers[v]);
      of_view_[v] = place - sets_.begin();
      if (place == sets_.end()) sets_.push_back(teachers[v]);
    }
  }

  int64_t views() const { return static_cast<int64_t>(counts_.size()); }
  int64_t count(int64_t view) const { return counts_[view]; }
  // Pairs with one of the teacher's views.
  int64_t met(int64_t teacher) const {
    return teacher < static_cast<int64_t>(met_.size()) ? met_[teacher] : 0;
  }
  int64_t sets() const { return static_cast<int64_t>(sets_.size()); }

  // rows[set] = the sum of the probabilities codes[a] of its teachers, in `scratch` where there are several.
  template <class T>
  void add_up(std::vector<const T*>& rows, const std::vector<T*>& codes, T* scratch, int64_t k) const {
    for (size_t set = 0; set < sets_.size(); ++set) {
      const auto& teachers = sets_[set];
      if (teachers.size() == 1) {
        rows[set] = codes[teachers[0]];
        continue;
      }
      T* const sum = scratch + set * k;
      std::copy_n(codes[teachers[0]], k, sum);
      for (size_t i = 1; i < teachers.size(); ++i)
        tile_math<T>().add_scaled(sum, codes[teachers[i]], T(1), k);
      rows[set] = sum;
    }
  }

  int64_t set_of(int64_t view) const { return of_view_[view]; }

 private:
  std::vector<int64_t> of_view_, counts_, met_;
  std::vector<std::vector<int64_t>> sets_;
};

// z becomes softmax(z + bias). With `logits`, room for as many numbers, the sum of p log p; else 0.
template <class T>
double softmax(T* z, const T* bias, int64_t k, T* logits = nullptr) {
  if (bias) tile_math<T>().add_scaled(z, bias, T(1), k);
  const auto& math = cross_entropy_math<T>();
  const auto sums = math.sums(z, k, z);
  if (logits) std::copy_n(z, k, logits);
  math.gradient(z, z, sums.top, static_cast<T>(1 / sums.exp_total), T(0), k);
  if (!logits) return 0;
  return math.weighted_total(logits, z, k) - sums.top - std::log(sums.exp_total);
}

// The loss of one view; with `differentiate` z becomes weight * (count * softmax(z) - target).
template <class T>
double view_loss(T* z, const T* target, int64_t count, int64_t k, bool differentiate, T weight = 1) {
  const auto& math = cross_entropy_math<T>();
  const auto sums = math.sums(z, k, z);
  const double lse = static_cast<double>(sums.top) + std::log(sums.exp_total);
  const double loss = static_cast<double>(count) * lse - tile_math<T>().dot(target, z, k);
  if (differentiate)
    math.weighted_gradient(z, z, sums.top,
                           static_cast<T>(weight * static_cast<double>(count) / sums.exp_total), weight,
                           target, k);
  return loss;
}

}  // namespace ssl_kernels::cpu
