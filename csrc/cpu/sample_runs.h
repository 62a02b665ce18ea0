// How the samples of tensors of one shape (B, ...) lie in memory: the inner dimensions, sorted by stride and
// joined where every tensor allows it, as runs of elements. Contiguous, channels_last and every other dense
// layout give one run per sample.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <vector>

namespace ssl_kernels::cpu {

class SampleRuns {
 public:
  // Dimensions are sorted by the strides of the first tensor.
  SampleRuns(std::initializer_list<const at::Tensor*> tensors) : steps_(tensors.size()) {
    const at::Tensor& first = **tensors.begin();
    std::vector<int64_t> dims;
    for (int64_t dim = 1; dim < first.dim(); ++dim)
      if (first.size(dim) != 1) dims.push_back(dim);
    std::stable_sort(dims.begin(), dims.end(),
                     [&](int64_t a, int64_t b) { return first.stride(a) > first.stride(b); });
    for (int64_t dim : dims) {
      std::vector<int64_t> strides;
      for (const at::Tensor* tensor : tensors) strides.push_back(tensor->stride(dim));
      bool joins = !sizes_.empty();
      for (size_t t = 0; joins && t < strides.size(); ++t)
        joins = strides_.back()[t] == first.size(dim) * strides[t];
      if (joins) {
        sizes_.back() *= first.size(dim);
        strides_.back() = strides;
      } else {
        sizes_.push_back(first.size(dim));
        strides_.push_back(strides);
      }
    }
    if (sizes_.empty()) {
      length_ = 1;
      std::fill(steps_.begin(), steps_.end(), 1);
    } else {
      length_ = sizes_.back();
      steps_ = strides_.back();
      sizes_.pop_back();
      strides_.pop_back();
    }
    count_ = std::accumulate(sizes_.begin(), sizes_.end(), int64_t{1}, std::multiplies<>());
  }

  int64_t count() const { return count_; }    // runs of a sample
  int64_t length() const { return length_; }  // elements of a run

  // Between two elements of a run of tensor t.
  int64_t step(size_t t) const { return steps_[t]; }

  // From the start of a sample of tensor t to that of one of its runs.
  int64_t offset(size_t t, int64_t run) const {
    int64_t sum = 0;
    for (size_t dim = sizes_.size(); dim-- > 0; run /= sizes_[dim])
      sum += run % sizes_[dim] * strides_[dim][t];
    return sum;
  }

 private:
  std::vector<int64_t> sizes_;                 // outermost first, without the innermost
  std::vector<std::vector<int64_t>> strides_;  // of each tensor
  std::vector<int64_t> steps_;
  int64_t length_ = 1, count_ = 1;
};

// Tasks of about `elements` consecutive elements: what one thread takes of every sample at a time. The cut
// depends on the shape alone, so that sums over tasks are the same for any number of threads.
class RunChunks {
 public:
  RunChunks(const SampleRuns& runs, int64_t elements) : runs_(runs) {
    constexpr int64_t kLeastTasks = 8, kLeastElements = 64;
    const int64_t share = (runs.length() + kLeastTasks - 1) / kLeastTasks;
    const int64_t whole_lines = (share + kLeastElements - 1) / kLeastElements * kLeastElements;
    size_ = runs.count() >= kLeastTasks ? elements : std::min(elements, whole_lines);
    per_run_ = (runs.length() + size_ - 1) / size_;
  }

  int64_t count() const { return runs_.count() * per_run_; }
  int64_t largest() const { return std::min(size_, runs_.length()); }
  int64_t length(int64_t task) const { return std::min(size_, runs_.length() - begin(task)); }
  int64_t offset(size_t t, int64_t task) const {
    return runs_.offset(t, task / per_run_) + begin(task) * runs_.step(t);
  }

 private:
  int64_t begin(int64_t task) const { return task % per_run_ * size_; }

  const SampleRuns& runs_;
  int64_t size_, per_run_;
};

}  // namespace ssl_kernels::cpu
