// The sequences of launches behind contrastive.h, for the engines of one file: contrastive.cu, or
// contrastive_additions.cu with those that take additions. One file, although a long one: forward,
// expectation and backward share how the operands of a call are prepared.
#pragma once

#include "coefficient_blocks.cuh"
#include "contrastive.h"
#include "contrastive_bwd.cuh"
#include "contrastive_expectation.cuh"
#include "contrastive_fwd.cuh"
#include "launcher.cuh"

namespace ssl_kernels {
namespace contrastive {
template <typename scalar_t>
Matrix<scalar_t> rows_matrix(const ContrastiveArgs& args) {
  return {
      static_cast<const scalar_t*>(args.rows), {args.row_strides[0], args.row_strides[1]}, args.N, args.D};
}

template <typename scalar_t>
Matrix<scalar_t> columns_matrix(const ContrastiveArgs& args) {
  return {static_cast<const scalar_t*>(args.columns),
          {args.column_strides[0], args.column_strides[1]},
          args.M,
          args.D};
}

// One side of a call as the kernels take it.
template <typename scalar_t, typename acc_t>
struct Operands {
  Side<scalar_t, acc_t> side;
  SideAdditions<acc_t> additions;
};

// Prepared additions: a bias, a limit for each row of the side, and the exemptions of a side whose limits are
// the other's. The kernels read the padding of a side's last tile.
template <typename acc_t>
SideAdditions<acc_t> prepare_additions(Launcher& launcher, int64_t count, const void* bias, const void* limit,
                                       bool exempts, const uint8_t* exempt) {
  const int64_t padded = round_up(count, kAdditionsPadding);
  auto* base2_bias = bias ? launcher.scratch<acc_t>(padded) : nullptr;
  auto* base2_limit = limit ? launcher.scratch<acc_t>(padded) : nullptr;
  auto* exemption = exempts ? launcher.scratch<acc_t>(padded) : nullptr;
  if (bias || limit || exempts) {
    launcher.launch(contrastive_additions_kernel<acc_t>, blocks_for(padded, 256), 256, 0,
                    static_cast<const acc_t*>(bias), static_cast<const acc_t*>(limit), exempt, count, padded,
                    base2_bias, base2_limit, exemption);
  }
  return {base2_bias, limit ? base2_limit : exemption, exempts ? exemption : base2_limit};
}

template <typename Engine, typename acc_t = typename Engine::acc_t>
SideAdditions<acc_t> row_additions(Launcher& launcher, const ContrastiveArgs& args) {
  if constexpr (!kAdds<Engine>) return {};
  const auto& given = args.additions;
  const bool square = args.columns == nullptr;
  return prepare_additions<acc_t>(launcher, args.N, square ? given.column_bias : given.row_bias,
                                  given.row_limit, square && given.row_limit, given.exempt);
}

template <typename Engine, typename acc_t = typename Engine::acc_t>
SideAdditions<acc_t> column_additions(Launcher& launcher, const ContrastiveArgs& args) {
  if constexpr (!kAdds<Engine>) return {};
  const auto& given = args.additions;
  return prepare_additions<acc_t>(launcher, args.M, given.column_bias, nullptr, given.row_limit != nullptr,
                                  given.exempt);
}

// No base-2 log-sum-exp of bounded logits is larger, so that no centered weight is smaller than the weight.
inline int center_of(const ContrastiveArgs& args) {
  int bits = 0;
  while (bits < 62 && (std::max(args.N, args.M) - 1) >> bits) ++bits;
  return kMostBase2Scale + bits;
}

template <typename Engine, typename Own, typename Other>
ProblemOf<Engine> problem_of(const ContrastiveArgs& args, const Own& own, const Other& other) {
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  ProblemOf<Engine> problem = {};
  problem.own = own.side;
  problem.other = other.side;
  if constexpr (kAdds<Engine>) {
    problem.own_additions = own.additions;
    problem.other_additions = other.additions;
    problem.only_equal_ids = args.additions.only_equal_ids != 0;
  }
  problem.width = round_up(args.D, 16 / sizeof(scalar_t));
  problem.scale = static_cast<const acc_t*>(args.scale);
  problem.P = args.P;
  problem.center = static_cast<acc_t>(center_of(args));
  problem.square = args.columns == nullptr;
  problem.keep_diagonal = args.keep_diagonal != 0 && !problem.square;
  return problem;
}

// Parts of the columns that fill the card together with the groups of row blocks.
constexpr int64_t kPartsBesideGroups = 8;

// Groups of row blocks, each with one set of column sums: no more than fill the card beside the parts, as
// even as they can be.
inline int64_t pick_groups(int64_t row_blocks, int64_t tiles, int64_t slots) {
  const int64_t parts = std::clamp<int64_t>(tiles / kMinTilesPerSplit, 1, kPartsBesideGroups);
  return blocks_for(row_blocks, blocks_for(row_blocks, blocks_for(slots, parts)));
}

// With `column_lse` where kBothDirections.
template <typename Engine, bool kBothDirections>
void forward_pass(Launcher& launcher, const ContrastiveArgs& args,
                  const ProblemOf<Engine>& problem, double* lse, double* column_lse,
                  double* positive_logits) {
  using Shape = FwdShape<Engine, kBothDirections>;
  using acc_t = typename Engine::acc_t;
  using Softmax = OnlineSoftmax<acc_t>;
  const int64_t rows = problem.own.count, columns = problem.other.count;
  if (rows == 0) return;
  const int64_t row_blocks = blocks_for(rows, Shape::kBlockM);
  const int64_t tiles = blocks_for(columns, Shape::kBlockN);
  const int64_t slots = int64_t{multiprocessors()} * Shape::kBlocksPerSm;
  const int64_t groups = kBothDirections ? pick_groups(row_blocks, tiles, slots) : row_blocks;
  const int parts = pick_splits(args.splits, groups, tiles, slots);
  auto* partial = parts > 1 ? launcher.scratch<Softmax>(parts * rows) : nullptr;
  auto* column_partial = kBothDirections ? launcher.scratch<Softmax>(groups * columns) : nullptr;
  const int chunks = blocks_for(problem.width, Shape::kChunk);
  launcher.launch(contrastive_fwd_kernel<Engine, kBothDirections>, dim3(groups, parts), Shape::kThreads,
                  shared_bytes_of<Shape>(chunks), problem, lse, positive_logits, partial,
                  column_partial);
  const auto merge = [&](const Softmax* sums, int64_t count, int64_t entries, double* result) {
    launcher.launch(contrastive_merge_kernel<acc_t, kAdds<Engine>>, blocks_for(entries, 256), 256, 0, sums,
                    static_cast<int>(count), entries, problem.scale, result);
  };
  if (parts > 1) merge(partial, parts, rows, lse);
  if (kBothDirections) merge(column_partial, groups, columns, column_lse);
}

// The same with the expectation of the columns, E.
template <typename Engine, int kWarpsM, int kSliceChunks>
void expectation_pass(Launcher& launcher, const ContrastiveArgs& args,
                      const ProblemOf<Engine>& problem, double* lse,
                      double* positive_logits, typename Engine::acc_t* expectation) {
  using Shape = ExpectationShape<Engine, kWarpsM, kSliceChunks>;
  using acc_t = typename Engine::acc_t;
  const int64_t rows = problem.own.count;
  const int64_t row_blocks = blocks_for(rows, Shape::kBlockM);
  const int64_t tiles = blocks_for(problem.other.count, Shape::kBlockN);
  const int chunks = blocks_for(problem.width, Shape::kChunk);
  const int slices = blocks_for(chunks, Shape::kSliceChunks);
  const int parts = pick_splits(args.splits, row_blocks * slices, tiles, multiprocessors());
  auto* partial_sums = launcher.scratch<OnlineSoftmax<acc_t>>(parts * rows);
  auto* partial = launcher.scratch<acc_t>(parts * rows * problem.width);
  const acc_t* coefficient_scale = nullptr;
  if constexpr (Shape::kScaled) {
    auto* result = launcher.scratch<acc_t>(1);
    launcher.launch(coefficient_scale_kernel<acc_t>, 1, kBlockWarps * kWarpSize, 0, acc_t(1), nullptr,
                    int64_t{0}, nullptr, problem.other.rnorm, problem.other.count, nullptr, int64_t{0},
                    int64_t{0}, result);
    coefficient_scale = result;
  }
  launcher.launch(contrastive_expectation_kernel<Shape, Engine>, dim3(row_blocks, parts, slices),
                  Shape::kThreads, shared_bytes_of<Shape>(chunks), problem,
                  coefficient_scale, positive_logits, partial_sums, partial);
  launcher.launch(contrastive_expectation_merge_kernel<acc_t, kAdds<Engine>>, blocks_for(rows, kRowWarps),
                  kRowWarps * kWarpSize, 0, partial_sums, partial, parts, problem.width, rows, args.D,
                  problem.scale, coefficient_scale, lse, expectation);
}

template <typename Engine>
constexpr bool kWidens = !std::is_same_v<typename Engine::scalar_t, typename Engine::other_t>;

// Beside the sums of doubles no registers are left for additions, whatever the width.
template <typename Engine>
constexpr bool kAlwaysByBlocks = kAdds<Engine> && sizeof(typename Engine::acc_t) == 8;

template <typename Engine>
bool takes_blocks(int64_t D) {
  return kAlwaysByBlocks<Engine> || is_wide<Engine>(D);
}

// The terms of a side's sums, as contrastive_terms_kernel makes them, with `centered` those for one
// exponential too.
template <typename scalar_t, typename acc_t>
void set_terms(Launcher& launcher, const double* lse, const double* grad_lse, Side<scalar_t, acc_t>& side,
               bool centered = false, double center = 0) {
  acc_t* base2_lse = launcher.scratch<acc_t>(side.count);
  acc_t* weight = launcher.scratch<acc_t>(side.count);
  acc_t* centered_weight = centered ? launcher.scratch<acc_t>(side.count) : nullptr;
  launcher.launch(contrastive_terms_kernel<acc_t>, blocks_for(side.count, 256), 256, 0, lse, grad_lse,
                  side.count, base2_lse, weight, center, centered_weight);
  side.base2_lse = base2_lse;
  side.weight = weight;
  side.centered_weight = centered_weight;
}

// The power of two that half coefficients of one owner are scaled by, `without_norms` before those of the
// columns go into them; null for other types.
template <typename Engine>
typename Engine::acc_t* scale_coefficients(Launcher& launcher, const ContrastiveArgs& args,
                                           const ProblemOf<Engine>& problem,
                                           const double* grad_positive_logits, bool without_norms = false) {
  using acc_t = typename Engine::acc_t;
  acc_t* coefficient_scale = nullptr;
  if constexpr (kScalesCoefficients<Engine>) {
    const auto& own = problem.own;
    const auto& other = problem.other;
    coefficient_scale = launcher.scratch<acc_t>(1);
    launcher.launch(coefficient_scale_kernel<acc_t>, 1, kBlockWarps * kWarpSize, 0, acc_t(0), own.weight,
                    own.count, other.weight, without_norms ? nullptr : other.rnorm, other.count,
                    grad_positive_logits, args.N * args.P, args.P, coefficient_scale);
  }
  return coefficient_scale;
}

// Launches what writes the coefficients of a block, and behind the last of its rows what sums the own bias'
// gradient.
template <typename Engine>
class CoefficientWriter {
 public:
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  using Shape = CoefficientShape<Engine>;

  CoefficientWriter(Launcher& launcher, const ContrastiveArgs& args, const ProblemOf<Engine>& problem,
                    BlockSizes sizes, const double* grad_positive_logits, const acc_t* coefficient_scale,
                    acc_t* grad_bias)
      : launcher_(launcher),
        problem_(problem),
        sizes_(sizes),
        parts_(pick_splits(
            args.splits, sizes.rows / Shape::kBlockM, blocks_for(sizes.columns, Shape::kBlockN),
            int64_t{multiprocessors()} * Shape::kBlocksPerSm, blocks_for(sizes.columns, Shape::kBlockN))),
        grad_positive_logits_(grad_positive_logits),
        coefficient_scale_(coefficient_scale),
        grad_bias_(grad_bias) {
    if constexpr (kAdds<Engine>) {
      const int64_t parts = int64_t{blocks_for(problem.other.count, sizes.columns)} * parts_ * Shape::kWarpsN;
      bias_partial_ = grad_bias ? launcher.scratch<acc_t>(parts * sizes.rows) : nullptr;
    }
  }

  void operator()(const CoefficientBlock<scalar_t>& block, int64_t rows) const {
    const int column_block = static_cast<int>(block.first_column / sizes_.columns),
              parts = parts_ * Shape::kWarpsN;
    ProblemOf<Engine> problem = problem_;
    if constexpr (kAdds<Engine>) {
      problem.bias_partial = bias_partial_ ? bias_partial_ + int64_t{column_block} * parts * rows : nullptr;
      problem.bias_row = block.first_row;
      problem.bias_rows = rows;
    }
    launcher_.launch(contrastive_coefficients_kernel<Engine>, dim3(blocks_for(rows, Shape::kBlockM), parts_),
                     Shape::kThreads, shared_bytes_of<Shape>(blocks_for(problem.width, Shape::kChunk)),
                     problem, grad_positive_logits_, coefficient_scale_, block.first_row, block.first_column,
                     block.columns, block.with_norms, block.data, block.stride);
    if (!bias_partial_ || block.first_column + block.columns < problem.other.count) return;
    launcher_.launch(sum_parts_kernel<acc_t>, blocks_for(rows, 256), 256, 0,
                     static_cast<const acc_t*>(bias_partial_), (column_block + 1) * parts, rows,
                     grad_bias_ + block.first_row);
  }

 private:
  Launcher& launcher_;
  const ProblemOf<Engine>& problem_;
  BlockSizes sizes_;
  int parts_;
  const double* grad_positive_logits_;
  const acc_t* coefficient_scale_;
  acc_t *grad_bias_, *bias_partial_ = nullptr;
};

// The same of wide rows: the lse first, then the product of the softmax, as coefficients, and the columns.
template <typename Engine>
void wide_expectation_pass(Launcher& launcher, const ContrastiveArgs& args, ProblemOf<Engine> problem,
                           double* lse, double* positive_logits, typename Engine::acc_t* expectation) {
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  forward_pass<Engine, false>(launcher, args, problem, lse, nullptr, positive_logits);
  set_terms(launcher, lse, nullptr, problem.own);
  const acc_t* coefficient_scale = scale_coefficients<Engine>(launcher, args, problem, nullptr);
  const int64_t N = problem.own.count, M = problem.other.count;
  const BlockSizes sizes = pick_blocks(args.block_rows, args.block_columns, N, M, sizeof(scalar_t));
  const CoefficientWriter<Engine> write(launcher, args, problem, sizes, nullptr, coefficient_scale, nullptr);
  auto* coefficients = launcher.scratch<scalar_t>(sizes.rows * sizes.columns);
  for_each_block(sizes, N, M, [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
    write({coefficients, sizes.columns, row, column, columns, true}, rows);
    launcher.multiply(
        args.multiply,
        {args.dtype, false, column > 0, rows, args.D, columns, sizes.columns, problem.other.stride, args.D,
         coefficients, problem.other.data + column * problem.other.stride, expectation + row * args.D});
  });
  if (coefficient_scale) {
    launcher.launch(unscale_kernel<acc_t>, blocks_for(N * args.D, 256), 256, 0, expectation, N * args.D,
                    coefficient_scale);
  }
}

template <typename Engine>
void forward(Launcher& launcher, const ContrastiveFwdArgs& args) {
  using scalar_t = typename Engine::scalar_t;
  using other_t = typename Engine::other_t;
  using acc_t = typename Engine::acc_t;
  const ContrastiveArgs& common = args.common;
  const bool square = common.columns == nullptr;
  auto* row_rnorm = common.normalize_rows ? static_cast<acc_t*>(args.row_rnorm) : nullptr;
  auto* column_rnorm = common.normalize_columns && !square ? static_cast<acc_t*>(args.column_rnorm) : nullptr;

  Operands<scalar_t, acc_t> rows = {{prepare(launcher, rows_matrix<scalar_t>(common), row_rnorm)},
                                    row_additions<Engine>(launcher, common)};
  rows.side.ids = common.row_ids;
  Operands<other_t, acc_t> columns = {};
  if (!square) {
    columns = {{prepare(launcher, columns_matrix<other_t>(common), column_rnorm)},
               column_additions<Engine>(launcher, common)};
    columns.side.ids = common.column_ids;
  } else if constexpr (!kWidens<Engine>) {
    columns = rows;
  }
  rows.side.positives = common.positives;
  const auto problem = problem_of<Engine>(common, rows, columns);
  double* positive_logits = common.positives ? args.positive_logits : nullptr;
  if constexpr (!kWidens<Engine>) {
    if (args.expectation && exceeds_accumulators<scalar_t>(common.D)) {
      wide_expectation_pass<Engine>(launcher, common, problem, args.lse, positive_logits,
                                    static_cast<acc_t*>(args.expectation));
      return;
    }
  }
  if (args.expectation) {
    with_shape_for_width<scalar_t>(common.D, [&](auto warps_m, auto slice_chunks) {
      expectation_pass<Engine, warps_m, slice_chunks>(launcher, common, problem, args.lse, positive_logits,
                                                      static_cast<acc_t*>(args.expectation));
    });
    return;
  }
  if constexpr (!kWidens<Engine>) {
    if (!square && common.both_directions) {
      forward_pass<Engine, true>(launcher, common, problem, args.lse, args.column_lse, positive_logits);
      return;
    }
  }
  forward_pass<Engine, false>(launcher, common, problem, args.lse, nullptr, positive_logits);
}

// Launches what sums the own bias' gradient, for `rows` rows from first_row on, in `parts` parts:
// launch(problem).
template <typename Engine, typename Launch>
void with_bias_sums(Launcher& launcher, const ProblemOf<Engine>& problem, int64_t first_row, int64_t rows,
                    int parts, typename Engine::acc_t* grad_bias, Launch launch) {
  if constexpr (kAdds<Engine>) {
    using acc_t = typename Engine::acc_t;
    ProblemOf<Engine> summing = problem;
    summing.bias_partial = grad_bias ? launcher.scratch<acc_t>(parts * rows) : nullptr;
    summing.bias_row = first_row;
    summing.bias_rows = rows;
    launch(summing);
    if (!grad_bias) return;
    launcher.launch(sum_parts_kernel<acc_t>, blocks_for(rows, 256), 256, 0,
                    static_cast<const acc_t*>(summing.bias_partial), parts, rows, grad_bias + first_row);
  } else {
    launch(problem);
  }
}

// One owner's gradient; `matrix` is the owner's as the caller passed it. Writes the dots of its rows.
template <typename Engine, int kWarpsM, int kSliceChunks>
void backward_pass(Launcher& launcher, const ContrastiveArgs& args, const ProblemOf<Engine>& problem,
                   const Matrix<typename Engine::scalar_t>& matrix, const double* grad_positive_logits,
                   typename Engine::scalar_t* grad, typename Engine::acc_t* grad_bias,
                   typename Engine::acc_t* dots) {
  using Shape = BwdShape<Engine, kWarpsM, kSliceChunks>;
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  const auto& own = problem.own;
  const int64_t row_blocks = blocks_for(own.count, Shape::kBlockM);
  const int64_t tiles = blocks_for(problem.other.count, Shape::kBlockN);
  const int chunks = blocks_for(problem.width, Shape::kChunk);
  const int parts = pick_splits(args.splits, row_blocks, tiles, multiprocessors());
  auto* partial = launcher.scratch<acc_t>(parts * own.count * problem.width);
  const acc_t* coefficient_scale = scale_coefficients<Engine>(launcher, args, problem, grad_positive_logits);
  with_bias_sums<Engine>(launcher, problem, 0, own.count, parts * Shape::kWarpsN, grad_bias,
                         [&](const ProblemOf<Engine>& summing) {
                           launcher.launch(contrastive_bwd_kernel<Shape, Engine>, dim3(row_blocks, parts),
                                           Shape::kThreads, shared_bytes_of<Shape>(chunks), summing,
                                           grad_positive_logits, coefficient_scale, partial);
                         });
  launcher.launch(finish_rows_kernel<scalar_t, acc_t, scalar_t>, blocks_for(own.count, kRowWarps),
                  kRowWarps * kWarpSize, 0, static_cast<const acc_t*>(partial), parts, problem.width,
                  matrix.strided(), own.count, args.D, own.rnorm, problem.scale, coefficient_scale, grad,
                  dots);
}

// One side of a call to the backward: what it owns and what is wanted of it.
template <typename scalar_t, typename acc_t>
struct OwnGradients {
  Matrix<scalar_t> matrix;  // as the caller passed it
  scalar_t* grad;           // or null, as the bias'
  acc_t* grad_bias;
  acc_t* dots;

  bool any() const { return grad || grad_bias; }
};

// The same of wide rows; with `both` the gradient of the other side too, from the same coefficients.
template <typename Engine>
void wide_backward_pass(Launcher& launcher, const ContrastiveArgs& args, const ProblemOf<Engine>& problem,
                        const double* grad_positive_logits,
                        const OwnGradients<typename Engine::scalar_t, typename Engine::acc_t>& own,
                        const OwnGradients<typename Engine::scalar_t, typename Engine::acc_t>& other,
                        bool both) {
  using scalar_t = typename Engine::scalar_t;
  const auto* coefficient_scale =
      scale_coefficients<Engine>(launcher, args, problem, grad_positive_logits, both);
  const BlockSizes sizes = pick_blocks(args.block_rows, args.block_columns, problem.own.count,
                                       problem.other.count, sizeof(scalar_t));
  const CoefficientWriter<Engine> write(launcher, args, problem, sizes, grad_positive_logits,
                                        coefficient_scale, own.grad_bias);
  using Side = BlockSide<scalar_t, typename Engine::acc_t, scalar_t>;
  const auto side_of = [](const auto& side, const auto& wanted) {
    return Side{side, wanted.matrix, side.rnorm != nullptr, wanted.grad};
  };
  block_gradients<Engine, scalar_t>(launcher, args.multiply, args.dtype, sizes, both,
                                    side_of(problem.own, own), side_of(problem.other, other), problem.scale,
                                    coefficient_scale, own.dots, write);
}

// The gradients of `own`, and of `other` if any are wanted, exchanged(problem) being the problem seen from
// there.
template <typename Engine, typename Gradients>
void backward_of_sides(Launcher& launcher, const ContrastiveArgs& args, const ProblemOf<Engine>& problem,
                       const ProblemOf<Engine>& exchanged, const double* grad_positive_logits,
                       const Gradients& own, const Gradients& other) {
  using scalar_t = typename Engine::scalar_t;
  if (takes_blocks<Engine>(args.D)) {
    // The gradient of a bias is summed by the walk that owns its rows.
    const bool both = own.any() && other.grad && !other.grad_bias;
    wide_backward_pass<Engine>(launcher, args, problem, grad_positive_logits, own, other, both);
    if (other.any() && !both) {
      wide_backward_pass<Engine>(launcher, args, exchanged, grad_positive_logits, other, own, false);
    }
    return;
  }
  if constexpr (!kAlwaysByBlocks<Engine>) {
    with_shape_for_narrow_rows<scalar_t>(args.D, [&](auto warps_m, auto slice_chunks) {
      backward_pass<Engine, warps_m, slice_chunks>(launcher, args, problem, own.matrix, grad_positive_logits,
                                                   own.grad, own.grad_bias, own.dots);
      if (!other.any()) return;
      backward_pass<Engine, warps_m, slice_chunks>(launcher, args, exchanged, other.matrix,
                                                   grad_positive_logits, other.grad, other.grad_bias,
                                                   other.dots);
    });
  }
}

// The gradients from the expectation, without a walk.
template <typename Engine>
void expectation_backward(Launcher& launcher, const ContrastiveBwdArgs& args) {
  using scalar_t = typename Engine::scalar_t;
  using other_t = typename Engine::other_t;
  using acc_t = typename Engine::acc_t;
  const ContrastiveArgs& common = args.common;
  auto* dots = launcher.scratch<acc_t>(common.N);
  launcher.launch(contrastive_expectation_bwd_kernel<scalar_t, acc_t, other_t>,
                  blocks_for(common.N, kRowWarps), kRowWarps * kWarpSize, 0,
                  static_cast<const acc_t*>(args.expectation), rows_matrix<scalar_t>(common).strided(),
                  common.normalize_rows ? static_cast<const acc_t*>(args.row_rnorm) : nullptr,
                  columns_matrix<other_t>(common).strided(),
                  common.normalize_columns ? static_cast<const acc_t*>(args.column_rnorm) : nullptr, common.N,
                  common.M, common.D, common.positives, common.P, args.grad_lse,
                  common.positives ? args.grad_positive_logits : nullptr,
                  static_cast<const acc_t*>(common.scale), static_cast<scalar_t*>(args.grad_rows), dots);
  launcher.launch(sum_rows_kernel<acc_t, acc_t>, 1, kBlockWarps * kWarpSize, 0, dots, common.N, acc_t(1),
                  static_cast<acc_t*>(args.grad_scale));
}

template <typename Engine>
void backward(Launcher& launcher, const ContrastiveBwdArgs& args) {
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  const ContrastiveArgs& common = args.common;
  const bool square = common.columns == nullptr;
  const double* grad_positive_logits = common.positives ? args.grad_positive_logits : nullptr;

  const Matrix<scalar_t> row_matrix = rows_matrix<scalar_t>(common);
  Operands<scalar_t, acc_t> rows = {{prepare<scalar_t, acc_t>(launcher, row_matrix, nullptr)},
                                    row_additions<Engine>(launcher, common)};
  rows.side.rnorm = common.normalize_rows ? static_cast<const acc_t*>(args.row_rnorm) : nullptr;
  rows.side.ids = common.row_ids;
  // Where both sides have sums and norms, and nothing is added to their logits.
  const bool centered = !kAdds<Engine> && args.grad_lse && common.normalize_rows &&
                        (square || (args.grad_column_lse && common.normalize_columns));
  const int center = center_of(common);
  if (args.grad_lse) set_terms(launcher, args.lse, args.grad_lse, rows.side, centered, center);
  rows.side.positives = common.positives;
  auto* grad_row_bias = static_cast<acc_t*>(args.grad_row_bias);
  auto* grad_column_bias = static_cast<acc_t*>(args.grad_column_bias);
  const OwnGradients<scalar_t, acc_t> of_rows = {row_matrix, static_cast<scalar_t*>(args.grad_rows),
                                                 square ? grad_column_bias : grad_row_bias,
                                                 launcher.scratch<acc_t>(common.N)};
  const acc_t* dots = of_rows.dots;
  int64_t dot_count = common.N;
  if (square) {
    const auto problem = problem_of<Engine>(common, rows, rows);
    backward_of_sides<Engine>(launcher, common, problem, problem, grad_positive_logits, of_rows,
                              OwnGradients<scalar_t, acc_t>{row_matrix});
  } else {
    const Matrix<scalar_t> column_matrix = columns_matrix<scalar_t>(common);
    Operands<scalar_t, acc_t> columns = {{prepare<scalar_t, acc_t>(launcher, column_matrix, nullptr)},
                                         column_additions<Engine>(launcher, common)};
    columns.side.rnorm = common.normalize_columns ? static_cast<const acc_t*>(args.column_rnorm) : nullptr;
    columns.side.ids = common.column_ids;
    if (args.grad_column_lse) {
      set_terms(launcher, args.column_lse, args.grad_column_lse, columns.side, centered, center);
    }
    const OwnGradients<scalar_t, acc_t> of_columns = {column_matrix,
                                                      static_cast<scalar_t*>(args.grad_columns),
                                                      grad_column_bias, launcher.scratch<acc_t>(common.M)};
    const auto from_rows = problem_of<Engine>(common, rows, columns);
    const auto from_columns = problem_of<Engine>(common, columns, rows);
    if (of_rows.any() || !of_columns.any()) {
      backward_of_sides<Engine>(launcher, common, from_rows, from_columns, grad_positive_logits, of_rows,
                                of_columns);
    } else {
      backward_of_sides<Engine>(launcher, common, from_columns, from_rows, grad_positive_logits, of_columns,
                                of_rows);
      dots = of_columns.dots;
      dot_count = common.M;
    }
  }
  launcher.launch(sum_rows_kernel<acc_t, acc_t>, 1, kBlockWarps * kWarpSize, 0, dots, dot_count,
                  square ? acc_t(0.5) : acc_t(1), static_cast<acc_t*>(args.grad_scale));
}

template <typename Engine>
void run(Launcher& launcher, const ContrastiveFwdArgs& args) {
  forward<Engine>(launcher, args);
}

template <typename Engine>
void run(Launcher& launcher, const ContrastiveBwdArgs& args) {
  if constexpr (!kAdds<Engine>) {
    if (args.expectation) return expectation_backward<Engine>(launcher, args);
  }
  if constexpr (!kWidens<Engine>) backward<Engine>(launcher, args);
}

// What a call launches by Family::run(launcher, args), and the scratch memory that it needs.
template <typename Family, typename Args>
int launch(const Args& args, cudaStream_t stream) {
  Launcher launcher(args.common.workspace, stream, false);
  Family::run(launcher, args);
  return launcher.error();
}

template <typename Family, typename Args>
int workspace(const Args& args, size_t* bytes) {
  Launcher launcher(args.common.workspace, nullptr, true);
  Family::run(launcher, args);
  *bytes = launcher.used();
  return launcher.error();
}

}  // namespace contrastive
}  // namespace ssl_kernels
