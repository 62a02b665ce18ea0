// A permutation as its cycles, and the checks of the values that come with one.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <vector>

namespace ssl_kernels::cpu {

// The first place of (B,) int64 whose value is none of 0 ... B - 1 or was there before; B where there is
// none.
inline int64_t first_that_is_no_permutation(const at::Tensor& permutation) {
  const int64_t batch = permutation.size(0), stride = permutation.stride(0);
  const int64_t* values = permutation.const_data_ptr<int64_t>();
  std::vector<char> seen(batch);
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t p = values[i * stride];
    if (p < 0 || p >= batch || seen[p]) return i;
    seen[p] = 1;
  }
  return batch;
}

inline std::vector<int64_t> checked_permutation(const char* op, const at::Tensor& permutation) {
  const int64_t batch = permutation.size(0), stride = permutation.stride(0),
                wrong = first_that_is_no_permutation(permutation);
  const int64_t* values = permutation.const_data_ptr<int64_t>();
  if (wrong < batch) {
    const int64_t p = values[wrong * stride];
    TORCH_CHECK_VALUE(false, op, ": permutation must hold each of 0 to ", batch - 1, " once, got ", p, " at ",
                      wrong, p >= 0 && p < batch ? " again" : "");
  }
  std::vector<int64_t> partner(batch);
  for (int64_t i = 0; i < batch; ++i) partner[i] = values[i * stride];
  return partner;
}

inline bool is_permutation(const at::Tensor& values) {
  TORCH_CHECK(values.is_cpu() && values.dim() == 1 && values.scalar_type() == at::kLong,
              "is_permutation: values must be int64 of shape (B,) on cpu");
  return first_that_is_no_permutation(values) == values.size(0);
}

inline std::vector<int64_t> inverse(const std::vector<int64_t>& partner) {
  std::vector<int64_t> result(partner.size());
  for (size_t i = 0; i < partner.size(); ++i) result[partner[i]] = i;
  return result;
}

template <class T>
std::vector<T> checked_lam(const char* op, const at::Tensor& lam) {
  const int64_t batch = lam.size(0), stride = lam.stride(0);
  const T* values = lam.const_data_ptr<T>();
  std::vector<T> shares(batch);
  for (int64_t i = 0; i < batch; ++i) {
    shares[i] = values[i * stride];
    TORCH_CHECK_VALUE(shares[i] >= 0 && shares[i] <= 1, op, ": lam must be in [0, 1], got ", shares[i]);
  }
  return shares;
}

// Cycles i, partner(i), partner(partner(i)), ..., one after the other in `order`; cycle k is [begin[k],
// begin[k + 1]).
struct Cycles {
  std::vector<int64_t> order, begin;

  // Those of which `works(i)` is true for one i.
  template <class Works>
  Cycles(const std::vector<int64_t>& partner, const Works& works) : begin{0} {
    std::vector<char> seen(partner.size());
    for (size_t start = 0; start < partner.size(); ++start) {
      bool any = false;
      for (int64_t i = start; !seen[i]; i = partner[i]) {
        seen[i] = 1;
        any = any || works(i);
        order.push_back(i);
      }
      if (any)
        begin.push_back(order.size());
      else
        order.resize(begin.back());
    }
  }

  int64_t count() const { return begin.size() - 1; }
};

}  // namespace ssl_kernels::cpu
