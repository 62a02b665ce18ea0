// queue_push_ on the CPU: storage[(P + b) mod K] <- k^_b for the last min(B, K) of B keys, P the position
// before.
// Tiling: threads share the keys; a key's row is normalised in a scratch row in acc_t (float32, float64 for
//   float64 keys) and stored once. No two keys that are written share a row.
// Traffic: reads min(B, K) * D elements, writes as many; one pass.
// Numerics: norms as in contrastive (rows.h): squares that leave the range of acc_t are summed again in
//   double.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../ops/queue_push.h"
#include "rows.h"

namespace ssl_kernels::cpu {
namespace {

template <class key_t, class acc_t, class storage_t>
void push(storage_t* storage, const at::Tensor& keys, int64_t size, int64_t position, bool normalize) {
  const int64_t batch = keys.size(0), d = keys.size(1), first = std::max<int64_t>(0, batch - size);
  const key_t* in = keys.const_data_ptr<key_t>();
  at::parallel_for(first, batch, rows_per_task(d), [&](int64_t begin, int64_t end) {
    std::vector<acc_t> row(d);
    for (int64_t b = begin; b < end; ++b) {
      load_row<key_t, acc_t>(row.data(), in + b * keys.stride(0), d, normalize);
      storage_t* out = storage + (position + b) % size * d;
      if constexpr (std::is_same_v<acc_t, float> && !std::is_same_v<storage_t, double>)
        row_conversion<storage_t, float>().store(out, row.data(), d);
      else
        for (int64_t k = 0; k < d; ++k) out[k] = static_cast<storage_t>(row[k]);
    }
  });
}

void queue_push_(const at::Tensor& storage, const at::Tensor& keys, const at::Tensor& position,
                 const at::Tensor& filled, bool normalize) {
  check_queue_push(storage, keys, position, filled);
  const int64_t size = storage.size(0), batch = keys.size(0);
  int64_t* where = position.mutable_data_ptr<int64_t>();
  int64_t* count = filled.mutable_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(0 <= *where && *where < size, "queue_push_: position must be in [0, ", size, "), got ",
                    *where);
  TORCH_CHECK_VALUE(0 <= *count && *count <= size, "queue_push_: filled must be in [0, ", size, "], got ",
                    *count);
  if (batch == 0) return;
  const at::Tensor source = with_neighbours(keys);
  const auto into = [&](auto storage_type) {
    using storage_t = decltype(storage_type);
    storage_t* out = storage.mutable_data_ptr<storage_t>();
    const auto from = [&](auto key_type) {
      using key_t = decltype(key_type);
      using acc_t = std::conditional_t<std::is_same_v<key_t, double>, double, float>;
      push<key_t, acc_t>(out, source, size, *where, normalize);
    };
    if (source.scalar_type() == at::kDouble)
      from(double());
    else
      dispatch_storage<float>(source.scalar_type(), from);
  };
  if (storage.scalar_type() == at::kDouble)
    into(double());
  else
    dispatch_storage<float>(storage.scalar_type(), into);
  *where = (*where + batch) % size;
  *count = std::min(size, *count + batch);
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) { library.impl("queue_push_.native", &queue_push_); }

}  // namespace
}  // namespace ssl_kernels::cpu
