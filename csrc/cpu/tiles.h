// The loop that every loss over pairs of rows runs: x^ . y^T cut into tiles, one product of the BLAS that torch carries
// each, in a scratch a thread. What is made of a tile is the loss's own: its visit(block_i, block_j, thread) calls
// scratch and multiply, and adds up what belongs to the tile's rows and columns. N x M never exists.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "rows.h"
#include "schedule.h"

namespace ssl_kernels::cpu {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// A tile of 256 x 256 float32 numbers, 256 KB, stays in the L2 cache.
constexpr int64_t kLargestTile = 256, kSmallestTile = 64;

// Blocks of `n` for `ways` of parallelism, balanced and as large as the cache allows.
inline Blocks cut(int64_t n, int64_t ways) {
  const int64_t wanted = std::min(kLargestTile, std::max(kSmallestTile, (n + ways - 1) / ways));
  const int64_t count = (n + wanted - 1) / wanted;
  const int64_t size = (n + count - 1) / count;
  return {n, std::min(kLargestTile, (size + 15) / 16 * 16)};
}

template <class acc_t>
struct Tile {
  Block i, j;
  acc_t* s;
  int64_t ld;
  at::Tensor matrix;  // (i.size, j.size) view of s
  acc_t& at(int64_t row, int64_t column) const { return s[(row - i.begin) * ld + column - j.begin]; }
};

// Rows and columns in acc_t, how they are cut, and the tile of any pair of blocks.
template <class acc_t>
class Tiles {
 public:
  // Without columns the square case: they are the rows, and tiles below the diagonal are not visited.
  Tiles(const Rows& rows, const std::optional<Rows>& columns)
      : square(!columns),
        rows(rows),
        columns(square ? rows : *columns),
        n(rows.values.size(0)),
        m(this->columns.values.size(0)),
        threads(std::max(n, m) <= kLargestTile ? 1 : at::get_num_threads()),
        // The tournament of the square case plays count / 2 tiles at once.
        row_blocks(cut(n, square && threads > 1 ? 2 * threads : threads)),
        column_blocks(square ? row_blocks : cut(m, threads)),
        scratch_(at::empty({threads, row_blocks.size, column_blocks.size + kPadding}, rows.values.options())) {}

  // The tile in the thread's scratch.
  Tile<acc_t> scratch(int64_t block_i, int64_t block_j, int thread) const {
    const Block i = row_blocks[block_i], j = column_blocks[block_j];
    const at::Tensor matrix = scratch_.select(0, thread).narrow(0, 0, i.size).narrow(1, 0, j.size);
    return {i, j, matrix.mutable_data_ptr<acc_t>(), matrix.stride(0), matrix};
  }

  // Fills a tile with factor * <x^_i, y^_j>, all pairs.
  void multiply(const Tile<acc_t>& tile, double factor) const {
    at::Tensor matrix = tile.matrix;
    if (std::isnan(factor)) {  // a BLAS may take a factor that is NaN for 1
      matrix.fill_(factor);
      return;
    }
    at::addmm_out(matrix, matrix, slice(rows.values, tile.i), slice(columns.values, tile.j).t(), 0, factor);
  }

  static at::Tensor slice(const at::Tensor& values, Block block) {
    return values.narrow(0, block.begin, block.size);
  }

  // Visits every tile (square: on and above the diagonal), no two at once that share what is `owned`; the square
  // case owns both its blocks.
  template <class Visit>
  void for_each(Owned owned, const Visit& visit) const {
    if (square)
      for_each_pair(row_blocks.count(), 2 * threads, visit);
    else
      for_each_tile(row_blocks.count(), column_blocks.count(), owned, visit);
  }

  const bool square;
  const Rows rows, columns;
  const int64_t n, m;
  // 1 where everything fits one tile: it is visited outside a parallel region, and the BLAS has the threads.
  const int64_t threads;
  const Blocks row_blocks, column_blocks;

 private:
  // Keeps the rows of a tile off one another's cache sets.
  static constexpr int64_t kPadding = 16;
  at::Tensor scratch_;
};

}  // namespace ssl_kernels::cpu
