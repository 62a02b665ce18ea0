// sigmoid_pairs on the CPU. z_ij = scale * <x^_i, y^_j> + bias, the pairs j = i + diagonal, or those of equal
//   ids, positive: loss_i = sum_j softplus(z_ij), of -z_ij for a positive pair;  dz_ij = g_i sigmoid(z_ij),
//   -g_i sigmoid(-z_ij).
// Tiling: tiles.h; a tile of z becomes its losses and, in place, its coefficients dz, which are multiplied by
//   the columns into the gradient of its rows and, transposed, by the rows into that of its columns. Where
//   columns have a gradient, tiles of a parallel round share neither rows nor columns: every sum has one
//   owner, no atomics.
// Work, in units of 2*N*M*D: 1 for the logits, 1 more for each side that has a gradient. The forward of a
//   total makes the gradient (3); otherwise forward 1 and backward 3. An entry costs one exponential and one
//   division.
// Memory: rows and columns in acc_t and their gradients, each twice where small products run (product.h), a
//   few numbers per row, the scratch; nothing of size N*M.
// Numerics: tiles hold <x^, y^> * scale * log2 e; log1p(e) is 2 atanh(e / (2 + e)), a series in its square,
//   to the last digits of acc_t also where e is tiny. Sums over a tile in acc_t, over tiles in double.
//   Positive pairs of the diagonal are taken out of the tile and computed in double, from the product that
//   the tile held; those of equal ids are negated in the tile before and after it becomes coefficients.
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../ops/sigmoid_pairs.h"
#include "tiles.h"

namespace ssl_kernels::cpu {
namespace {

struct SigmoidPairsArgs {
  const at::Tensor& rows;
  const at::Tensor& columns;
  const at::Tensor& scale;
  const at::Tensor& bias;
  int64_t diagonal;
  bool normalize_rows, normalize_columns;
  bool rows_need_grad, columns_need_grad;
  const PairIds& ids;
};

// losses, grad_rows, grad_columns, grad_scale, grad_bias
using SigmoidPairsFwd = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// grad_rows, grad_columns, grad_scale, grad_bias
using SigmoidPairsBwd = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

double softplus(double z) { return (z < 0 ? 0 : z) + std::log1p(std::exp(-std::abs(z))); }

double sigmoid(double z) {
  const double e = std::exp(-std::abs(z));
  return (z < 0 ? e : 1) / (1 + e);
}

// What one pass over the tiles makes. Sums in double, gradients by the normalised rows before `scale`, in
// acc_t.
struct Pass {
  std::vector<double> losses, grad_bias;  // a number per row
  at::Tensor grad_rows, grad_columns;     // undefined where not wanted
};

template <class acc_t>
class Problem : public Tiles<acc_t> {
 public:
  using Base = Tiles<acc_t>;
  using Base::columns, Base::m, Base::n, Base::rows;

  Problem(const Rows& rows, const Rows& columns, const SigmoidPairsArgs& args)
      : Base(rows, columns),
        scale(without_payload(*args.scale.const_data_ptr<acc_t>())),
        bias(without_payload(*args.bias.const_data_ptr<acc_t>())),
        diagonal_(args.ids.equal_are_positive ? m : args.diagonal),
        equal_are_positive_(args.ids.equal_are_positive) {
    if (!args.ids.rows) return;
    row_ids_ = args.ids.rows->contiguous();
    column_ids_ = args.ids.columns->contiguous();
  }

  // Losses where asked for; gradients, weighted by row where there are weights, where a side is wanted.
  Pass run(bool losses_wanted, const acc_t* weight, bool rows_wanted, bool columns_wanted) {
    const auto& math = tile_math<acc_t>();
    const acc_t bias2 = static_cast<acc_t>(bias * kLog2E);
    const bool gradient = rows_wanted || columns_wanted;
    Pass pass{std::vector<double>(losses_wanted ? n : 0), std::vector<double>(gradient ? n : 0), {}, {}};
    this->prepare(/*to_multiply=*/true, rows_wanted, columns_wanted);
    RowSums<acc_t> of_rows = this->sums_of_rows(rows_wanted, false);
    RowSums<acc_t> of_columns = this->sums_of_columns(columns_wanted);

    this->for_each(columns_wanted ? Owned::kBoth : Owned::kRows, [&](int64_t block_i, int64_t block_j,
                                                                     int thread) {
      const Tile<acc_t> tile = this->scratch(block_i, block_j, thread);
      this->multiply(tile, static_cast<acc_t>(scale * kLog2E));
      Logits<acc_t> logits{tile, false, 1 / (scale * kLog2E), 0};
      if (gradient && this->in_bfloat16) {
        logits.tile = this->second_scratch(block_i, block_j, thread);
        std::copy_n(tile.s, tile.i.size * tile.ld, logits.tile.s);
      }

      // Positive pairs: an entry of -inf adds nothing to any sum.
      const int64_t i0 = tile.i.begin, j0 = tile.j.begin;
      const int64_t first = std::max(i0, j0 - diagonal_);
      const int64_t last = std::min(i0 + tile.i.size, j0 + tile.j.size - diagonal_);
      double positive[kLargestTile];
      for (int64_t i = first; i < last; ++i) {
        acc_t& entry = tile.at(i, i + diagonal_);
        positive[i - first] = kLn2 * entry + bias;
        entry = -std::numeric_limits<acc_t>::infinity();
      }

      if (row_ids_.defined()) {
        if (equal_are_positive_)
          math.negate_equal_ids(tile.s, tile.ld, tile.i.size, tile.j.size, row_ids(i0), column_ids(j0),
                                -2 * bias2, nullptr);
        else
          math.mask_equal_ids(tile.s, tile.ld, tile.i.size, tile.j.size, row_ids(i0), column_ids(j0));
      }

      acc_t loss[kLargestTile], sum[kLargestTile];
      if (!gradient)
        math.softplus_sums(tile.s, tile.ld, tile.i.size, tile.j.size, bias2, loss);
      else
        math.sigmoids(tile.s, tile.ld, tile.i.size, tile.j.size, bias2, weight ? weight + i0 : nullptr,
                      losses_wanted ? loss : nullptr, sum);
      if (gradient && equal_are_positive_)
        math.negate_equal_ids(tile.s, tile.ld, tile.i.size, tile.j.size, row_ids(i0), column_ids(j0),
                              acc_t(0), sum);
      for (int64_t k = 0; k < tile.i.size; ++k) {
        if (losses_wanted) pass.losses[i0 + k] += loss[k];
        if (gradient) pass.grad_bias[i0 + k] += sum[k];
      }
      for (int64_t i = first; i < last; ++i) {
        const double z = positive[i - first];
        if (losses_wanted) pass.losses[i] += softplus(-z);
        if (!gradient) continue;
        const double coefficient = -(weight ? weight[i] : 1) * sigmoid(-z);
        tile.at(i, i + diagonal_) = static_cast<acc_t>(coefficient);
        pass.grad_bias[i] += coefficient;
      }
      if (gradient)
        this->add(rows_wanted ? &of_rows : nullptr, columns_wanted ? &of_columns : nullptr, tile, logits,
                  thread, /*part=*/0);
    });
    if (rows_wanted) pass.grad_rows = of_rows.result();
    if (columns_wanted) pass.grad_columns = of_columns.result();
    return pass;
  }

  const double scale, bias;

 private:
  const int64_t* row_ids(int64_t begin) const { return row_ids_.const_data_ptr<int64_t>() + begin; }
  const int64_t* column_ids(int64_t begin) const { return column_ids_.const_data_ptr<int64_t>() + begin; }

  const int64_t diagonal_;  // with equal_are_positive_ the number of columns, where no pair lies
  const bool equal_are_positive_;
  at::Tensor row_ids_, column_ids_;
};

template <class scalar_t, class acc_t>
Problem<acc_t> make_problem(const SigmoidPairsArgs& args) {
  const auto load = [](const at::Tensor& x, bool normalize) {
    return load_rows<scalar_t, acc_t>(x, normalize, /*more=*/nullptr, /*may_borrow=*/true);
  };
  return {in_float32_if(load(args.rows, args.normalize_rows), *args.scale.const_data_ptr<acc_t>() == 0),
          load(args.columns, args.normalize_columns), args};
}

double sum_of(const std::vector<double>& values) {
  double sum = 0;
  for (double value : values) sum += value;
  return sum;
}

// The gradient of sum_i weight_i loss_i, in storage_t, and what else the pass made.
template <class storage_t, class acc_t>
SigmoidPairsBwd gradients(Problem<acc_t>& problem, const SigmoidPairsArgs& args, const acc_t* weight,
                          std::vector<double>* losses) {
  // The gradient of scale comes out of the row dots of either side, so one side is always made.
  const bool columns_wanted = args.columns_need_grad, rows_wanted = args.rows_need_grad || !columns_wanted;
  Pass pass = problem.run(losses != nullptr, weight, rows_wanted, columns_wanted);
  if (losses) *losses = std::move(pass.losses);
  const auto acc = problem.rows.values.options();
  const auto storage = acc.dtype(c10::CppTypeToScalarType<storage_t>::value);
  const auto finish = [&](bool wanted, const at::Tensor& grad, const Rows& rows, bool wants_dots) {
    return wanted ? finish_gradient<storage_t, acc_t>(grad, rows, problem.scale, storage, problem.in_bfloat16,
                                                      wants_dots)
                  : InputGradient{pooled({0}, storage), 0};
  };
  const InputGradient by_rows = finish(rows_wanted, pass.grad_rows, problem.rows, /*wants_dots=*/true);
  const InputGradient by_columns =
      finish(columns_wanted, pass.grad_columns, problem.columns, /*wants_dots=*/!rows_wanted);
  return {args.rows_need_grad ? by_rows.values : pooled({0}, storage), by_columns.values,
          number<acc_t>((rows_wanted ? by_rows.dots : by_columns.dots) + problem.lost_dots()),
          number<acc_t>(sum_of(pass.grad_bias))};
}

template <class scalar_t, class acc_t>
SigmoidPairsFwd forward(const SigmoidPairsArgs& args, bool total, bool keep) {
  Problem<acc_t> problem = make_problem<scalar_t, acc_t>(args);
  const auto acc = problem.rows.values.options();
  const auto none = [&] { return pooled({0}, acc); };
  std::vector<double> losses;
  SigmoidPairsBwd grads;
  if (total && keep) {
    grads = gradients<acc_t, acc_t>(problem, args, nullptr, &losses);
  } else {
    losses = problem.run(true, nullptr, false, false).losses;
    grads = {none(), none(), none(), none()};
  }
  at::Tensor result;
  if (total) {
    result = number<double>(sum_of(losses));
  } else {
    result = pooled({problem.n}, acc.dtype(at::kDouble));
    std::copy(losses.begin(), losses.end(), result.mutable_data_ptr<double>());
  }
  return std::tuple_cat(std::make_tuple(result), std::move(grads));
}

template <class scalar_t, class acc_t>
SigmoidPairsBwd backward(const SigmoidPairsArgs& args, const at::Tensor& grad_losses) {
  Problem<acc_t> problem = make_problem<scalar_t, acc_t>(args);
  const at::Tensor contiguous = grad_losses.contiguous();
  const double* g = contiguous.const_data_ptr<double>();
  std::vector<acc_t> weight(problem.n);
  for (int64_t i = 0; i < problem.n; ++i) weight[i] = static_cast<acc_t>(g[i]);
  return gradients<scalar_t, acc_t>(problem, args, weight.data(), nullptr);
}

SigmoidPairsFwd sigmoid_pairs_fwd(const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& scale,
                                  const at::Tensor& bias, int64_t diagonal, bool normalize_rows,
                                  bool normalize_columns, bool total, bool keep, bool rows_need_grad,
                                  bool columns_need_grad, const std::optional<at::Tensor>& row_ids,
                                  const std::optional<at::Tensor>& column_ids, bool equal_ids_are_positive) {
  const PairIds ids{row_ids, column_ids, equal_ids_are_positive};
  check_sigmoid_pairs(rows, columns, scale, bias, ids);
  const SigmoidPairsArgs args{
      rows,           columns,           scale, bias, diagonal, normalize_rows, normalize_columns,
      rows_need_grad, columns_need_grad, ids};
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return SSL_KERNELS_DISPATCH(args.rows.scalar_type(), "sigmoid_pairs_fwd",
                              [&] { return forward<scalar_t, acc_t>(args, total, keep); });
}

SigmoidPairsBwd sigmoid_pairs_bwd(const at::Tensor& grad_losses, const at::Tensor& rows,
                                  const at::Tensor& columns, const at::Tensor& scale, const at::Tensor& bias,
                                  int64_t diagonal, bool normalize_rows, bool normalize_columns,
                                  bool rows_need_grad, bool columns_need_grad,
                                  const std::optional<at::Tensor>& row_ids,
                                  const std::optional<at::Tensor>& column_ids, bool equal_ids_are_positive) {
  const PairIds ids{row_ids, column_ids, equal_ids_are_positive};
  check_sigmoid_pairs(rows, columns, scale, bias, ids);
  check_sigmoid_pairs_grad(grad_losses, rows);
  const SigmoidPairsArgs args{
      rows,           columns,           scale, bias, diagonal, normalize_rows, normalize_columns,
      rows_need_grad, columns_need_grad, ids};
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return SSL_KERNELS_DISPATCH(args.rows.scalar_type(), "sigmoid_pairs_bwd",
                              [&] { return backward<scalar_t, acc_t>(args, grad_losses); });
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("sigmoid_pairs_fwd.native", &sigmoid_pairs_fwd);
  library.impl("sigmoid_pairs_bwd.native", &sigmoid_pairs_bwd);
}

}  // namespace
}  // namespace ssl_kernels::cpu
