// The gradient of rows that are too wide for the accumulator of a ProductShape (is_wide): for a slab of rows at a
// time, one kernel, the loss' own, writes the coefficients C, and the one here multiplies them by the other side,
//
//   G_i = sum_j C_ij y_j
//
// Slabs follow one another on the stream. A slab has max(2 D, 1024) rows at most, rounded up to blocks of 128, so C
// takes about max(2 D, 1024) M scalar_t whatever N: twice the memory of the other side, and just past is_wide 4 times
// for float, 8 for double. G of a slab takes its R D acc_t and, in parts, at most what 2 blocks a multiprocessor hold,
// 64 KB each. Blocks of C and of G, on 108 to 148 multiprocessors: N = M = 1024 rows of 1024 bfloat16: 64, 192 to 256;
// N = M = 4096: 176 to 256, 128 to 256 with 2 slabs; 256 rows against 65536: 256 each; N = M = 4096 rows of 300 float:
// 128 to 256, 216 to 288 with 4 slabs.
#pragma once

#include <cstdint>

#include "launcher.cuh"
#include "rows.cuh"
#include "tile_walk.cuh"

namespace ssl_kernels {

// Tiling: 8 warps, 4 x 2, each 32 rows by 64 columns of G. A step is 128 bytes of C's rows, kChunk columns, and as many
//   rows of Y, all through a ring of kStages stages like TileWalk's. Y lies in panels, tiles of kChunk rows by 128
//   bytes; panels past D are not multiplied. The walk over M is split where there are few blocks. R rows in the slab,
//   B = ceil(R / 128) row blocks, Z = ceil(D / 128) depth blocks, K = ceil(M / kChunk) steps, S = ceil(D / 128 bytes)
//   panels.
// Products: 1 unit of 2 R M D flops, 4 B K S kChunk mma.
// Traffic, 32-byte sectors of global memory: 512 B K Z of C + 4 B M S of Y. Writes R D acc_t a part.
// Shared memory: 3 stages of 32 KB. No bank conflicts but two-way ones in TF32's reads of Y.
// Occupancy: 256 threads, at most 128 registers: 2 blocks per multiprocessor, one by sm_80's shared memory; double: one
//   block, at most 255 registers.
// Numerics: C as it was rounded, products summed in acc_t.
template <typename Engine>
struct SlabShape {
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  static constexpr int kWarps = 8;
  static constexpr int kWarpsN = 2;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlocksPerSm = sizeof(acc_t) == 8 ? 1 : 2;
  static constexpr int kBlockM = kWarps / kWarpsN * kWarpRows;
  static constexpr int kBlockN = 128;
  static constexpr int kChunk = kTileRowBytes / sizeof(scalar_t);  // rows of Y a step, columns of a panel of Y
  static constexpr int kPanels = kBlockN / kChunk;
  static constexpr int kWarpPanels = kPanels / kWarpsN;
  static constexpr int kNTiles = kChunk / 8;
  static constexpr int kCoefficientBytes = kBlockM * kTileRowBytes;
  static constexpr int kPanelBytes = kChunk * kTileRowBytes;
  static constexpr int kStageBytes = kCoefficientBytes + kPanels * kPanelBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Threads that load a panel together.
  static constexpr int kLoaders = kChunk * kTileUnits < kThreads ? kChunk * kTileUnits : kThreads;
};

// `coefficients` is a matrix of whole tiles with 0 in the columns past the last row of `other`. `partial`: (parts,
// rows, width).
template <typename Engine>
__global__ void __launch_bounds__(SlabShape<Engine>::kThreads, SlabShape<Engine>::kBlocksPerSm)
    slab_product_kernel(const typename Engine::scalar_t* coefficients, int64_t stride, int64_t rows,
                        const Operand<typename Engine::scalar_t, typename Engine::acc_t> other, int64_t width,
                        typename Engine::acc_t* partial) {
  using Shape = SlabShape<Engine>;
  using acc_t = typename Engine::acc_t;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warp_row = warp / Shape::kWarpsN * kWarpRows;
  const int warp_panel = warp % Shape::kWarpsN * Shape::kWarpPanels;
  const int64_t depth0 = static_cast<int64_t>(blockIdx.x) * Shape::kBlockN;
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * Shape::kBlockM;
  const Split steps(ceil_div(other.count, Shape::kChunk), blockIdx.z, gridDim.z);
  const int begin = static_cast<int>(steps.begin), end = static_cast<int>(steps.end);
  extern __shared__ __align__(128) unsigned char shared[];

  const auto load = [&](int step, int stage) {
    if (step < end) {
      unsigned char* tile = shared + stage * Shape::kStageBytes;
      const int64_t column0 = static_cast<int64_t>(step) * Shape::kChunk;
      load_tile<Shape::kBlockM, Shape::kThreads>(tile, coefficients + row0 * stride, stride, Shape::kBlockM, stride, 0,
                                                 column0);
#pragma unroll
      for (int i = 0; i < Shape::kPanels * Shape::kLoaders / Shape::kThreads; ++i) {
        const int panel = i * (Shape::kThreads / Shape::kLoaders) + threadIdx.x / Shape::kLoaders;
        load_tile<Shape::kChunk, Shape::kLoaders>(tile + Shape::kCoefficientBytes + panel * Shape::kPanelBytes,
                                                  other.data, other.stride, other.count, width, column0,
                                                  depth0 + panel * Shape::kChunk, threadIdx.x % Shape::kLoaders);
      }
    }
    copy_async_commit();
  };

  Fragment<acc_t, Shape::kNTiles> g[Shape::kWarpPanels];
#pragma unroll
  for (int p = 0; p < Shape::kWarpPanels; ++p) clear<acc_t, Shape::kNTiles>(g[p]);

  for (int step = 0; step < kStages - 1; ++step) load(begin + step, step);
  int stage = 0;
  for (int step = begin; step < end; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    const unsigned char* tile = shared + stage * Shape::kStageBytes;
#pragma unroll
    for (int p = 0; p < Shape::kWarpPanels; ++p) {
      const int panel = warp_panel + p;
      if (depth0 + panel * Shape::kChunk < width) {
        Engine::template product_nn<Shape::kNTiles>(g[p], tile, warp_row,
                                                    tile + Shape::kCoefficientBytes + panel * Shape::kPanelBytes, 0, 0);
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

#pragma unroll
  for (int p = 0; p < Shape::kWarpPanels; ++p) {
#pragma unroll
    for (int n = 0; n < Shape::kNTiles; ++n) {
      const int64_t d = depth0 + (warp_panel + p) * Shape::kChunk + fragment_column(lane, n, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = row0 + warp_row + fragment_row(lane, i / 2, i % 2 * 2);
        if (row < rows && d < width) {
          store_pair(partial + (blockIdx.z * rows + row) * width + d, g[p][i / 2][n][i % 2 * 2],
                     g[p][i / 2][n][i % 2 * 2 + 1]);
        }
      }
    }
  }
}

// Rows of a slab: `requested` or, where that is 0, max(2 D, 1024), in slabs that are about equally large; whole blocks,
// of which a grid's second dimension has 65535 at most.
inline int64_t pick_slab_rows(int64_t requested, int64_t count, int64_t D, int64_t block) {
  if (requested > 0) return round_up(std::min(count, requested), block);
  const int64_t most = round_up(std::min(count, std::clamp<int64_t>(2 * D, 1024, 1 << 22)), block);
  return round_up(blocks_for(count, blocks_for(count, most)), block);
}

// The gradient of wide rows and its dots, as finish_rows_kernel makes them. write(first_row, row_blocks, coefficients,
// stride) launches what writes the coefficients of `row_blocks` blocks of rows, in tiles of `block_n` columns.
template <typename Engine, typename grad_t, typename Write>
void slab_gradient(Launcher& launcher, int splits, int64_t slab_rows, int block_n,
                   const Operand<typename Engine::scalar_t, typename Engine::acc_t>& own,
                   const Operand<typename Engine::scalar_t, typename Engine::acc_t>& other,
                   const Matrix<typename Engine::scalar_t>& matrix, const typename Engine::acc_t* scale,
                   const typename Engine::acc_t* coefficient_scale, grad_t* grad, typename Engine::acc_t* dots,
                   Write write) {
  using Shape = SlabShape<Engine>;
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  const int64_t D = matrix.D, width = matrix.width();
  const int64_t slab = pick_slab_rows(slab_rows, own.count, D, Shape::kBlockM);
  const int64_t stride = round_up(other.count, block_n);
  const int64_t depth_blocks = blocks_for(width, Shape::kBlockN), steps = blocks_for(other.count, Shape::kChunk);
  const int64_t blocks = slab / Shape::kBlockM * depth_blocks;
  const int64_t slots = int64_t{multiprocessors()} * Shape::kBlocksPerSm;
  const int64_t most = std::min<int64_t>(steps / kMinTilesPerSplit, blocks_for(slots, blocks));
  const int parts = pick_splits(splits, blocks, steps, slots, most);
  auto* coefficients = launcher.scratch<scalar_t>(slab * stride);
  auto* partial = launcher.scratch<acc_t>(parts * std::min(slab, own.count) * width);
  for (int64_t first = 0; first < own.count; first += slab) {
    const int64_t rows = std::min(slab, own.count - first);
    const unsigned row_blocks = blocks_for(rows, Shape::kBlockM);
    write(first, row_blocks, coefficients, stride);
    launcher.launch(slab_product_kernel<Engine>, dim3(depth_blocks, row_blocks, parts), Shape::kThreads,
                    Shape::kSharedBytes, static_cast<const scalar_t*>(coefficients), stride, rows, other, width,
                    partial);
    auto x = matrix.strided();
    x.data += first * x.row_stride;
    launcher.launch(finish_rows_kernel<scalar_t, acc_t, grad_t>, blocks_for(rows, kRowWarps), kRowWarps * kWarpSize, 0,
                    static_cast<const acc_t*>(partial), parts, width, x, rows, D,
                    own.rnorm ? own.rnorm + first : nullptr, scale, coefficient_scale,
                    grad ? grad + first * D : nullptr, dots + first);
  }
}

}  // namespace ssl_kernels
