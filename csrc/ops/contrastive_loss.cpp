// `contrastive_loss.native`: the losses of rows that `contrastive` or `class_contrastive` makes, added up or
// averaged, as one node of autograd, on every device. At small batches the interpreter and the nodes of cat,
// sub, div and mean cost more than the kernels. ssl_kernels/losses/_softmax.py has the same algebra composed
// of torch's operators.
//
//   views    rows are `rows` above `others`, row i's positive p(i) is its other view:   lse_i - s_i,p(i)
//   pairs    `others` are the columns, p(i) = i:   lse_i - s_ii,   or with both_directions
//            (lse_i + column_lse_i) / 2 - s_ii
//   mixed    the same with two positives, i and m = partner_i, of shares l_i and 1 - l_i:
//            l_i (lse_i - s_ii) + (1 - l_i) (lse_i - s_im)
//   debiased views without the partner in their sums, whose losses are the rule "debiased" of row_rules.h
//   classes  `classes` are the positives of class_contrastive:   its loss, where the mean is over the rows
//            that have a positive
#include <ATen/ops/arange.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include "../cpu/contrastive.h"
#include "../cpu/permutation.h"
#include "../cpu/pool.h"
#include "autograd.h"
#include "contrastive_operators.h"
#include "contrastive_loss.h"
#include "readable.h"
#include "row_rules.h"

namespace ssl_kernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr const char* kName = "contrastive";

struct Options {
  bool are_views, leaves_partner_out, both_directions, normalize, mean;

  int64_t packed() const {
    return are_views + 2 * leaves_partner_out + 4 * both_directions + 8 * normalize + 16 * mean;
  }
  static Options unpacked(int64_t bits) {
    return {bool(bits & 1), bool(bits & 2), bool(bits & 4), bool(bits & 8), bool(bits & 16)};
  }
};

// One call. The tensors outlive it.
struct Call {
  const Tensor& rows;
  const OptionalTensor& others;
  const Tensor& scale;
  const OptionalTensor &classes, &row_ids, &column_ids, &partner, &share;
  std::optional<double> positive_prior;  // of the debiased loss
  Options options;

  int64_t row_count() const { return rows.size(0) * (options.are_views ? 2 : 1); }

  // Whether the CPU kernels can be called without the dispatcher, which has nobody to tell.
  bool runs_directly() const {
    return can_be_read(rows) && (!others || can_be_read(*others)) && can_be_read(scale) &&
           !c10::impl::dispatch_mode_enabled();
  }

  // Every row's lse gets the same gradient, of which both gradients may be made in forward.
  bool weighs_equally(bool columns_need_grad) const { return columns_need_grad && rows.requires_grad(); }

  // (N, 2) of the mixed loss. The kernel that streams columns looks its own up in a tensor too.
  OptionalTensor listed_positives(bool keep, bool columns_need_grad) const {
    if (partner) return with_partner();
    if (options.are_views || options.both_directions || (keep && columns_need_grad)) return std::nullopt;
    return at::arange(rows.size(0), rows.options().dtype(at::kLong));
  }

  Tensor with_partner() const {
    return at::stack({at::arange(rows.size(0), rows.options().dtype(at::kLong)), *partner}, 1);
  }

  // The arguments of the CPU kernel. `positives` stand in place of the partner where they are given.
  cpu::ContrastiveArgs arguments(const OptionalTensor& positives, bool keep, bool columns_need_grad) const {
    static const OptionalTensor none;
    cpu::ContrastiveArgs args{rows,
                              options.are_views ? none : others,
                              scale,
                              positives,
                              row_ids,
                              column_ids,
                              options.normalize,
                              options.normalize,
                              /*keep_diagonal=*/!options.are_views,
                              options.both_directions,
                              keep,
                              columns_need_grad,
                              options.are_views ? &*others : nullptr};
    args.equal_weights = weighs_equally(columns_need_grad);
    if (positives) return args;
    args.partner = options.are_views ? rows.size(0) : 0;
    args.leaves_partner_out = options.leaves_partner_out;
    return args;
  }

  // What the operators take: rows, columns, positives and ids.
  std::array<OptionalTensor, 5> operands() const {
    const int64_t n = rows.size(0);
    const auto whole = rows.options().dtype(at::kLong);
    if (partner) return {rows, others, with_partner(), row_ids, column_ids};
    if (!options.are_views) return {rows, others, at::arange(n, whole), row_ids, column_ids};
    OptionalTensor ids;
    if (options.leaves_partner_out) ids = at::arange(n, whole).repeat(2);
    return {at::cat({rows, *others}), std::nullopt, at::arange(-n, n, whole), ids, std::nullopt};
  }
};

Tensor filled(int64_t n, double value, const at::TensorOptions& options) {
  const Tensor result = cpu::pooled({n}, options);
  std::fill_n(result.mutable_data_ptr<double>(), n, value);
  return result;
}

double number_in(const Tensor& scalar) {
  return scalar.scalar_type() == at::kDouble ? *scalar.const_data_ptr<double>()
                                             : *scalar.const_data_ptr<float>();
}

Tensor number(double value, at::ScalarType dtype) {
  return dtype == at::kDouble ? cpu::number<double>(value) : cpu::number<float>(value);
}

// Rows begin .. begin + count - 1 of a contiguous gradient.
Tensor some_rows(const Tensor& grad, int64_t begin, int64_t count) {
  if (!can_be_read(grad) || at::GradMode::is_enabled()) return grad.narrow(0, begin, count);
  const int64_t d = grad.size(1);
  return at::native::as_strided_tensorimpl(grad, {count, d}, {d, 1}, begin * d);
}

// What forward leaves for backward.
struct Saved {
  // The logits where a rule needs them.
  Tensor lse, column_lse, row_rnorm, column_rnorm, kept, counts, positive_logits;
};

// The debiased loss of rows, from their sums of negatives and the logits of their partners.
class Debiased {
 public:
  Debiased(double prior, int64_t n, double scale, const Tensor& lse, const Tensor& positive_logits)
      : n_(n),
        scale_(scale),
        lse_(lse.const_data_ptr<double>()),
        positive_(positive_logits.const_data_ptr<double>()) {
    const double negatives = static_cast<double>(n - 2);
    constants_ = {std::log(negatives), std::log(negatives * prior), std::log1p(-prior)};
  }

  double sum() const {
    double total = 0;
    for (int64_t i = 0; i < n_; ++i) total += loss(i, nullptr);
    return total;
  }

  // `each` times the derivatives of the losses by the sums and the logits; returns that by the scale.
  double differentiate(double each, double* by_lse, double* by_positive) const {
    double by_scale = 0;
    for (int64_t i = 0; i < n_; ++i) {
      row_rules::Values partial;
      loss(i, &partial);
      by_lse[i] = each * partial[0], by_positive[i] = each * partial[1], by_scale += each * partial[2];
    }
    return by_scale;
  }

 private:
  double loss(int64_t i, row_rules::Values* partial) const {
    return row_rules::debiased({lse_[i], positive_[i], scale_, 0}, constants_.data(), partial);
  }

  int64_t n_;
  double scale_;
  const double *lse_, *positive_;
  std::array<double, 3> constants_;
};

// The share of each row's own positive.
class Shares {
 public:
  explicit Shares(const Tensor& share)
      : data_(share.const_data_ptr<double>()), step_(share.dim() > 0 ? share.stride(0) : 0) {}
  double operator[](int64_t i) const { return data_[i * step_]; }

 private:
  const double* data_;
  int64_t step_;
};

// The loss, and how many rows were averaged.
std::pair<Tensor, int64_t> forward(const Call& call, bool columns_need_grad, Saved* saved) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  // cat refuses other dtypes.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto [are_views, leaves_partner_out, both_directions, normalize, mean] = call.options;
  const bool keep = saved != nullptr, direct = call.runs_directly();
  const int64_t n = call.row_count();
  if (call.classes) {
    TORCH_CHECK(direct, kName, ": classes must be given with rows on cpu that can be read");
    const auto [losses, counts, lse, row_rnorm, kept] =
        cpu::class_contrastive_fwd(call.rows, call.scale, *call.classes, normalize, keep);
    if (saved) *saved = {lse, {}, row_rnorm, {}, kept, counts};
    const double *loss = losses.const_data_ptr<double>(), *count = counts.const_data_ptr<double>();
    const int64_t counted = n - std::count(count, count + n, 0.);
    const double sum = std::accumulate(loss, loss + n, 0.);
    return {number(mean ? sum / std::max<int64_t>(counted, 1) : sum, call.scale.scalar_type()), counted};
  }
  const auto through_operator = [&] {
    const auto [rows, columns, positives, row_ids, column_ids] = call.operands();
    return contrastive_forward_op().call(
        *rows, columns, call.scale, positives, row_ids, column_ids, normalize, normalize,
        /*keep_diagonal=*/!are_views, both_directions, keep, columns_need_grad, std::nullopt, std::nullopt,
        std::nullopt, std::nullopt, /*only_equal_ids=*/false, call.weighs_equally(columns_need_grad));
  };
  const OptionalTensor positives = call.listed_positives(keep, columns_need_grad);
  const auto [lse, column_lse, positive_logits, row_rnorm, column_rnorm, kept] =
      direct ? cpu::contrastive_fwd(call.arguments(positives, keep, columns_need_grad)) : through_operator();
  const bool by_rule = call.share || call.positive_prior;
  if (saved)
    *saved = {lse, column_lse, row_rnorm, column_rnorm, kept, {}, by_rule ? positive_logits : Tensor()};
  if (!can_be_read(lse)) {
    const Tensor losses = (both_directions ? lse.add(column_lse).div(2) : lse).sub(positive_logits);
    return {mean ? losses.mean(call.scale.scalar_type()) : losses.sum(call.scale.scalar_type()), n};
  }
  const double *l = lse.const_data_ptr<double>(), *p = positive_logits.const_data_ptr<double>();
  const double* c = both_directions ? column_lse.const_data_ptr<double>() : l;
  double sum = 0;
  if (call.positive_prior) {
    sum = Debiased(*call.positive_prior, n, number_in(call.scale), lse, positive_logits).sum();
  } else if (call.share) {
    const Shares share(*call.share);
    for (int64_t i = 0; i < n; ++i)
      sum += share[i] * (l[i] - p[2 * i]) + (1 - share[i]) * (l[i] - p[2 * i + 1]);
  } else {
    for (int64_t i = 0; i < n; ++i) sum += (l[i] + c[i]) / 2 - p[i];
  }
  return {number(mean ? sum / n : sum, call.scale.scalar_type()), n};
}

Tensor scale_of(const OptionalTensor& scale, double constant, const Tensor& rows) {
  if (scale) return *scale;
  const auto dtype = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return can_be_read(rows) && !c10::impl::dispatch_mode_enabled()
             ? number(constant, dtype)
             : at::scalar_tensor(constant, rows.options().dtype(dtype));
}

struct ContrastiveLoss : Function<ContrastiveLoss> {
  static constexpr size_t kInputs = 12;

  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const OptionalTensor& others,
                        const OptionalTensor& learned_scale, double constant, const OptionalTensor& classes,
                        const OptionalTensor& row_ids, const OptionalTensor& column_ids,
                        const OptionalTensor& partner, const OptionalTensor& share,
                        std::optional<double> positive_prior, Options options, int64_t* counted) {
    const Tensor scale = scale_of(learned_scale, constant, rows);
    Saved saved;
    const Call call{rows,    others, scale,          classes, row_ids, column_ids,
                    partner, share,  positive_prior, options};
    const auto [loss, count] = ssl_kernels::forward(call, others && others->requires_grad(), &saved);
    // The views rather than their concatenation: they are likely kept alive by others as well.
    ctx->save_for_backward(savable(
        {rows, or_undefined(others), scale, or_undefined(classes), or_undefined(row_ids),
         or_undefined(column_ids), saved.lse, saved.column_lse, saved.row_rnorm, saved.column_rnorm,
         saved.kept, saved.counts, or_undefined(partner), or_undefined(share), saved.positive_logits}));
    ctx->saved_data["options"] = options.packed();
    ctx->saved_data["divisor"] = options.mean ? std::max<int64_t>(count, 1) : 1;
    // Among the inputs that were there.
    ctx->saved_data["scale"] = learned_scale ? 1 + int64_t{others.has_value()} : -1;
    // The mixed loss has others and a partner.
    ctx->saved_data["share"] = share ? 3 + int64_t{learned_scale.has_value()} : -1;
    if (positive_prior) ctx->saved_data["positive_prior"] = *positive_prior;
    *counted = count;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &rows = saved[0], &scale = saved[2], &lse = saved[6], &column_lse = saved[7],
                 &row_rnorm = saved[8], &column_rnorm = saved[9], &kept = saved[10], &counts = saved[11];
    const OptionalTensor others = if_defined(saved[1]), classes = if_defined(saved[3]),
                         row_ids = if_defined(saved[4]), column_ids = if_defined(saved[5]),
                         partner = if_defined(saved[12]), share = if_defined(saved[13]);
    const Tensor& positive_logits = saved[14];
    const Options options = Options::unpacked(ctx->saved_data["options"].toInt());
    const double divisor = static_cast<double>(ctx->saved_data["divisor"].toInt());
    const int64_t scale_input = ctx->saved_data["scale"].toInt(),
                  share_input = ctx->saved_data["share"].toInt();
    const bool others_need_grad = others && ctx->needs_input_grad(1);
    const bool rows_need_grad = ctx->needs_input_grad(0) || (options.are_views && others_need_grad);
    const bool columns_need_grad = !options.are_views && others_need_grad;
    std::optional<double> positive_prior;
    if (const auto found = ctx->saved_data.find("positive_prior"); found != ctx->saved_data.end())
      positive_prior = found->second.toDouble();
    const Call call{rows,    others, scale,          classes, row_ids, column_ids,
                    partner, share,  positive_prior, options};
    Tensor by_rows, by_columns, by_scale, by_share;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const int64_t n = call.row_count();
      // Of each row's lse, and likewise of its column's; and of its positive's logit.
      const double part = options.both_directions ? 2 * divisor : divisor;
      OptionalTensor by_lse, by_column_lse, by_positives;
      double by_scale_of_rule = 0;
      TORCH_CHECK(!positive_prior || can_be_read(grads[0]), kName,
                  ": the gradient of the loss must be readable on the cpu");
      if (positive_prior) {
        by_lse = cpu::pooled({n}, lse.options()), by_positives = cpu::pooled({n}, lse.options());
        const Debiased rule(*positive_prior, n, number_in(scale), lse, positive_logits);
        by_scale_of_rule =
            rule.differentiate(number_in(grads[0]) / divisor, by_lse->mutable_data_ptr<double>(),
                               by_positives->mutable_data_ptr<double>());
      } else if (can_be_read(grads[0])) {
        const double total = number_in(grads[0]);
        by_lse = filled(n, total / part, lse.options());
        if (share)
          std::tie(by_positives, by_share) = of_shares(total / divisor, positive_logits, *share);
        else if (!classes)
          by_positives = filled(n, -total / divisor, lse.options());
      } else {
        const Tensor total = grads[0].to(at::kDouble);
        by_lse = total.div(part).expand({n});
        by_positives = total.div(-divisor).expand({n});
      }
      if (options.both_directions) by_column_lse = by_lse;
      if (classes) {
        std::tie(by_rows, by_scale) = cpu::class_contrastive_bwd(
            *by_lse, rows, scale, *classes, counts, lse, row_rnorm, kept, options.normalize, rows_need_grad);
      } else if (call.runs_directly()) {
        const OptionalTensor positives = call.listed_positives(/*keep=*/true, columns_need_grad);
        std::tie(by_rows, by_columns, by_scale, std::ignore, std::ignore) = cpu::contrastive_bwd(
            call.arguments(positives, /*keep=*/false, columns_need_grad),
            {by_lse, by_column_lse, by_positives, lse, column_lse, row_rnorm, column_rnorm, kept,
             rows_need_grad, columns_need_grad, /*class_weight=*/nullptr,
             /*column_bias_needs_grad=*/false, /*row_bias_needs_grad=*/false,
             /*scale_needs_grad=*/scale_input >= 0});
      } else {
        const auto [all_rows, columns, positives, of_rows, of_columns] = call.operands();
        std::tie(by_rows, by_columns, by_scale, std::ignore, std::ignore) = contrastive_backward_op().call(
            by_lse, by_column_lse, by_positives, *all_rows, columns, scale, positives, of_rows, of_columns,
            lse, column_lse, row_rnorm, column_rnorm, kept, options.normalize, options.normalize,
            /*keep_diagonal=*/!options.are_views, options.both_directions, rows_need_grad, columns_need_grad,
            std::nullopt, std::nullopt, std::nullopt, std::nullopt, /*only_equal_ids=*/false,
            /*column_bias_needs_grad=*/false, /*row_bias_needs_grad=*/false);
      }
      if (by_scale_of_rule != 0)
        by_scale = number(number_in(by_scale) + by_scale_of_rule, by_scale.scalar_type());
    }
    variable_list by_input(kInputs);
    if (at::GradMode::is_enabled()) {
      const variable_list refusing =
          without_second_derivative(kName,
                                    {by_rows, by_columns.defined() ? by_columns : by_scale, by_scale,
                                     by_share.defined() ? by_share : by_scale},
                                    {rows, saved[1], scale, saved[13], grads[0]});
      by_rows = refusing[0], by_columns = refusing[1], by_scale = refusing[2], by_share = refusing[3];
    }
    if (!options.are_views) {
      if (rows_need_grad) by_input[0] = by_rows;
      if (columns_need_grad) by_input[1] = by_columns;
    } else {
      const int64_t b = rows.size(0);
      if (ctx->needs_input_grad(0)) by_input[0] = some_rows(by_rows, 0, b);
      if (others_need_grad) by_input[1] = some_rows(by_rows, b, b);
    }
    if (scale_input >= 0 && ctx->needs_input_grad(scale_input)) by_input[2] = by_scale;
    if (share_input >= 0 && ctx->needs_input_grad(share_input)) by_input[8] = by_share;
    return by_input;
  }

  // The gradients by the logits of both positives and by the shares, of each row's loss `total`.
  static std::pair<Tensor, Tensor> of_shares(double total, const Tensor& positive_logits,
                                             const Tensor& share) {
    const int64_t n = positive_logits.size(0);
    const Tensor by_positives = cpu::pooled({n, 2}, positive_logits.options());
    const Tensor by_share = at::zeros_like(share, {}, at::MemoryFormat::Contiguous);
    const double* p = positive_logits.const_data_ptr<double>();
    double *of_logits = by_positives.mutable_data_ptr<double>(),
           *of_share = by_share.mutable_data_ptr<double>();
    const Shares shares(share);
    for (int64_t i = 0; i < n; ++i) {
      of_logits[2 * i] = -total * shares[i];
      of_logits[2 * i + 1] = -total * (1 - shares[i]);
      of_share[share.dim() > 0 ? i : 0] += total * (p[2 * i + 1] - p[2 * i]);
    }
    return {by_positives, by_share};
  }
};

}  // namespace

std::tuple<Tensor, int64_t> contrastive_loss(
    const Tensor& rows, const OptionalTensor& others, const OptionalTensor& scale, double constant,
    const OptionalTensor& classes, const OptionalTensor& row_ids, const OptionalTensor& column_ids,
    const OptionalTensor& partner, const OptionalTensor& share, std::optional<double> positive_prior,
    bool are_views, bool leaves_partner_out, bool both_directions, bool normalize, bool mean) {
  RECORD_FUNCTION("ssl_kernels::contrastive_loss", std::vector<c10::IValue>());
  TORCH_CHECK(others.has_value() != classes.has_value(), "contrastive_loss: others or classes must be given");
  TORCH_CHECK(
      rows.dim() == 2 && (!others || (others->sizes() == rows.sizes() && others->device() == rows.device() &&
                                      others->scalar_type() == rows.scalar_type())),
      "contrastive_loss: rows and others must be 2-d and alike");
  TORCH_CHECK(partner.has_value() == share.has_value() &&
                  (!share ||
                   (others && !are_views && !both_directions && can_be_read(rows) && can_be_read(*partner) &&
                    can_be_read(*share) && share->scalar_type() == at::kDouble && share->dim() <= 1 &&
                    partner->sizes() == rows.sizes().slice(0, 1) && partner->scalar_type() == at::kLong &&
                    (share->dim() == 0 || share->sizes() == partner->sizes()))),
              "contrastive_loss: partner and share must be given together, int64 (N,) and float64 (N,) or "
              "(), on cpu");
  TORCH_CHECK(
      !positive_prior || (are_views && leaves_partner_out && rows.size(0) > 1 && *positive_prior >= 0 &&
                          *positive_prior < 1 && can_be_read(rows) && can_be_read(*others) &&
                          (!scale || can_be_read(*scale)) && !c10::impl::dispatch_mode_enabled()),
      "contrastive_loss: positive_prior must be in [0, 1) and go with views of two samples or more on cpu"
      " whose partners are left out");
  if (share) {
    cpu::checked_permutation("imix_loss", *partner);
    cpu::checked_lam<double>("imix_loss", share->dim() > 0 ? *share : share->unsqueeze(0));
  }
  const Tensor used = scale_of(scale, constant, rows);
  const OptionalTensor none;
  check_contrastive(rows, are_views ? none : others, used, none, row_ids, column_ids);
  refuse_forward_mode(kName, {&rows, others ? &*others : nullptr, &used, share ? &*share : nullptr});
  const Options options{are_views, leaves_partner_out, both_directions, normalize, mean};
  const bool differentiate = at::GradMode::is_enabled() && (rows.requires_grad() || used.requires_grad() ||
                                                            (others && others->requires_grad()) ||
                                                            (share && share->requires_grad()));
  if (!differentiate)
    return forward({rows, others, used, classes, row_ids, column_ids, partner, share, positive_prior,
                    options},
                   /*columns_need_grad=*/false, nullptr);
  refuse_torch_func(kName);
  int64_t counted = 0;
  const Tensor loss = ContrastiveLoss::apply(rows, others, scale, constant, classes, row_ids, column_ids,
                                             partner, share, positive_prior, options, &counted);
  return {loss, counted};
}

namespace {

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  // The scale is a tensor that may be learned, or else the constant. Also returns how many rows the mean is
  // over.
  library.def(
      "contrastive_loss.native(Tensor rows, Tensor? others, Tensor? scale, float constant, Tensor? classes, "
      "Tensor? row_ids, Tensor? column_ids, Tensor? partner, Tensor? share, float? positive_prior, "
      "bool are_views, bool leaves_partner_out, bool both_directions, bool normalize, bool mean) "
      "-> (Tensor, int)",
      &contrastive_loss);
}

}  // namespace
}  // namespace ssl_kernels
