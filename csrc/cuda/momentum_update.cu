// Launcher of momentum_update.h.
#include "momentum_update.h"

#include "momentum_update.cuh"

namespace ssl_kernels {
namespace momentum_update {
namespace {

constexpr int64_t kMaxBlocks = 1 << 30;

// The tensors of one pair of dtypes, in launches of at most kMaxTensors.
template <typename shadow_t, typename source_t>
int run(const MomentumTriple* triples, int64_t count, int shadow_dtype, int source_dtype, const float* weight,
        cudaStream_t stream) {
  Batch batch;
  batch.tensors = 0;
  int64_t blocks = 0;
  const auto flush = [&]() -> int {
    if (batch.tensors == 0) return cudaSuccess;
    momentum_update_kernel<shadow_t, source_t>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(batch, weight);
    batch.tensors = 0;
    blocks = 0;
    return cudaGetLastError();
  };
  for (int64_t i = 0; i < count; ++i) {
    const MomentumTriple& triple = triples[i];
    if (triple.count == 0 || triple.shadow_dtype != shadow_dtype || triple.source_dtype != source_dtype)
      continue;
    const int64_t more = (triple.count + kChunk - 1) / kChunk;
    if (batch.tensors == kMaxTensors || blocks + more > kMaxBlocks) {
      if (const int error = flush()) return error;
    }
    const int slot = batch.tensors++;
    batch.masters[slot] = triple.master;
    batch.shadows[slot] = triple.shadow;
    batch.sources[slot] = triple.source;
    batch.counts[slot] = triple.count;
    batch.first_block[slot] = static_cast<int>(blocks);
    blocks += more;
  }
  return flush();
}

template <typename shadow_t>
int run_for_sources(const MomentumTriple* triples, int64_t count, int shadow_dtype, const float* weight,
                    cudaStream_t stream) {
  if (const int error = run<shadow_t, float>(triples, count, shadow_dtype, kFloat32, weight, stream))
    return error;
  if (const int error = run<shadow_t, __half>(triples, count, shadow_dtype, kFloat16, weight, stream))
    return error;
  return run<shadow_t, __nv_bfloat16>(triples, count, shadow_dtype, kBFloat16, weight, stream);
}

}  // namespace
}  // namespace momentum_update
}  // namespace ssl_kernels

int momentum_update(const MomentumTriple* triples, int64_t count, const float* weight, cudaStream_t stream) {
  using namespace ssl_kernels::momentum_update;
  if (const int error = run_for_sources<__half>(triples, count, kFloat16, weight, stream)) return error;
  return run_for_sources<__nv_bfloat16>(triples, count, kBFloat16, weight, stream);
}
