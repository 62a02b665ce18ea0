// Gradients of wide rows from stored coefficients: for a block of rows and columns at a time, one kernel, the
// loss' own, writes the coefficients C, and a library multiplies them by both sides,
//
//   G_i = sum_j C_ij y_j      G_j = sum_i C_ij x_i
//
// 1 unit of 2 N M D flops of ours for both, and 1 of the library's for each. Blocks follow one another on the
// stream, so the order of all sums is fixed. C takes 32 MB at most, G of a block's rows R D acc_t, and G of
// the columns M D acc_t.
//
// Numerics: C in acc_t, rounded once to scalar_t, products summed in acc_t. With the gradient of one side C
//   takes the norms of the other side, whose rows are read as they lie. With both it takes none and is
//   multiplied by normalised copies of either side, rounded as plain PyTorch rounds them.
#pragma once

#include <cmath>
#include <cstdint>

#include "launcher.cuh"
#include "matrix_product.h"
#include "rows.cuh"
#include "tile_walk.cuh"

namespace ssl_kernels {

constexpr int64_t kCoefficientBytes = int64_t{32} << 20;  // what L2 can hold
constexpr int64_t kBlockTile = 128;  // rows and columns of a block are whole tiles of any MatrixShape

// Where a kernel writes the coefficients of a block. Kernels take the numbers one by one: as a struct they
// would fill registers from the start.
template <typename scalar_t>
struct CoefficientBlock {
  scalar_t* data;  // whole tiles, rows `stride` apart
  int64_t stride, first_row, first_column, columns;
  bool with_norms;  // those of the columns go into the coefficients
};

// Tiles of `columns` columns from first_column on, as the walk of a block's kernel takes them.
template <typename Shape>
__device__ __forceinline__ Split block_tiles(int64_t first_column, int64_t columns) {
  return Split(first_column / Shape::kBlockN, ceil_div(columns, Shape::kBlockN), blockIdx.y, gridDim.y);
}

// Writes the walk's tile of coefficients, times the norms of the columns `with_norms` and, for half, c_scale.
// `block` is where row 0 and column 0 of the whole matrix would lie.
template <typename Shape, typename Engine, typename acc_t, typename scalar_t>
__device__ __forceinline__ void write_block(const TileWalk<Shape, Engine>& walk,
                                            const typename TileWalk<Shape, Engine>::Tile& c, acc_t c_scale,
                                            bool with_norms, scalar_t* block, int64_t stride) {
  walk.write_coefficients(
      c,
      [&](int n) __attribute__((always_inline)) {
        const Pair<acc_t> rnorm = with_norms ? walk.column_rnorm(n) : Pair<acc_t>{{acc_t(1), acc_t(1)}};
        return coefficient_factor<kScalesCoefficients<Engine>>(rnorm, c_scale);
      },
      block + walk.row0() * stride, stride);
}

// x^ = x rnorm, zero padded, rounded to scalar_t. One warp per row. Traffic: reads and writes N D elements.
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    normalized_rows_kernel(StridedRows<scalar_t> x, const acc_t* rnorm, int64_t count, int64_t D,
                           scalar_t* result, int64_t width) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
  if (row >= count) return;
  for (int64_t d = threadIdx.x % kWarpSize; d < width; d += kWarpSize) {
    result[row * width + d] = from_acc<scalar_t>(d < D ? to_acc(x.at(row, d)) * rnorm[row] : acc_t(0));
  }
}

// values /= *scale. One thread each.
template <typename acc_t>
__global__ void unscale_kernel(acc_t* values, int64_t count, const acc_t* scale) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) values[i] *= acc_t(1) / *scale;
}

// As large as kCoefficientBytes allow, about as many rows as columns, of equal size.
struct BlockSizes {
  int64_t rows, columns;
};

inline BlockSizes pick_blocks(int64_t requested_rows, int64_t requested_columns, int64_t N, int64_t M,
                              int64_t bytes) {
  const auto whole = [](int64_t count) { return std::max(count / kBlockTile, int64_t{1}) * kBlockTile; };
  const auto even = [](int64_t requested, int64_t count, int64_t most) {
    if (requested > 0) return round_up(std::min(count, requested), kBlockTile);
    return round_up(blocks_for(count, blocks_for(count, most)), kBlockTile);
  };
  const int64_t elements = kCoefficientBytes / bytes;
  const int64_t side = whole(static_cast<int64_t>(std::sqrt(static_cast<double>(elements))));
  const int64_t rows = even(requested_rows, N, std::max(side, whole(elements / round_up(M, kBlockTile))));
  return {rows, even(requested_columns, M, whole(elements / rows))};
}

// Calls f(row, rows, column, columns) for each block of an (N, M) matrix.
template <typename F>
void for_each_block(BlockSizes sizes, int64_t N, int64_t M, F f) {
  for (int64_t row = 0; row < N; row += sizes.rows) {
    for (int64_t column = 0; column < M; column += sizes.columns) {
      f(row, std::min(sizes.rows, N - row), column, std::min(sizes.columns, M - column));
    }
  }
}

// One side of a problem whose gradients are made from blocks of coefficients.
template <typename scalar_t, typename acc_t, typename grad_t>
struct BlockSide {
  Operand<scalar_t, acc_t> operand;
  Matrix<scalar_t> matrix;  // as the caller passed it
  bool normalize;           // the operand has a rnorm
  grad_t* grad;             // (count, D), or null where only the dots are needed
};

// What the coefficients are multiplied by: a side's rows as they lie, or normalised.
template <typename scalar_t, typename acc_t, typename grad_t>
Operand<scalar_t, acc_t> block_factor(Launcher& launcher, const BlockSide<scalar_t, acc_t, grad_t>& side,
                                      bool normalized) {
  auto factor = side.operand;
  if (!normalized || !side.normalize) return factor;
  factor.stride = side.matrix.width();
  auto* copy = launcher.scratch<scalar_t>(factor.count * factor.stride);
  launcher.launch(normalized_rows_kernel<scalar_t, acc_t>, blocks_for(factor.count, kRowWarps),
                  kRowWarps * kWarpSize, 0, side.matrix.strided(), factor.rnorm, factor.count, side.matrix.D,
                  copy, factor.stride);
  factor.data = copy;
  return factor;
}

// The gradient of `own` and its dots, as finish_rows_kernel makes them, and with `both` that of `other`, from
// the same coefficients. write(block, rows) launches what writes those of `rows` rows.
template <typename Engine, typename grad_t, typename Write>
void block_gradients(Launcher& launcher, MultiplyMatrices multiply, int32_t dtype, BlockSizes sizes,
                     bool both,
                     const BlockSide<typename Engine::scalar_t, typename Engine::acc_t, grad_t>& own,
                     const BlockSide<typename Engine::scalar_t, typename Engine::acc_t, grad_t>& other,
                     const typename Engine::acc_t* scale, const typename Engine::acc_t* coefficient_scale,
                     typename Engine::acc_t* dots, Write write) {
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  const int64_t N = own.operand.count, M = other.operand.count, D = own.matrix.D, width = own.matrix.width();
  const auto own_factor = block_factor(launcher, own, both),
             other_factor = block_factor(launcher, other, both);
  auto* coefficients = launcher.scratch<scalar_t>(sizes.rows * sizes.columns);
  auto* own_sum = launcher.scratch<acc_t>(std::min(sizes.rows, N) * width);
  auto* other_sum = both ? launcher.scratch<acc_t>(M * width) : nullptr;
  auto* other_dots = both ? launcher.scratch<acc_t>(M) : nullptr;

  const auto finish = [&](const auto& side, const acc_t* sum, int64_t first, int64_t rows, acc_t* to) {
    auto x = side.matrix.strided();
    x.data += first * x.row_stride;
    const acc_t* rnorm = side.operand.rnorm ? side.operand.rnorm + first : nullptr;
    launcher.launch(finish_rows_kernel<scalar_t, acc_t, grad_t>, blocks_for(rows, kRowWarps),
                    kRowWarps * kWarpSize, 0, sum, 1, width, x, rows, D, rnorm, scale, coefficient_scale,
                    side.grad ? side.grad + first * D : nullptr, to);
  };
  for_each_block(sizes, N, M, [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
    write(CoefficientBlock<scalar_t>{coefficients, sizes.columns, row, column, columns, !both}, rows);
    launcher.multiply(
        multiply, {dtype, false, column > 0, rows, width, columns, sizes.columns, other_factor.stride, width,
                   coefficients, other_factor.data + column * other_factor.stride, own_sum});
    if (both) {
      launcher.multiply(
          multiply, {dtype, true, row > 0, columns, width, rows, sizes.columns, own_factor.stride, width,
                     coefficients, own_factor.data + row * own_factor.stride, other_sum + column * width});
    }
    if (column + columns == M) finish(own, own_sum, row, rows, dots + row);
  });
  if (both) finish(other, other_sum, 0, M, other_dots);
}

}  // namespace ssl_kernels
