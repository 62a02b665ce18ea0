// `contrastive_loss.native`: the losses of rows that `contrastive` or `class_contrastive` makes, added up or
// averaged, as one node of autograd, on every device. At small batches the interpreter and the nodes of cat,
// sub, div and mean cost more than the kernels. ssl_kernels/losses/_softmax.py has the same algebra composed
// of torch's operators.
//
//   views    rows are `rows` above `others`, or `rows` alone, both views; row i's positive p(i) is its other
//            view:   lse_i - s_i,p(i)
//   pairs    `others` are the columns, p(i) = i, and there may be more of them than rows; or p(i) is
//            positives_i:   lse_i - s_i,p(i) - column_bias_p(i),   or where there are as many columns with
//            both_directions (lse_i + column_lse_i) / 2 - s_ii
//   beside   the positive of row i stands beside `others`, all of which are negatives, d_i = numbers_i being
//            its product with the row:   log(1 + exp(lse_i - scale d_i))
//   mixed    pairs with two positives, i and m = positives_i, of shares l_i = numbers_i and 1 - l_i:
//            l_i (lse_i - s_ii) + (1 - l_i) (lse_i - s_im)
//   debiased views without the partner in their sums, whose losses are the rule "debiased" of row_rules.h
//   joint    the sums of a sample are one. Of views, of which a sample i has two, i and i + B:
//            log(exp(lse_i) + exp(lse_i+B)) - s_i,p(i)
//            Of bags, P columns for each row, its positives, which stay out of its sums and it out of theirs:
//            log(1 + exp(a - s)),  a = log(exp(lse_i) + sum_p exp(column_lse_ip)),  s = log sum_p exp(s_i,ip)
//            with the second term of a where both_directions.
//   classes  `classes` are the positives of class_contrastive:   its loss, where the mean is over the rows
//            that have a positive. Or with classes_apart, lse being over rows of other classes (labels), and
//            column_lse over the others of a row's own:   log(1 + exp(lse_i)) - log(1 + exp(column_lse_i))
//            `rows` may be (B, V, D), V views of each sample, whose rows are B V.
// One file, although a long one: the losses of the rows are what its one node differentiates.
#include <ATen/ops/arange.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/tensor.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "../cpu/contrastive.h"
#include "../cpu/permutation.h"
#include "../cpu/pool.h"
#include "autograd.h"
#include "contrastive_operators.h"
#include "contrastive_loss.h"
#include "operands.h"
#include "row_rules.h"

namespace ssl_kernels {
namespace {

using cpu::number;

constexpr const char* kName = "contrastive";

struct Options {
  bool are_views, leaves_partner_out, both_directions, joint, normalize, normalize_others, classes_apart;

  int64_t packed() const {
    return are_views + 2 * leaves_partner_out + 4 * both_directions + 8 * joint + 16 * normalize +
           32 * normalize_others + 64 * classes_apart;
  }
  static Options unpacked(int64_t bits) {
    return {bool(bits & 1),  bool(bits & 2),  bool(bits & 4), bool(bits & 8),
            bool(bits & 16), bool(bits & 32), bool(bits & 64)};
  }
};

// Places among the inputs that were there, -1 for those that were not.
struct Places {
  int64_t scale, numbers, column_bias;

  int64_t packed() const { return scale + 1 + 16 * (numbers + 1) + 256 * (column_bias + 1); }
  static Places unpacked(int64_t bits) { return {bits % 16 - 1, bits / 16 % 16 - 1, bits / 256 - 1}; }
};

// One call. The tensors outlive it.
struct Call {
  const Tensor& rows;
  const OptionalTensor& others;
  const Tensor& scale;
  const OptionalTensor &classes, &row_ids, &column_ids, &positives, &numbers, &column_bias;
  std::optional<double> positive_prior;  // of the debiased loss
  Options options;

  bool is_mixed() const { return numbers && positives; }
  bool is_beside() const { return numbers && !positives; }
  int64_t row_count() const { return rows.size(0) * (options.are_views && others ? 2 : 1); }
  int64_t sample_count() const { return row_count() / 2; }  // of views

  // Whether the CPU kernels can be called without the dispatcher, which has nobody to tell.
  bool runs_directly() const {
    return can_be_read(rows) && (!others || can_be_read(*others)) && can_be_read(scale) &&
           !c10::impl::dispatch_mode_enabled();
  }

  // Every row's lse gets the same gradient, of which both gradients may be made in forward.
  bool weighs_equally() const {
    return others && others->requires_grad() && rows.requires_grad() && !options.joint && !is_beside();
  }

  // Whether a row's own column stays in its sum although their ids are equal.
  bool keeps_diagonal() const { return !options.are_views && !options.joint && !is_beside(); }

  // Whether losses are more than a difference, by the numbers in its terms.
  bool has_rule() const {
    return numbers || positives || column_bias || positive_prior || options.joint || options.classes_apart;
  }

  // (N, 2) of the mixed loss. The kernel that streams columns looks its own up in a tensor too.
  OptionalTensor listed_positives(bool keep, bool columns_need_grad) const {
    if (is_mixed()) return with_partner();
    if (positives || numbers) return positives;
    if (options.are_views || options.both_directions || (keep && columns_need_grad)) return std::nullopt;
    return at::arange(rows.size(0), rows.options().dtype(at::kLong));
  }

  // As given: negative ones count from the end.
  int64_t positive(int64_t i) const {
    return positives->const_data_ptr<int64_t>()[i * positives->stride(0)];
  }

  Tensor with_partner() const {
    const Tensor both = cpu::pooled({rows.size(0), 2}, at::kLong);
    int64_t* out = both.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < rows.size(0); ++i) out[2 * i] = i, out[2 * i + 1] = positive(i);
    return both;
  }

  // The arguments of the CPU kernel. `listed` stand in place of the partner where they are given.
  cpu::ContrastiveArgs arguments(const OptionalTensor& listed, bool keep, bool columns_need_grad) const {
    static const OptionalTensor none;
    cpu::ContrastiveArgs args{rows,
                              options.are_views ? none : others,
                              scale,
                              listed,
                              row_ids,
                              column_ids,
                              options.normalize,
                              options.normalize_others,
                              keeps_diagonal(),
                              options.both_directions,
                              keep,
                              columns_need_grad,
                              options.are_views && others ? &*others : nullptr};
    args.equal_weights = weighs_equally();
    args.additions.column_bias = column_bias ? &*column_bias : nullptr;
    if (listed) return args;
    args.partner = options.are_views ? sample_count() : is_beside() ? -1 : 0;
    args.leaves_partner_out = options.leaves_partner_out;
    return args;
  }

  // What the operators take: rows, columns, positives and ids.
  std::array<OptionalTensor, 5> operands() const {
    const int64_t n = rows.size(0);
    const auto whole = rows.options().dtype(at::kLong);
    if (!options.are_views) {
      OptionalTensor listed = is_mixed() ? with_partner() : positives;
      if (!listed && !numbers) listed = at::arange(n, whole);
      return {rows, others, listed, row_ids, column_ids};
    }
    const int64_t samples = sample_count();
    OptionalTensor ids;
    if (options.leaves_partner_out) ids = at::arange(samples, whole).repeat(2);
    return {others ? at::cat({rows, *others}) : rows, std::nullopt, at::arange(-samples, samples, whole), ids,
            std::nullopt};
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

// Rows begin .. begin + count - 1 of a contiguous gradient.
Tensor some_rows(const Tensor& grad, int64_t begin, int64_t count) {
  if (!can_be_read(grad) || at::GradMode::is_enabled()) return grad.narrow(0, begin, count);
  const int64_t d = grad.size(1);
  return at::native::as_strided_tensorimpl(grad, {count, d}, {d, 1}, begin * d);
}

// (B, V, D) as (B V, D), without a node of autograd.
Tensor as_matrix(const Tensor& rows) {
  if (rows.dim() == 2) return rows;
  const int64_t n = rows.size(0) * rows.size(1), d = rows.size(2);
  if (can_be_read(rows) && rows.is_contiguous())
    return at::native::as_strided_tensorimpl(rows, {n, d}, {d, 1}, rows.storage_offset());
  return rows.detach().reshape({n, d});
}

// What forward leaves for backward.
struct Saved {
  Tensor lse, column_lse, row_rnorm, column_rnorm, kept, counts, positive_logits;
};

// Numbers of the rows, or one for all.
class Numbers {
 public:
  explicit Numbers(const OptionalTensor& numbers)
      : data_(numbers ? numbers->const_data_ptr<double>() : nullptr),
        step_(numbers && numbers->dim() > 0 ? numbers->stride(0) : 0) {}
  double operator[](int64_t i) const { return data_[i * step_]; }

 private:
  const double* data_;
  int64_t step_;
};

// The gradients by what a loss is made of.
struct ByTerms {
  OptionalTensor lse, column_lse, positive_logits;
  Tensor numbers;
  std::vector<double> column_bias;  // as a part of the positives' logits; empty without
  double scale = 0;                 // beyond that by the logits
};

// The losses of rows, from their sums and the logits of their positives.
class Losses {
 public:
  Losses(const Call& call, const Tensor& lse, const Tensor& column_lse, const Tensor& positive_logits)
      : call_(call),
        options_(call.options),
        n_(call.row_count()),
        width_(positive_logits.numel() / n_),
        lse_(lse.const_data_ptr<double>()),
        column_lse_(column_lse.const_data_ptr<double>()),
        logit_(positive_logits.const_data_ptr<double>()),
        numbers_(call.numbers) {
    if (call.column_bias) bias_ = call.column_bias->to(at::kDouble).contiguous();
    if (call.positive_prior || call.is_beside()) scale_ = number_in(call.scale);
    if (!call.positive_prior) return;
    const double negatives = static_cast<double>(n_ - 2), prior = *call.positive_prior;
    constants_ = {std::log(negatives), std::log(negatives * prior), std::log1p(-prior)};
  }

  int64_t count() const { return options_.joint && options_.are_views ? n_ / 2 : n_; }

  double sum() {
    double total = 0;
    for (int64_t i = 0; i < count(); ++i) total += loss(i);
    return total;
  }

  // Of `each` times every loss.
  ByTerms differentiate(double each) {
    ByTerms by;
    const auto zeros = [&](at::IntArrayRef sizes, double*& data) {
      const Tensor result = cpu::pooled(sizes, at::kDouble);
      data = result.mutable_data_ptr<double>();
      std::fill_n(data, result.numel(), 0.);
      return result;
    };
    by.lse = zeros({n_}, by_lse_);
    if (options_.both_directions) by.column_lse = zeros({call_.others->size(0)}, by_column_lse_);
    if (options_.classes_apart) by.column_lse = zeros({n_}, by_column_lse_);
    if (width_ == 1) by.positive_logits = zeros({n_}, by_logit_);
    if (width_ > 1) by.positive_logits = zeros({n_, width_}, by_logit_);
    if (call_.numbers) by.numbers = zeros(call_.numbers->sizes(), by_number_);
    if (bias_.defined()) by.column_bias.resize(bias_.numel());
    by_ = &by, each_ = each;
    for (int64_t i = 0; i < count(); ++i) loss(i);
    return by;
  }

 private:
  // The loss of row i, and where asked its derivatives.
  double loss(int64_t i) {
    if (options_.joint) return joint(i);
    row_rules::Values partial;
    row_rules::Values* const wanted = by_ ? &partial : nullptr;
    double result;
    if (options_.classes_apart) {
      result = row_rules::difference({lse_[i], column_lse_[i], 0, 0}, nullptr, wanted);
      if (!by_) return result;
      by_column_lse_[i] = each_ * partial[1];
    } else if (call_.is_mixed()) {
      result = row_rules::mixed({lse_[i], logit_[2 * i], logit_[2 * i + 1], numbers_[i]}, nullptr, wanted);
      if (!by_) return result;
      by_logit_[2 * i] = each_ * partial[1], by_logit_[2 * i + 1] = each_ * partial[2];
      by_number_[call_.numbers->dim() > 0 ? i : 0] += each_ * partial[3];
    } else if (call_.is_beside()) {
      result = row_rules::beside({numbers_[i], scale_, lse_[i], 0}, nullptr, wanted);
      if (!by_) return result;
      by_number_[i] = each_ * partial[0], by_->scale += each_ * partial[1], partial[0] = partial[2];
    } else if (call_.positive_prior) {
      result = row_rules::debiased({lse_[i], logit_[i], scale_, 0}, constants_.data(), wanted);
      if (!by_) return result;
      by_logit_[i] = each_ * partial[1], by_->scale += each_ * partial[2];
    } else if (options_.are_views || options_.both_directions) {
      const double other = options_.both_directions ? column_lse_[i] : lse_[i];
      if (!by_) return (lse_[i] + other) / 2 - logit_[i];
      partial[0] = options_.both_directions ? 0.5 : 1;
      if (options_.both_directions) by_column_lse_[i] = each_ / 2;
      by_logit_[i] = -each_;
      result = 0;
    } else {
      const double bias = bias_.defined() ? bias_.const_data_ptr<double>()[column(i)] : 0;
      result = row_rules::softmax({lse_[i], logit_[i], bias, 0}, nullptr, wanted);
      if (!by_) return result;
      by_logit_[i] = each_ * partial[1];
      if (bias_.defined()) by_->column_bias[column(i)] += each_ * partial[2];
    }
    by_lse_[i] = each_ * partial[0];
    return result;
  }

  // The column of row i's only positive.
  int64_t column(int64_t i) const {
    if (!call_.positives) return i;
    const int64_t m = bias_.numel();
    return (call_.positive(i) + m) % m;
  }

  double joint(int64_t i) {
    const bool beside = !options_.are_views;
    sums_.assign(1, lse_[i]);
    if (!beside) sums_.push_back(lse_[i + n_ / 2]);
    const int64_t begin = i * width_;
    if (options_.both_directions)
      sums_.insert(sums_.end(), column_lse_ + begin, column_lse_ + begin + width_);
    logits_.assign(logit_ + begin, logit_ + begin + width_);
    const double a = row_rules::log_sum_exp(sums_), s = row_rules::log_sum_exp(logits_);
    if (by_) {
      const double weight = each_ * (beside ? row_rules::sigmoid(a - s) : 1);
      by_lse_[i] = weight * sums_[0];
      if (!beside) by_lse_[i + n_ / 2] = weight * sums_[1];
      for (int64_t p = 0; p < width_; ++p) {
        if (options_.both_directions) by_column_lse_[begin + p] = weight * sums_[1 + p];
        by_logit_[begin + p] = -weight * logits_[p];
      }
    }
    return beside ? row_rules::softplus(a - s) : a - s;
  }

  const Call& call_;
  const Options options_;
  const int64_t n_, width_;
  const double *lse_, *column_lse_, *logit_;
  const Numbers numbers_;
  Tensor bias_;
  std::array<double, 3> constants_{};
  double scale_ = 0, each_ = 0;
  ByTerms* by_ = nullptr;
  double *by_lse_ = nullptr, *by_column_lse_ = nullptr, *by_logit_ = nullptr, *by_number_ = nullptr;
  std::vector<double> sums_, logits_;
};

// The sum of the losses over `divisor`, or if that is 0 their mean, and how many that is over.
std::pair<Tensor, int64_t> forward(const Call& call, double divisor, bool columns_need_grad, Saved* saved) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  // cat refuses other dtypes.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto [are_views, leaves_partner_out, both_directions, joint, normalize, normalize_others,
              classes_apart] = call.options;
  const bool keep = saved != nullptr, direct = call.runs_directly();
  const int64_t n = call.row_count();
  TORCH_CHECK(direct || !call.classes, kName, ": classes must be given with rows on cpu that can be read");
  if (call.classes && !classes_apart) {
    const auto [losses, counts, lse, row_rnorm, kept] =
        cpu::class_contrastive_fwd(call.rows, call.scale, *call.classes, normalize, keep);
    if (saved) *saved = {lse, {}, row_rnorm, {}, kept, counts};
    const double *loss = losses.const_data_ptr<double>(), *count = counts.const_data_ptr<double>();
    const int64_t counted = n - std::count(count, count + n, 0.);
    const double sum = std::accumulate(loss, loss + n, 0.);
    const double by = divisor != 0 ? divisor : static_cast<double>(std::max<int64_t>(counted, 1));
    return {number(sum / by, call.scale.scalar_type()), counted};
  }
  const auto through_operator = [&] {
    const auto [rows, columns, positives, row_ids, column_ids] = call.operands();
    return contrastive_forward_op().call(
        *rows, columns, call.scale, positives, row_ids, column_ids, normalize, normalize_others,
        call.keeps_diagonal(), both_directions, keep, columns_need_grad, call.column_bias, std::nullopt,
        std::nullopt, std::nullopt, /*only_equal_ids=*/false, call.weighs_equally());
  };
  const OptionalTensor positives =
      classes_apart ? std::nullopt : call.listed_positives(keep, columns_need_grad);
  const auto [lse, column_lse, positive_logits, row_rnorm, column_rnorm, kept] =
      classes_apart
          ? cpu::contrastive_apart_fwd(call.rows, call.scale, *call.classes, normalize, keep)
      : direct ? cpu::contrastive_fwd(call.arguments(positives, keep, columns_need_grad))
               : through_operator();
  if (saved) *saved = {lse, column_lse, row_rnorm, column_rnorm, kept, {}, positive_logits};
  if (!can_be_read(lse)) {
    const Tensor losses = (both_directions ? lse.add(column_lse).div(2) : lse).sub(positive_logits);
    const auto dtype = call.scale.scalar_type();
    if (divisor == 0) return {losses.mean(dtype), n};
    const Tensor sum = losses.sum(dtype);
    return {divisor == 1 ? sum : sum.div(divisor), n};
  }
  Losses losses(call, lse, column_lse, positive_logits);
  const double sum = losses.sum();
  const double by = divisor != 0 ? divisor : static_cast<double>(losses.count());
  return {number(sum / by, call.scale.scalar_type()), losses.count()};
}

Tensor scale_of(const OptionalTensor& scale, double constant, const Tensor& rows) {
  if (scale) return *scale;
  const auto dtype = accumulation_type(rows);
  return can_be_read(rows) && !c10::impl::dispatch_mode_enabled()
             ? number(constant, dtype)
             : at::scalar_tensor(constant, rows.options().dtype(dtype));
}

struct ContrastiveLoss : Node<ContrastiveLoss> {
  static constexpr size_t kInputs = 14;

  static Tensor forward(AutogradContext* ctx, const Tensor& given, const OptionalTensor& others,
                        const OptionalTensor& learned_scale, double constant, const OptionalTensor& classes,
                        const OptionalTensor& row_ids, const OptionalTensor& column_ids,
                        const OptionalTensor& positives, const OptionalTensor& numbers,
                        const OptionalTensor& column_bias, std::optional<double> positive_prior,
                        Options options, double divisor, int64_t* counted) {
    const Tensor rows = as_matrix(given), scale = scale_of(learned_scale, constant, rows);
    Saved saved;
    const Call call{rows,      others, scale,       classes,        row_ids, column_ids,
                    positives, numbers, column_bias, positive_prior, options};
    const auto needs_grad = [](const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); };
    const bool columns_need_grad = needs_grad(others) || needs_grad(column_bias);
    const auto [loss, count] = ssl_kernels::forward(call, divisor, columns_need_grad, &saved);
    // With the expectation kept, and no positives to look up, backward reads rows and scale alone.
    const bool rows_suffice = call.is_beside() && holds_expectation(saved.kept);
    const auto read_again = [&](const OptionalTensor& tensor) {
      return rows_suffice ? Tensor() : or_undefined(tensor);
    };
    // The views rather than their concatenation: they are likely kept alive by others as well.
    ctx->save_for_backward(savable(
        {given, read_again(others), scale, or_undefined(classes), read_again(row_ids),
         read_again(column_ids), saved.lse, saved.column_lse, saved.row_rnorm, saved.column_rnorm,
         saved.kept, saved.counts, or_undefined(positives), or_undefined(numbers), saved.positive_logits,
         read_again(column_bias)}));
    ctx->saved_data["options"] = options.packed();
    ctx->saved_data["divisor"] = divisor != 0 ? divisor : static_cast<double>(std::max<int64_t>(count, 1));
    Places places;
    places.scale = learned_scale ? 1 + others.has_value() : -1;
    const int64_t place = 1 + others.has_value() + learned_scale.has_value() + classes.has_value() +
                          row_ids.has_value() + column_ids.has_value() + positives.has_value();
    places.numbers = numbers ? place : -1;
    places.column_bias = column_bias ? place + numbers.has_value() : -1;
    ctx->saved_data["places"] = places.packed();
    if (positive_prior) ctx->saved_data["positive_prior"] = *positive_prior;
    *counted = count;
    return loss;
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor rows = as_matrix(saved[0]), grad = without_negation(grads[0]);
    const Tensor &scale = saved[2], &lse = saved[6], &column_lse = saved[7],
                 &row_rnorm = saved[8], &column_rnorm = saved[9], &kept = saved[10], &counts = saved[11];
    const OptionalTensor others = if_defined(saved[1]), classes = if_defined(saved[3]),
                         row_ids = if_defined(saved[4]), column_ids = if_defined(saved[5]),
                         positives = if_defined(saved[12]), numbers = if_defined(saved[13]),
                         column_bias = if_defined(saved[15]);
    const Tensor& positive_logits = saved[14];
    const Options options = Options::unpacked(ctx->saved_data["options"].toInt());
    const double divisor = ctx->saved_data["divisor"].toDouble();
    const auto [scale_input, numbers_input, bias_input] = Places::unpacked(ctx->saved_data["places"].toInt());
    const bool bias_needs_grad = bias_input >= 0 && ctx->needs_input_grad(bias_input);
    const bool others_need_grad = others && ctx->needs_input_grad(1);
    const bool rows_need_grad = ctx->needs_input_grad(0) || (options.are_views && others_need_grad);
    const bool columns_need_grad = !options.are_views && others_need_grad;
    std::optional<double> positive_prior;
    if (const auto found = ctx->saved_data.find("positive_prior"); found != ctx->saved_data.end())
      positive_prior = found->second.toDouble();
    const Call call{rows,      others, scale,       classes,        row_ids, column_ids,
                    positives, numbers, column_bias, positive_prior, options};
    Tensor by_rows, by_columns, by_scale, by_numbers, by_bias;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const int64_t n = call.row_count();
      ByTerms by;
      if (can_be_read(grad) && can_be_read(lse)) {
        const double each = number_in(grad) / divisor;
        if (classes && !options.classes_apart)
          by.lse = filled(n, each, lse.options());
        else
          by = Losses(call, lse, column_lse, positive_logits).differentiate(each);
      } else {
        TORCH_CHECK(!call.has_rule(), kName, ": the gradient of the loss must be readable on the cpu");
        const Tensor total = grad.to(at::kDouble);
        by.lse = total.div(options.both_directions ? 2 * divisor : divisor).expand({n});
        if (options.both_directions) by.column_lse = by.lse;
        by.positive_logits = total.div(-divisor).expand({n});
      }
      by_numbers = by.numbers;
      if (options.classes_apart) {
        std::tie(by_rows, by_scale) =
            cpu::contrastive_apart_bwd(*by.lse, *by.column_lse, rows, scale, *classes, lse, column_lse,
                                       row_rnorm, kept, options.normalize, rows_need_grad);
      } else if (classes) {
        std::tie(by_rows, by_scale) = cpu::class_contrastive_bwd(
            *by.lse, rows, scale, *classes, counts, lse, row_rnorm, kept, options.normalize, rows_need_grad);
      } else if (call.runs_directly()) {
        const OptionalTensor listed = call.listed_positives(/*keep=*/true, columns_need_grad);
        std::tie(by_rows, by_columns, by_scale, by_bias, std::ignore) = cpu::contrastive_bwd(
            call.arguments(listed, /*keep=*/false, columns_need_grad),
            {by.lse, by.column_lse, by.positive_logits, lse, column_lse, row_rnorm, column_rnorm, kept,
             rows_need_grad, columns_need_grad, /*class_weight=*/nullptr, bias_needs_grad,
             /*row_bias_needs_grad=*/false, /*scale_needs_grad=*/scale_input >= 0});
      } else {
        const auto [all_rows, columns, listed, of_rows, of_columns] = call.operands();
        std::tie(by_rows, by_columns, by_scale, by_bias, std::ignore) = contrastive_backward_op().call(
            by.lse, by.column_lse, by.positive_logits, *all_rows, columns, scale, listed, of_rows, of_columns,
            lse, column_lse, row_rnorm, column_rnorm, kept, options.normalize, options.normalize_others,
            call.keeps_diagonal(), options.both_directions, rows_need_grad, columns_need_grad, column_bias,
            std::nullopt, std::nullopt, std::nullopt, /*only_equal_ids=*/false, bias_needs_grad,
            /*row_bias_needs_grad=*/false);
      }
      if (by.scale != 0) by_scale = number(number_in(by_scale) + by.scale, by_scale.scalar_type());
      if (bias_needs_grad) by_bias = by_bias.add(at::tensor(by.column_bias, at::kDouble)).to(by_bias.dtype());
    }
    variable_list by_input(kInputs);
    if (at::GradMode::is_enabled()) {
      const variable_list refusing =
          without_second_derivative(kName, {by_rows, by_columns, by_scale, by_numbers, by_bias},
                                    {saved[0], saved[1], scale, saved[13], saved[15], grads[0]});
      by_rows = refusing[0], by_columns = refusing[1], by_scale = refusing[2], by_numbers = refusing[3],
      by_bias = refusing[4];
    }
    if (!options.are_views || !others) {
      if (rows_need_grad) by_input[0] = saved[0].dim() == 2 ? by_rows : by_rows.view(saved[0].sizes());
      if (columns_need_grad) by_input[1] = by_columns;
    } else {
      const int64_t b = rows.size(0);
      if (ctx->needs_input_grad(0)) by_input[0] = some_rows(by_rows, 0, b);
      if (others_need_grad) by_input[1] = some_rows(by_rows, b, b);
    }
    if (scale_input >= 0 && ctx->needs_input_grad(scale_input)) by_input[2] = by_scale;
    if (numbers_input >= 0 && ctx->needs_input_grad(numbers_input)) by_input[8] = by_numbers;
    if (bias_needs_grad) by_input[9] = by_bias;
    return by_input;
  }
};

// The positives of bags, (N, P), and the bags' numbers of rows and of columns: ids that leave them out of the
// sums.
std::array<Tensor, 3> bags(int64_t n, int64_t columns) {
  const auto whole = at::TensorOptions(at::kLong);
  const std::array<Tensor, 3> result = {cpu::pooled({n, columns / n}, whole), cpu::pooled({n}, whole),
                                        cpu::pooled({columns}, whole)};
  int64_t* data[3];
  for (int k = 0; k < 3; ++k) data[k] = result[k].mutable_data_ptr<int64_t>();
  std::iota(data[1], data[1] + n, 0);
  for (int64_t j = 0; j < columns; ++j) data[0][j] = j, data[2][j] = j * n / columns;
  return result;
}

}  // namespace

std::tuple<Tensor, int64_t> contrastive_loss(
    const Tensor& given, const OptionalTensor& others, const OptionalTensor& scale, double constant,
    const OptionalTensor& classes, const OptionalTensor& row_ids, const OptionalTensor& column_ids,
    const OptionalTensor& positives, const OptionalTensor& numbers, const OptionalTensor& column_bias,
    std::optional<double> positive_prior, bool are_views, bool leaves_partner_out, bool both_directions,
    bool joint, bool classes_apart, bool normalize, bool normalize_others, double divisor) {
  RECORD_FUNCTION("ssl_kernels::contrastive_loss", std::vector<c10::IValue>());
  TORCH_CHECK(classes ? !others && !are_views : others || are_views,
              "contrastive_loss: others or classes must be given, or rows that are views");
  const Tensor rows = classes && given.dim() == 3 ? as_matrix(given) : given;
  TORCH_CHECK(rows.dim() == 2 && (!others || (others->dim() == 2 && others->size(1) == rows.size(1) &&
                                              others->device() == rows.device())),
              "contrastive_loss: rows and others must be 2-d and alike");
  TORCH_CHECK(!classes_apart || (classes && classes->dim() == 1 && classes->scalar_type() == at::kLong),
              "contrastive_loss: classes_apart goes with classes that are int64 (N,)");
  const int64_t n = rows.size(0), m = others ? others->size(0) : n;
  const bool bags_too = joint && !are_views, is_mixed = positives && numbers, is_pairs = !are_views && !joint;
  const bool alike = are_views || is_mixed || (is_pairs && both_directions);
  const bool more = m >= n || positives || numbers;
  TORCH_CHECK(n > 0 && (alike ? m == n : bags_too ? m % n == 0 : more),
              "contrastive_loss: others must have as many rows, or more where they are no pairs");
  TORCH_CHECK(!are_views || ((others ? others->scalar_type() == rows.scalar_type() : n % 2 == 0) &&
                             !both_directions),
              "contrastive_loss: views must have one dtype, be equally many and go one way");
  if (positives || numbers || column_bias || joint || positive_prior) {
    const auto readable = [&](const OptionalTensor& tensor) { return !tensor || can_be_read(*tensor); };
    TORCH_CHECK(others && can_be_read(rows) && can_be_read(*others) && readable(scale) &&
                    readable(positives) && readable(numbers) && readable(column_bias) &&
                    !c10::impl::dispatch_mode_enabled(),
                "contrastive_loss: positives, numbers, column_bias, joint and positive_prior go with others "
                "on cpu");
    TORCH_CHECK(!(positives || numbers || column_bias) || (is_pairs && !both_directions),
                "contrastive_loss: positives, numbers and column_bias go with pairs in one direction");
    TORCH_CHECK(!numbers || (numbers->scalar_type() == at::kDouble && !(is_mixed && column_bias) &&
                             (numbers->dim() == 0 ? is_mixed : numbers->dim() == 1 && numbers->size(0) == n)),
                "contrastive_loss: numbers must be float64 (N,), or shares () with positives");
    TORCH_CHECK(!positives || positives->dim() == 1, "contrastive_loss: positives must be int64 (N,)");
    TORCH_CHECK(!joint || !(leaves_partner_out || row_ids || column_ids),
                "contrastive_loss: joint sums must be of views with their partner, or of bags");
    TORCH_CHECK(!positive_prior || (are_views && leaves_partner_out && n > 1 && *positive_prior >= 0 &&
                                    *positive_prior < 1),
                "contrastive_loss: positive_prior must be in [0, 1) and go with views of two samples or more"
                " whose partners are left out");
  }
  if (is_mixed) {
    cpu::checked_permutation("imix_loss", *positives);
    cpu::checked_lam<double>("imix_loss", numbers->dim() > 0 ? *numbers : numbers->unsqueeze(0));
  }
  const Tensor used = scale_of(scale, constant, rows);
  const OptionalTensor none;
  const OptionalTensor& columns = are_views ? none : others;
  check_contrastive(rows, columns, used, positives, row_ids, column_ids);
  if (column_bias)
    check_additions(rows, columns, used, row_ids, both_directions, column_bias, none, none, none,
                    /*only_equal_ids=*/false);
  refuse_forward_mode(kName, {&given, others ? &*others : nullptr, &used, numbers ? &*numbers : nullptr,
                              column_bias ? &*column_bias : nullptr});
  OptionalTensor of_bags[3] = {positives, row_ids, column_ids};
  if (bags_too) {
    const auto made = bags(n, m);
    std::copy(made.begin(), made.end(), of_bags);
  }
  const Options options{are_views, leaves_partner_out, both_directions, joint,
                        normalize, normalize_others,   classes_apart};
  const auto learns = [](const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); };
  const bool differentiate =
      at::GradMode::is_enabled() && (given.requires_grad() || used.requires_grad() || learns(others) ||
                                     learns(numbers) || learns(column_bias));
  if (!differentiate)
    return forward({rows, others, used, classes, of_bags[1], of_bags[2], of_bags[0], numbers, column_bias,
                    positive_prior, options},
                   divisor, /*columns_need_grad=*/false, nullptr);
  refuse_torch_func(kName);
  int64_t counted = 0;
  const Tensor loss =
      ContrastiveLoss::apply(given, others, scale, constant, classes, of_bags[1], of_bags[2], of_bags[0],
                             numbers, column_bias, positive_prior, options, divisor, &counted);
  return {loss, counted};
}

namespace {

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  // The scale is a tensor that may be learned, or else the constant. The sum of the losses is divided by
  // `divisor`, and where that is 0 by how many losses the mean is over, which is returned too.
  library.def(
      "contrastive_loss.native(Tensor rows, Tensor? others, Tensor? scale, float constant, Tensor? classes, "
      "Tensor? row_ids, Tensor? column_ids, Tensor? positives, Tensor? numbers, Tensor? column_bias, "
      "float? positive_prior, bool are_views, bool leaves_partner_out, bool both_directions, bool joint, "
      "bool classes_apart, bool normalize, bool normalize_others, float divisor) -> (Tensor, int)",
      &contrastive_loss);
}

}  // namespace
}  // namespace ssl_kernels
