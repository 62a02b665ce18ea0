#include <cuda_runtime.h>

#include "tile_product.cuh"

// The tile with planted bug number `bug` (0: none) over an M x N grid of 64 x 64 blocks.
extern "C" int tile_product_launch(const void* a, const void* b, float* c, float* rowsum, int m, int n, int k,
                                   double scale, int bug, cudaStream_t stream) {
  const dim3 grid((n + 63) / 64, (m + 63) / 64);
  const auto* rows = static_cast<const __nv_bfloat16*>(a);
  const auto* columns = static_cast<const __nv_bfloat16*>(b);
  auto launch = [&](auto kernel) {
    kernel<<<grid, 128, 0, stream>>>(rows, columns, c, rowsum, m, n, k, static_cast<float>(scale));
    return static_cast<int>(cudaGetLastError());
  };
  switch (bug) {
    case kNone: return launch(tile_product<64, 64, 32, kNone>);
    case kRowsOutOfBounds: return launch(tile_product<64, 64, 32, kRowsOutOfBounds>);
    case kNoAsyncWait: return launch(tile_product<64, 64, 32, kNoAsyncWait>);
    case kNoBarrierBeforeUse: return launch(tile_product<64, 64, 32, kNoBarrierBeforeUse>);
    case kNoTrailingBarrier: return launch(tile_product<64, 64, 32, kNoTrailingBarrier>);
    case kShuffleInDivergentBranch: return launch(tile_product<64, 64, 32, kShuffleInDivergentBranch>);
    case kAddAcrossBlocksWithoutAtomics:
      return launch(tile_product<64, 64, 32, kAddAcrossBlocksWithoutAtomics>);
    case kDivergentBarrier: return launch(tile_product<64, 64, 32, kDivergentBarrier>);
    default: return static_cast<int>(cudaErrorInvalidValue);
  }
}
