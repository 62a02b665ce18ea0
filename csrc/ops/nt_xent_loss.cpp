// `nt_xent_loss.native`: the algebra of ssl_kernels/losses/nt_xent.py over `contrastive`, reduced, as one node of
// autograd, on every device. At small batches the interpreter and the nodes of cat, sub and mean cost more than the kernels.
#include <ATen/ops/arange.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "../cpu/contrastive.h"
#include "contrastive_autograd.h"
#include "no_second_derivative.h"
#include "readable.h"
#include "saved.h"
#include "transforms.h"

namespace ssl_kernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Whether the CPU kernel can be called without the dispatcher, which has nobody to tell. It takes the views as they are.
bool runs_directly(const Tensor& z0, const Tensor& z1, const Tensor& scale) {
  return can_be_read(z0) && can_be_read(z1) && can_be_read(scale) && !c10::impl::dispatch_mode_enabled();
}

// `rows` are all rows, or the first view, with `more_rows` the second.
cpu::ContrastiveArgs arguments(const Tensor& rows, const Tensor* more_rows, const Tensor& scale,
                               const OptionalTensor& partner, bool normalize, bool keep) {
  static const OptionalTensor none;
  return {rows, none, scale, partner, none, none, normalize, normalize, /*keep_diagonal=*/false,
          /*both_directions=*/false, keep, /*columns_need_grad=*/false, more_rows};
}

Tensor filled(int64_t n, double value, const at::TensorOptions& options) {
  const Tensor result = at::empty({n}, options);
  std::fill_n(result.mutable_data_ptr<double>(), n, value);
  return result;
}

// -b .. b - 1: the other view of each row, where negative numbers count from the end.
Tensor partners(int64_t b, const Tensor& rows) {
  const auto options = rows.options().dtype(at::kLong);
  if (!can_be_read(rows)) return at::arange(-b, b, options);
  const Tensor result = at::empty({2 * b}, options);
  std::iota(result.mutable_data_ptr<int64_t>(), result.mutable_data_ptr<int64_t>() + 2 * b, -b);
  return result;
}

// Rows begin .. begin + count - 1 of a contiguous gradient.
Tensor some_rows(const Tensor& grad, int64_t begin, int64_t count) {
  if (!can_be_read(grad) || at::GradMode::is_enabled()) return grad.narrow(0, begin, count);
  const int64_t d = grad.size(1);
  return at::native::as_strided_tensorimpl(grad, {count, d}, {d, 1}, begin * d);
}

struct Saved {
  Tensor partner, lse, row_rnorm, kept;
};

Tensor forward(const Tensor& z0, const Tensor& z1, const Tensor& scale, bool normalize, bool mean, Saved* saved) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // cat refuses other dtypes
  const int64_t b = z0.size(0);
  const bool keep = saved != nullptr;
  const OptionalTensor partner = partners(b, z0);
  const auto [lse, column_lse, positive_logits, row_rnorm, column_rnorm, kept] =
      runs_directly(z0, z1, scale)
          ? cpu::contrastive_fwd(arguments(z0, &z1, scale, partner, normalize, keep))
          : contrastive_forward_op().call(at::cat({z0, z1}), std::nullopt, scale, partner, std::nullopt, std::nullopt,
                                          normalize, normalize, /*keep_diagonal=*/false, /*both_directions=*/false, keep,
                                          /*columns_need_grad=*/false, std::nullopt, std::nullopt, std::nullopt,
                                          std::nullopt, /*only_equal_ids=*/false);
  if (saved) *saved = {*partner, lse, row_rnorm, kept};
  if (!can_be_read(lse)) {
    const Tensor losses = lse.sub(positive_logits);
    return mean ? losses.mean(scale.scalar_type()) : losses.sum(scale.scalar_type());
  }
  const double *l = lse.const_data_ptr<double>(), *p = positive_logits.const_data_ptr<double>();
  double sum = 0;
  for (int64_t i = 0; i < 2 * b; ++i) sum += l[i] - p[i];
  return at::scalar_tensor(mean ? sum / (2 * b) : sum, scale.options());
}

Tensor scale_of(const OptionalTensor& scale, double constant, const Tensor& z0) {
  const auto acc = z0.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return scale ? *scale : at::scalar_tensor(constant, z0.options().dtype(acc));
}

struct NTXentLoss : Function<NTXentLoss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& z0, const Tensor& z1, const OptionalTensor& learned,
                        double constant, bool normalize, bool mean) {
    Saved saved;
    const Tensor scale = scale_of(learned, constant, z0);
    const Tensor loss = ssl_kernels::forward(z0, z1, scale, normalize, mean, &saved);
    // The views rather than their concatenation: they are likely kept alive by others as well.
    ctx->save_for_backward(savable({z0, z1, scale, saved.partner, saved.lse, saved.row_rnorm, saved.kept}));
    ctx->saved_data["flags"] = int64_t{normalize} + 2 * int64_t{mean} + 4 * int64_t{learned.has_value()};
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &z0 = saved[0], &z1 = saved[1], &scale = saved[2], &lse = saved[4];
    const int64_t flags = ctx->saved_data["flags"].toInt();
    const bool normalize = flags & 1, mean = flags & 2, learns_scale = flags & 4;
    const bool rows_need_grad = ctx->needs_input_grad(0) || ctx->needs_input_grad(1);
    const int64_t b = z0.size(0), n = 2 * b;
    variable_list results;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      Tensor grad_lse, grad_positive;
      if (can_be_read(grads[0])) {
        const bool wide = grads[0].scalar_type() == at::kDouble;
        const double total = wide ? *grads[0].const_data_ptr<double>() : *grads[0].const_data_ptr<float>();
        grad_lse = filled(n, total / (mean ? n : 1), lse.options());
        grad_positive = filled(n, -total / (mean ? n : 1), lse.options());
      } else {
        const Tensor grad = grads[0].to(at::kDouble).div(mean ? n : 1);
        grad_lse = grad.expand({n});
        grad_positive = grad.neg().expand({n});
      }
      const Tensor none = at::empty({0}, lse.options());
      const OptionalTensor no_grad, partner = saved[3], by_lse = grad_lse, by_positives = grad_positive;
      const auto [grad_rows, grad_columns, grad_scale, grad_column_bias, grad_row_bias] =
          runs_directly(z0, z1, scale)
              ? cpu::contrastive_bwd(arguments(z0, &z1, scale, partner, normalize, /*keep=*/false),
                                     {by_lse, no_grad, by_positives, lse, none, saved[5], none, saved[6],
                                      rows_need_grad, /*columns_need_grad=*/false})
              : contrastive_backward_op().call(by_lse, no_grad, by_positives, at::cat({z0, z1}), std::nullopt, scale,
                                               partner, std::nullopt, std::nullopt, lse, none, saved[5], none, saved[6],
                                               normalize, normalize, /*keep_diagonal=*/false,
                                               /*both_directions=*/false, rows_need_grad, /*columns_need_grad=*/false,
                                               std::nullopt, std::nullopt, std::nullopt, std::nullopt,
                                               /*only_equal_ids=*/false, /*column_bias_needs_grad=*/false,
                                               /*row_bias_needs_grad=*/false);
      results = {grad_rows, grad_columns, grad_scale};
    }
    results = without_second_derivative("nt_xent_loss", results, {z0, z1, scale, grads[0]});
    variable_list by_input(6);
    if (ctx->needs_input_grad(0)) by_input[0] = some_rows(results[0], 0, b);
    if (ctx->needs_input_grad(1)) by_input[1] = some_rows(results[0], b, b);
    if (learns_scale && ctx->needs_input_grad(2)) by_input[2] = results[2];
    return by_input;
  }
};

Tensor nt_xent_loss(const Tensor& z0, const Tensor& z1, const OptionalTensor& scale, double constant, bool normalize,
                    bool mean) {
  TORCH_CHECK(z0.dim() == 2 && z0.sizes() == z1.sizes() && z0.numel() > 0 && z0.scalar_type() == z1.scalar_type() &&
                  z0.device() == z1.device(),
              "nt_xent_loss: the views must be 2-d and alike, got ", z0.sizes(), " and ", z1.sizes());
  TORCH_CHECK(!scale || (scale->numel() == 1 && scale->device() == z0.device() &&
                         scale->scalar_type() == (z0.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)),
              "nt_xent_loss: scale must be one number of the accumulation dtype");
  refuse_forward_mode("nt_xent_loss", {&z0, &z1, scale ? &*scale : nullptr});
  const bool differentiate = at::GradMode::is_enabled() &&
                             (z0.requires_grad() || z1.requires_grad() || (scale && scale->requires_grad()));
  if (!differentiate) return forward(z0, z1, scale_of(scale, constant, z0), normalize, mean, nullptr);
  refuse_torch_func("nt_xent_loss");
  return NTXentLoss::apply(z0, z1, scale, constant, normalize, mean);
}

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  // The scale is a tensor that may be learned, or else the constant.
  library.def("nt_xent_loss.native(Tensor z0, Tensor z1, Tensor? scale, float constant, bool normalize, bool mean) "
              "-> Tensor",
              &nt_xent_loss);
}

}  // namespace
}  // namespace ssl_kernels
