// Registers the CPU kernel as `patch_errors_fwd.native` and `patch_errors_bwd.native`, whose schema is in
// ssl_kernels/ops/patch_errors.py, so that it exists where nothing was compiled; and `mae_loss.native`, a
// reduced loss with its derivative as one node of autograd: of few patches the operators around the kernel
// cost more than it does.
#include "../cpu/patch_errors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>

#include "autograd.h"
#include "operands.h"

namespace ssl_kernels {
namespace {

void check_patches(const Tensor& prediction, const Tensor& target) {
  TORCH_CHECK(prediction.dim() == 2 && prediction.size(0) > 0 && prediction.size(1) > 0 &&
                  target.sizes() == prediction.sizes() && target.device() == prediction.device(),
              "patch_errors: prediction and target must have the same shape (P, C) with P, C >= 1, got ",
              prediction.sizes(), " and ", target.sizes());
  TORCH_CHECK(accumulation_type(prediction) == accumulation_type(target),
              "patch_errors: target must be float64 where prediction is, got ", target.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> patch_errors_fwd(const Tensor& prediction, const Tensor& target,
                                                    const Tensor& eps, bool normalize) {
  check_patches(prediction, target);
  TORCH_CHECK(eps.numel() == 1, "patch_errors: eps must have one element, got ", eps.numel());
  TORCH_CHECK(!normalize || prediction.size(1) > 1, "patch_errors: C must be at least 2, got ",
              prediction.size(1));
  return cpu::patch_errors_fwd(prediction, target, eps.item<double>(), normalize);
}

Tensor patch_errors_bwd(const Tensor& grad, const Tensor& prediction, const Tensor& target,
                        const Tensor& mean, const Tensor& rstd) {
  check_patches(prediction, target);
  const auto acc = accumulation_type(prediction);
  const int64_t n = prediction.size(0);
  TORCH_CHECK(grad.dim() == 1 && grad.size(0) == n && grad.scalar_type() == acc,
              "patch_errors: grad must have shape (P,)");
  for (const Tensor& kept : {mean, rstd})
    TORCH_CHECK((kept.numel() == 0 || kept.numel() == n) && kept.is_contiguous() &&
                    kept.scalar_type() == acc && kept.numel() == mean.numel(),
                "patch_errors: mean and rstd must be what the forward made");
  return cpu::patch_errors_bwd(grad, prediction, target, mean, rstd);
}

Tensor as_rows(const Tensor& patches) { return patches.reshape({-1, patches.size(-1)}); }

// What each patch's loss counts in the reduced one, in the accumulation type: (P,) with a mask, and one
// number for all without or where a mean is of none.
Tensor shares(const Tensor& mask, const Tensor& losses, bool mean) {
  const int64_t patches = losses.size(0);
  const auto acc = losses.options();
  if (!mask.defined()) return at::scalar_tensor(mean ? 1.0 / static_cast<double>(patches) : 1.0, acc);
  const Tensor weights = at::empty({patches}, acc.dtype(at::kDouble));
  weights.copy_(mask.reshape(-1));
  const double total = mean ? weights.sum().item<double>() : 1;
  if (total == 0) return at::scalar_tensor(0.0, acc);
  return weights.mul_(1 / total).to(losses.scalar_type());
}

template <class acc_t>
double weighted_sum(const Tensor& losses, const Tensor& share) {
  const acc_t *loss = losses.const_data_ptr<acc_t>(), *w = share.const_data_ptr<acc_t>();
  const bool several = share.dim() > 0;
  double sum = 0;
  for (int64_t p = 0; p < losses.size(0); ++p)
    sum += static_cast<double>(loss[p]) * (several ? static_cast<double>(w[p]) : 1.0);
  return several ? sum : w[0] == 0 ? 0 : sum * static_cast<double>(w[0]);
}

struct MAELoss : Node<MAELoss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& prediction, const Tensor& target,
                        const OptionalTensor& mask, double eps, bool normalize, bool mean) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Tensor rows = as_rows(prediction), targets = as_rows(target);
    check_patches(rows, targets);
    const auto [losses, means, rstd] = cpu::patch_errors_fwd(rows, targets, eps, normalize);
    const Tensor share = shares(or_undefined(mask), losses, mean);
    const bool wide = losses.scalar_type() == at::kDouble;
    if (ctx) ctx->save_for_backward(savable({prediction, target, means, rstd, share}));
    const double sum = wide ? weighted_sum<double>(losses, share) : weighted_sum<float>(losses, share);
    return at::scalar_tensor(sum, losses.options());
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &prediction = saved[0], &share = saved[4];
    variable_list made(6);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const Tensor rows = as_rows(prediction);
      const Tensor by_patch = share.mul(grads[0]).expand({rows.size(0)});
      const Tensor by_rows = patch_errors_bwd(by_patch, rows, as_rows(saved[1]), saved[2], saved[3]);
      made[0] = by_rows.view(prediction.sizes());
    }
    return without_second_derivative("mae_loss", made, {grads[0], prediction});
  }
};

Tensor mae_loss(const Tensor& prediction, const Tensor& target, const OptionalTensor& mask, double eps,
                bool normalize, bool mean) {
  TORCH_CHECK(can_be_read(prediction) && can_be_read(target) && prediction.numel() > 0 &&
                  prediction.dim() > 0 && target.dim() > 0,
              "mae_loss: prediction and target must be on cpu and hold patches");
  TORCH_CHECK(!mask || (can_be_read(*mask) && mask->numel() == prediction.numel() / prediction.size(-1)),
              "mae_loss: mask must be on cpu with a number for each patch");
  refuse_forward_mode("mae_loss", {&prediction, &target});
  return as_node<MAELoss>("mae_loss", prediction.requires_grad(), prediction, target, mask, eps, normalize,
                          mean);
}

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  // prediction and target (..., C) with as many patches, mask one number for each of these.
  library.def(
      "mae_loss.native(Tensor prediction, Tensor target, Tensor? mask, float eps, bool normalize, bool mean)"
      " -> Tensor",
      &mae_loss);
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("patch_errors_fwd.native", &patch_errors_fwd);
  library.impl("patch_errors_bwd.native", &patch_errors_bwd);
}

}  // namespace
}  // namespace ssl_kernels
