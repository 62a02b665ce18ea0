// momentum_update_ on the CPU: master <- lerp(master, source, weight) and shadow <- round(master), over many
// tensors.
// Tiling: all elements of all tensors are one range, of which each thread takes an equal part.
// Traffic: reads master, shadow and source, writes master and shadow; one pass.
// Numerics: float32 throughout, rounded to the nearest, ties to even, into the shadow (mixing_math.h).
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../ops/momentum_update.h"
#include "mixing_math.h"
#include "rows.h"

namespace ssl_kernels::cpu {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread

void update(const at::Tensor& master, const at::Tensor& shadow, const at::Tensor& source, float weight,
            int64_t begin, int64_t count) {
  float* average = master.mutable_data_ptr<float>() + begin;
  const auto into = [&](auto shadow_type) {
    using shadow_t = decltype(shadow_type);
    dispatch_storage<float>(source.scalar_type(), [&](auto source_type) {
      using source_t = decltype(source_type);
      momentum_math<shadow_t, source_t>()(average, shadow.mutable_data_ptr<shadow_t>() + begin,
                                          source.const_data_ptr<source_t>() + begin, weight, count);
    });
  };
  if (shadow.scalar_type() == at::kHalf)
    into(c10::Half());
  else
    into(c10::BFloat16());
}

void momentum_update_(at::TensorList masters, at::TensorList shadows, at::TensorList sources,
                      const at::Tensor& weight) {
  check_momentum_update(masters, shadows, sources, weight);
  const float share = *weight.const_data_ptr<float>();
  std::vector<int64_t> first = {0};  // of each tensor in the range, and the range's end
  for (const at::Tensor& master : masters) first.push_back(first.back() + master.numel());
  at::parallel_for(0, first.back(), kGrain, [&](int64_t begin, int64_t end) {
    auto i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, first[i + 1]);
      if (stop > begin) update(masters[i], shadows[i], sources[i], share, begin - first[i], stop - begin);
      begin = stop;
    }
  });
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) { library.impl("momentum_update_.native", &momentum_update_); }

}  // namespace
}  // namespace ssl_kernels::cpu
