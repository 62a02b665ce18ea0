// The sequences of launches behind contrastive.h, for the engines of one file: contrastive.cu, or contrastive_additions.cu
// with those that take additions.
#pragma once

#include "contrastive.h"

#include "contrastive_bwd.cuh"
#include "contrastive_expectation.cuh"
#include "contrastive_fwd.cuh"
#include "launcher.cuh"
#include "slab_product.cuh"

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

// Prepared additions: a bias, a limit for each row of the side, and the exemptions of a side whose limits are the other's.
// The kernels read the padding of a side's last tile.
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
  return prepare_additions<acc_t>(launcher, args.N, square ? given.column_bias : given.row_bias, given.row_limit,
                                  square && given.row_limit, given.exempt);
}

template <typename Engine, typename acc_t = typename Engine::acc_t>
SideAdditions<acc_t> column_additions(Launcher& launcher, const ContrastiveArgs& args) {
  if constexpr (!kAdds<Engine>) return {};
  const auto& given = args.additions;
  return prepare_additions<acc_t>(launcher, args.M, given.column_bias, nullptr, given.row_limit != nullptr,
                                  given.exempt);
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
  problem.square = args.columns == nullptr;
  problem.keep_diagonal = args.keep_diagonal != 0 && !problem.square;
  return problem;
}

// Parts of the columns that fill the card together with the groups of row blocks.
constexpr int64_t kPartsBesideGroups = 8;

// Groups of row blocks, each with one set of column sums: no more than fill the card beside the parts, as even as
// they can be.
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
    launcher.launch(contrastive_merge_kernel<acc_t, kAdds<Engine>>, blocks_for(entries, 256), 256, 0, sums, static_cast<int>(count),
                    entries, problem.scale, result);
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
    launcher.launch(coefficient_scale_kernel<acc_t>, 1, kBlockWarps * kWarpSize, 0, acc_t(1),
                    nullptr, int64_t{0}, nullptr, problem.other.rnorm, problem.other.count, nullptr, int64_t{0},
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

template <typename scalar_t, typename acc_t>
void add_terms(Launcher& launcher, const double* lse, const double* grad_lse, Side<scalar_t, acc_t>& side) {
  if (!grad_lse) return;
  acc_t* base2_lse = launcher.scratch<acc_t>(side.count);
  acc_t* weight = launcher.scratch<acc_t>(side.count);
  launcher.launch(contrastive_terms_kernel<acc_t>, blocks_for(side.count, 256), 256, 0, lse, grad_lse,
                  side.count, base2_lse, weight);
  side.base2_lse = base2_lse;
  side.weight = weight;
}

// The power of two that half coefficients of one owner are scaled by; null for other types.
template <typename Engine>
typename Engine::acc_t* scale_coefficients(Launcher& launcher, const ContrastiveArgs& args,
                                           const ProblemOf<Engine>& problem, const double* grad_positive_logits) {
  using acc_t = typename Engine::acc_t;
  acc_t* coefficient_scale = nullptr;
  if constexpr (kScalesCoefficients<Engine>) {
    const auto& own = problem.own;
    const auto& other = problem.other;
    coefficient_scale = launcher.scratch<acc_t>(1);
    launcher.launch(coefficient_scale_kernel<acc_t>, 1, kBlockWarps * kWarpSize, 0, acc_t(0), own.weight, own.count,
                    other.weight, other.rnorm, other.count, grad_positive_logits, args.N * args.P, args.P,
                    coefficient_scale);
  }
  return coefficient_scale;
}

// Launches what sums the own bias' gradient, for `rows` rows from first_row on, in `parts` parts: launch(problem).
template <typename Engine, typename Launch>
void with_bias_sums(Launcher& launcher, const ProblemOf<Engine>& problem, int64_t first_row, int64_t rows, int parts,
                    typename Engine::acc_t* grad_bias, Launch launch) {
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
void backward_pass(Launcher& launcher, const ContrastiveArgs& args,
                   const ProblemOf<Engine>& problem,
                   const Matrix<typename Engine::scalar_t>& matrix, const double* grad_positive_logits,
                   typename Engine::scalar_t* grad, typename Engine::acc_t* grad_bias, typename Engine::acc_t* dots) {
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
  with_bias_sums<Engine>(
      launcher, problem, 0, own.count, parts * Shape::kWarpsN, grad_bias, [&](const ProblemOf<Engine>& summing) {
        launcher.launch(contrastive_bwd_kernel<Shape, Engine>, dim3(row_blocks, parts), Shape::kThreads,
                        shared_bytes_of<Shape>(chunks), summing, grad_positive_logits, coefficient_scale, partial);
      });
  launcher.launch(finish_rows_kernel<scalar_t, acc_t, scalar_t>, blocks_for(own.count, kRowWarps),
                  kRowWarps * kWarpSize, 0, static_cast<const acc_t*>(partial), parts, problem.width,
                  matrix.strided(), own.count, args.D, own.rnorm, problem.scale, coefficient_scale, grad, dots);
}

// The same of wide rows.
template <typename Engine>
void wide_backward_pass(Launcher& launcher, const ContrastiveArgs& args, const ProblemOf<Engine>& problem,
                        const Matrix<typename Engine::scalar_t>& matrix, const double* grad_positive_logits,
                        typename Engine::scalar_t* grad, typename Engine::acc_t* grad_bias,
                        typename Engine::acc_t* dots) {
  using Shape = CoefficientShape<Engine>;
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  const acc_t* coefficient_scale = scale_coefficients<Engine>(launcher, args, problem, grad_positive_logits);
  const int64_t tiles = blocks_for(problem.other.count, Shape::kBlockN);
  const auto write = [&](int64_t first_row, unsigned row_blocks, scalar_t* coefficients, int64_t stride) {
    const int parts = pick_splits(args.splits, row_blocks, tiles, multiprocessors() * Shape::kBlocksPerSm, tiles);
    const int64_t rows = std::min<int64_t>(problem.own.count - first_row, int64_t{row_blocks} * Shape::kBlockM);
    with_bias_sums<Engine>(launcher, problem, first_row, rows, parts * Shape::kWarpsN, grad_bias,
                           [&](const ProblemOf<Engine>& summing) {
                             launcher.launch(contrastive_coefficients_kernel<Engine>, dim3(row_blocks, parts),
                                             Shape::kThreads, Shape::shared_bytes(kOwnerSlots), summing,
                                             grad_positive_logits, coefficient_scale, first_row, stride, coefficients);
                           });
  };
  slab_gradient<PlainEngine<Engine>>(launcher, args.splits, args.slab_rows, Shape::kBlockN, problem.own, problem.other, matrix,
                        problem.scale, coefficient_scale, grad, dots, write);
}

template <typename Engine, typename... Args>
void backward_pass_for_width(Launcher& launcher, const ContrastiveArgs& args, const ProblemOf<Engine>& problem,
                             const Args&... rest) {
  using scalar_t = typename Engine::scalar_t;
  if (problem.own.count == 0) return;
  // Beside the sums of doubles no registers are left for additions.
  constexpr bool kAlwaysBySlabs = kAdds<Engine> && sizeof(typename Engine::acc_t) == 8;
  if (kAlwaysBySlabs || is_wide<scalar_t>(args.D)) return wide_backward_pass<Engine>(launcher, args, problem, rest...);
  if constexpr (!kAlwaysBySlabs) {
    with_shape_for_width<scalar_t>(args.D, [&](auto warps_m, auto slice_chunks) {
      backward_pass<Engine, warps_m, slice_chunks>(launcher, args, problem, rest...);
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
  launcher.launch(contrastive_expectation_bwd_kernel<scalar_t, acc_t, other_t>, blocks_for(common.N, kRowWarps),
                  kRowWarps * kWarpSize, 0, static_cast<const acc_t*>(args.expectation),
                  rows_matrix<scalar_t>(common).strided(),
                  common.normalize_rows ? static_cast<const acc_t*>(args.row_rnorm) : nullptr,
                  columns_matrix<other_t>(common).strided(),
                  common.normalize_columns ? static_cast<const acc_t*>(args.column_rnorm) : nullptr, common.N,
                  common.M, common.D, common.positives, common.P, args.grad_lse,
                  common.positives ? args.grad_positive_logits : nullptr, static_cast<const acc_t*>(common.scale),
                  static_cast<scalar_t*>(args.grad_rows), dots);
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
  add_terms(launcher, args.lse, args.grad_lse, rows.side);
  rows.side.positives = common.positives;
  auto* row_dots = launcher.scratch<acc_t>(common.N);
  auto* grad_rows = static_cast<scalar_t*>(args.grad_rows);
  const acc_t* dots = row_dots;
  int64_t dot_count = common.N;

  auto* grad_row_bias = static_cast<acc_t*>(args.grad_row_bias);
  auto* grad_column_bias = static_cast<acc_t*>(args.grad_column_bias);
  if (square) {
    backward_pass_for_width<Engine>(launcher, common, problem_of<Engine>(common, rows, rows), row_matrix,
                                    grad_positive_logits, grad_rows, grad_column_bias, row_dots);
  } else {
    const Matrix<scalar_t> column_matrix = columns_matrix<scalar_t>(common);
    Operands<scalar_t, acc_t> columns = {{prepare<scalar_t, acc_t>(launcher, column_matrix, nullptr)},
                                         column_additions<Engine>(launcher, common)};
    columns.side.rnorm = common.normalize_columns ? static_cast<const acc_t*>(args.column_rnorm) : nullptr;
    columns.side.ids = common.column_ids;
    add_terms(launcher, args.column_lse, args.grad_column_lse, columns.side);
    const bool of_rows = grad_rows || grad_row_bias, of_columns = args.grad_columns || grad_column_bias;
    if (of_rows || !of_columns) {
      backward_pass_for_width<Engine>(launcher, common, problem_of<Engine>(common, rows, columns), row_matrix,
                                      grad_positive_logits, grad_rows, grad_row_bias, row_dots);
    }
    if (of_columns) {
      auto* column_dots = launcher.scratch<acc_t>(common.M);
      backward_pass_for_width<Engine>(launcher, common, problem_of<Engine>(common, columns, rows), column_matrix,
                                      grad_positive_logits, static_cast<scalar_t*>(args.grad_columns),
                                      grad_column_bias, column_dots);
      if (!of_rows) {
        dots = column_dots;
        dot_count = common.M;
      }
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
