// Launchers of sigmoid_pairs.h.
#include "sigmoid_pairs.h"

#include "launcher.cuh"
#include "sigmoid_pairs.cuh"

namespace ssl_kernels {
namespace sigmoid_pairs {
namespace {

template <typename Engine>
struct Call {
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  Matrix<scalar_t> rows, columns;
  ProblemOf<Engine> problem;  // seen from the rows

  Call(Launcher& launcher, const SigmoidPairsArgs& args, const acc_t* weight)
      : rows{static_cast<const scalar_t*>(args.rows),
             {args.row_strides[0], args.row_strides[1]},
             args.N,
             args.D},
        columns{static_cast<const scalar_t*>(args.columns),
                {args.column_strides[0], args.column_strides[1]},
                args.M,
                args.D} {
    acc_t* row_rnorm = args.normalize_rows ? launcher.scratch<acc_t>(args.N) : nullptr;
    acc_t* column_rnorm = args.normalize_columns ? launcher.scratch<acc_t>(args.M) : nullptr;
    problem.own = prepare(launcher, rows, row_rnorm);
    problem.other = prepare(launcher, columns, column_rnorm);
    if (!args.normalize_rows) problem.own.rnorm = nullptr;
    if (!args.normalize_columns) problem.other.rnorm = nullptr;
    problem.width = rows.width();
    problem.scale = static_cast<const acc_t*>(args.scale);
    problem.bias = static_cast<const acc_t*>(args.bias);
    problem.diagonal = args.diagonal;
    problem.own_weight = weight;
    problem.other_weight = nullptr;
    if constexpr (kHasIds<Engine>) {
      problem.own_ids = args.row_ids;
      problem.other_ids = args.column_ids;
      problem.equal_are_positive = args.equal_ids_are_positive != 0;
    }
  }

  ProblemOf<Engine> from_columns() const {
    auto exchanged = problem;
    std::swap(exchanged.own, exchanged.other);
    std::swap(exchanged.own_weight, exchanged.other_weight);
    if constexpr (kHasIds<Engine>) std::swap(exchanged.own_ids, exchanged.other_ids);
    exchanged.diagonal = -problem.diagonal;
    return exchanged;
  }
};

template <typename T, typename result_t>
void sum_into(Launcher& launcher, const T* values, int64_t count, result_t* result) {
  launcher.launch(sum_rows_kernel<T, result_t>, 1, kBlockWarps * kWarpSize, 0, values, count, T(1), result);
}

// Losses of all rows, (N,), or their sum.
template <typename Engine>
void loss_pass(Launcher& launcher, const SigmoidPairsFwdArgs& args) {
  using Shape = FwdShape<Engine>;
  const SigmoidPairsArgs& common = args.common;
  const Call<Engine> call(launcher, common, nullptr);
  const int64_t row_blocks = blocks_for(common.N, Shape::kBlockM);
  const int64_t tiles = blocks_for(common.M, Shape::kBlockN);
  const int chunks = blocks_for(call.problem.width, Shape::kChunk);
  const int parts = pick_splits(common.splits, row_blocks, tiles, int64_t{multiprocessors()} * 2);
  double* partial = parts > 1 || args.total ? launcher.scratch<double>(parts * common.N) : args.losses;
  launcher.launch(sigmoid_pairs_fwd_kernel<Engine>, dim3(row_blocks, parts), Shape::kThreads,
                  shared_bytes_of<Shape>(chunks), call.problem, partial);
  if (args.total) {
    sum_into<double, double>(launcher, partial, parts * common.N, args.losses);
  } else if (parts > 1) {
    launcher.launch(sum_parts_kernel<double>, blocks_for(common.N, 256), 256, 0, partial, parts, common.N,
                    args.losses);
  }
}

struct Sums {
  double* total;    // of the losses, or null
  void* grad_scale;  // or null: another pass makes them
  void* grad_bias;
};

// `dots` are those of the rows of the side that the sums come with.
template <typename acc_t>
void sum_up(Launcher& launcher, const Sums& sums, const double* losses, const double* biases, int64_t warps,
            const acc_t* dots, int64_t count) {
  if (sums.total) sum_into<double, double>(launcher, losses, warps, sums.total);
  if (!sums.grad_bias) return;
  sum_into<double, acc_t>(launcher, biases, warps, static_cast<acc_t*>(sums.grad_bias));
  sum_into<acc_t, acc_t>(launcher, dots, count, static_cast<acc_t*>(sums.grad_scale));
}

// The power of two that half coefficients are scaled by, `without_norms` before those of the other side go
// into them; null for other types.
template <typename Engine>
const typename Engine::acc_t* scale_coefficients(Launcher& launcher, const ProblemOf<Engine>& problem,
                                                 bool without_norms) {
  using acc_t = typename Engine::acc_t;
  acc_t* result = nullptr;
  if constexpr (kScalesCoefficients<Engine>) {
    result = launcher.scratch<acc_t>(1);
    const bool weighted = problem.own_weight || problem.other_weight;
    launcher.launch(coefficient_scale_kernel<acc_t>, 1, kBlockWarps * kWarpSize, 0, acc_t(weighted ? 0 : 1),
                    problem.own_weight, problem.own.count, problem.other_weight,
                    without_norms ? nullptr : problem.other.rnorm, problem.other.count, nullptr, int64_t{0},
                    int64_t{0}, result);
  }
  return result;
}

// One side's gradient, in grad_t, unless null; and the sums.
template <typename Engine, typename grad_t, int kWarpsM, int kSliceChunks>
void gradient_pass(Launcher& launcher, const SigmoidPairsArgs& args, const ProblemOf<Engine>& problem,
                   const Matrix<typename Engine::scalar_t>& matrix, grad_t* grad, const Sums& sums) {
  using Shape = BwdShape<Engine, kWarpsM, kSliceChunks>;
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  const int64_t count = problem.own.count;
  const int64_t row_blocks = blocks_for(count, Shape::kBlockM);
  const int64_t tiles = blocks_for(problem.other.count, Shape::kBlockN);
  const int chunks = blocks_for(problem.width, Shape::kChunk);
  const int parts = pick_splits(args.splits, row_blocks, tiles, multiprocessors());
  const int64_t warps = row_blocks * parts * Shape::kWarps;
  auto* partial = launcher.scratch<acc_t>(parts * count * problem.width);
  auto* dots = launcher.scratch<acc_t>(count);
  double* losses = sums.total ? launcher.scratch<double>(warps) : nullptr;
  double* biases = sums.grad_bias ? launcher.scratch<double>(warps) : nullptr;
  const acc_t* coefficient_scale = scale_coefficients<Engine>(launcher, problem, false);
  launcher.launch(sigmoid_pairs_bwd_kernel<Shape, Engine>, dim3(row_blocks, parts), Shape::kThreads,
                  shared_bytes_of<Shape>(chunks), problem, coefficient_scale, losses, biases, partial);
  launcher.launch(finish_rows_kernel<scalar_t, acc_t, grad_t>, blocks_for(count, kRowWarps),
                  kRowWarps * kWarpSize, 0, partial, parts, problem.width, matrix.strided(), count, args.D,
                  problem.own.rnorm, problem.scale, coefficient_scale, grad, dots);
  sum_up(launcher, sums, losses, biases, warps, dots, count);
}

// The same of wide rows, with the gradient of the other side too where it is wanted, from the same
// coefficients.
template <typename Engine, typename grad_t>
void wide_gradient_pass(Launcher& launcher, const SigmoidPairsArgs& args, const ProblemOf<Engine>& problem,
                        const BlockSide<typename Engine::scalar_t, typename Engine::acc_t, grad_t>& own,
                        const BlockSide<typename Engine::scalar_t, typename Engine::acc_t, grad_t>& other,
                        const Sums& sums) {
  using Shape = CoefficientShape<Engine>;
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  const int64_t N = problem.own.count, M = problem.other.count;
  const bool both = other.grad != nullptr;
  const BlockSizes sizes = pick_blocks(args.block_rows, args.block_columns, N, M, sizeof(scalar_t));
  const int64_t tiles = blocks_for(sizes.columns, Shape::kBlockN);
  const int parts = pick_splits(args.splits, sizes.rows / Shape::kBlockM, tiles,
                                int64_t{multiprocessors()} * Shape::kBlocksPerSm, tiles);
  const int64_t warps =
      int64_t{blocks_for(N, Shape::kBlockM)} * blocks_for(M, sizes.columns) * parts * Shape::kWarps;
  auto* dots = launcher.scratch<acc_t>(N);
  double* losses = sums.total ? launcher.scratch<double>(warps) : nullptr;
  double* biases = launcher.scratch<double>(warps);
  const acc_t* coefficient_scale = scale_coefficients<Engine>(launcher, problem, both);
  int64_t written = 0;
  const auto write = [&](const CoefficientBlock<scalar_t>& block, int64_t rows) {
    const unsigned row_blocks = blocks_for(rows, Shape::kBlockM);
    launcher.launch(sigmoid_pairs_coefficients_kernel<Engine>, dim3(row_blocks, parts), Shape::kThreads,
                    shared_bytes_of<Shape>(blocks_for(problem.width, Shape::kChunk)), problem,
                    coefficient_scale, block.first_row, block.first_column, block.columns, block.with_norms,
                    block.data, block.stride, losses ? losses + written : nullptr, biases + written);
    written += int64_t{row_blocks} * parts * Shape::kWarps;
  };
  block_gradients<Engine, grad_t>(launcher, args.multiply, args.dtype, sizes, both, own, other, problem.scale,
                                  coefficient_scale, dots, write);
  sum_up(launcher, sums, losses, biases, warps, dots, N);
}

// The gradients of both sides where they are needed, and the sums from the first pass.
template <typename Engine, typename grad_t>
void gradients(Launcher& launcher, const SigmoidPairsArgs& args, const typename Engine::acc_t* weight,
               void* grad_rows, void* grad_columns, Sums sums) {
  const Call<Engine> call(launcher, args, weight);
  if (is_wide<Engine>(args.D)) {
    using Side = BlockSide<typename Engine::scalar_t, typename Engine::acc_t, grad_t>;
    const Side rows = {call.problem.own, call.rows, args.normalize_rows != 0,
                       static_cast<grad_t*>(grad_rows)};
    const Side columns = {call.problem.other, call.columns, args.normalize_columns != 0,
                          static_cast<grad_t*>(grad_columns)};
    if (grad_rows || !grad_columns) {
      wide_gradient_pass<Engine, grad_t>(launcher, args, call.problem, rows, columns, sums);
    } else {
      wide_gradient_pass<Engine, grad_t>(launcher, args, call.from_columns(), columns, rows, sums);
    }
    return;
  }
  with_shape_for_narrow_rows<typename Engine::scalar_t>(args.D, [&](auto warps_m, auto slice_chunks) {
    if (grad_rows || !grad_columns) {
      gradient_pass<Engine, grad_t, warps_m, slice_chunks>(launcher, args, call.problem, call.rows,
                                                           static_cast<grad_t*>(grad_rows), sums);
      sums = {};
    }
    if (grad_columns) {
      gradient_pass<Engine, grad_t, warps_m, slice_chunks>(launcher, args, call.from_columns(), call.columns,
                                                           static_cast<grad_t*>(grad_columns), sums);
    }
  });
}

template <typename Engine>
void run(Launcher& launcher, const SigmoidPairsFwdArgs& args) {
  if (!args.total || !args.keep) return loss_pass<Engine>(launcher, args);
  gradients<Engine, typename Engine::acc_t>(launcher, args.common, nullptr, args.grad_rows, args.grad_columns,
                                            {args.losses, args.grad_scale, args.grad_bias});
}

template <typename Engine>
void run(Launcher& launcher, const SigmoidPairsBwdArgs& args) {
  using acc_t = typename Engine::acc_t;
  auto* weight = launcher.scratch<acc_t>(args.common.N);
  launcher.launch(sigmoid_pairs_weight_kernel<acc_t>, blocks_for(args.common.N, 256), 256, 0,
                  args.grad_losses, args.common.N, weight);
  gradients<Engine, typename Engine::scalar_t>(launcher, args.common, weight, args.grad_rows,
                                               args.grad_columns, {nullptr, args.grad_scale, args.grad_bias});
}

template <typename Args>
Launcher dispatch(const Args& args, cudaStream_t stream, bool dry) {
  Launcher launcher(args.common.workspace, stream, dry);
  with_engine(args.common.dtype, args.common.allow_tf32, [&](auto engine) {
    if (args.common.row_ids)
      run<WithIds<decltype(engine)>>(launcher, args);
    else
      run<decltype(engine)>(launcher, args);
  });
  return launcher;
}

template <typename Args>
int workspace(const Args& args, size_t* bytes) {
  const Launcher launcher = dispatch(args, nullptr, true);
  *bytes = launcher.used();
  return launcher.error();
}

}  // namespace
}  // namespace sigmoid_pairs
}  // namespace ssl_kernels

int sigmoid_pairs_fwd_workspace(const SigmoidPairsFwdArgs* args, size_t* bytes) {
  return ssl_kernels::sigmoid_pairs::workspace(*args, bytes);
}

int sigmoid_pairs_bwd_workspace(const SigmoidPairsBwdArgs* args, size_t* bytes) {
  return ssl_kernels::sigmoid_pairs::workspace(*args, bytes);
}

int sigmoid_pairs_fwd(const SigmoidPairsFwdArgs* args, cudaStream_t stream) {
  return ssl_kernels::sigmoid_pairs::dispatch(*args, stream, false).error();
}

int sigmoid_pairs_bwd(const SigmoidPairsBwdArgs* args, cudaStream_t stream) {
  return ssl_kernels::sigmoid_pairs::dispatch(*args, stream, false).error();
}
