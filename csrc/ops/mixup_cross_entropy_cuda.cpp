// Registers the CUDA kernels of mixup_cross_entropy: results, then csrc/cuda/mixup_cross_entropy.h on the
// current stream.
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../cuda/mixup_cross_entropy.h"
#include "mixing.h"
#include "mixing_cuda.h"

namespace ssl_kernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// The operands as the kernels take them, with what had to be made for it.
struct Operands {
  at::Tensor logits, target, partner, lam, weight, weight_sum;
  MixupCrossEntropyArgs args = {};

  Operands(const at::Tensor& logits_, const at::Tensor& target_, const at::Tensor& partner_,
           const at::Tensor& lam_, const OptionalTensor& weight_, double label_smoothing,
           int64_t ignore_index, bool partner_is_class)
      : logits(with_neighbours(logits_)), target(target_.contiguous()), partner(partner_), lam(lam_) {
    if (weight_) weight = weight_->contiguous();
    if (weight_ && label_smoothing != 0) weight_sum = at::sum(weight, at::kDouble);
    args.dtype = kernel_dtype("mixup_cross_entropy: the dtype", logits.scalar_type());
    args.N = logits.size(0);
    args.C = logits.size(1);
    args.label_smoothing = label_smoothing;
    args.logits = logits.data_ptr();
    args.row_stride = logits.stride(0);
    args.target = target.data_ptr<int64_t>();
    args.partner = partner.data_ptr<int64_t>();
    args.partner_stride = partner.stride(0);
    args.lam = lam.data_ptr();
    args.lam_stride = lam.stride(0);
    args.weight = weight.defined() ? weight.data_ptr() : nullptr;
    args.weight_sum = weight_sum.defined() ? weight_sum.data_ptr<double>() : nullptr;
    args.ignore_index = ignore_index;
    args.partner_is_class = partner_is_class;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> mixup_cross_entropy_fwd(
    const at::Tensor& logits, const at::Tensor& target, const at::Tensor& partner, const at::Tensor& lam,
    const OptionalTensor& weight, double label_smoothing, int64_t ignore_index, bool partner_is_class,
    std::string_view reduction) {
  check_mixup_cross_entropy(logits, target, partner, lam, weight);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Operands operands(logits, target, partner, lam, weight, label_smoothing, ignore_index,
                          partner_is_class);
  const at::Tensor rows = at::empty({logits.size(0)}, logits.options().dtype(at::kDouble));
  const at::Tensor lse = at::empty_like(rows), counted = at::empty_like(rows);
  const MixupCrossEntropyFwdArgs args = {operands.args, rows.data_ptr<double>(), lse.data_ptr<double>(),
                                         counted.data_ptr<double>()};
  launch(logits, ::mixup_cross_entropy_fwd, &args);
  const auto acc = lam.scalar_type();
  if (reduction == "mean") {
    const at::Tensor total = at::sum(counted, acc);
    return {at::sum(rows, acc).div_(total), lse, total};
  }
  return {reduction == "none" ? rows.to(acc) : at::sum(rows, acc), lse, at::empty({0}, lam.options())};
}

at::Tensor mixup_cross_entropy_bwd(const at::Tensor& grad_loss, const at::Tensor& logits,
                                   const at::Tensor& target, const at::Tensor& partner, const at::Tensor& lam,
                                   const OptionalTensor& weight, const at::Tensor& lse,
                                   double label_smoothing, int64_t ignore_index, bool partner_is_class) {
  check_mixup_cross_entropy(logits, target, partner, lam, weight);
  check_row_numbers("grad_loss", grad_loss, logits);
  check_row_numbers("lse", lse, logits);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Operands operands(logits, target, partner, lam, weight, label_smoothing, ignore_index,
                          partner_is_class);
  const at::Tensor row_lse = lse.contiguous(), grad_logits = at::empty(logits.sizes(), logits.options());
  const MixupCrossEntropyBwdArgs args = {operands.args, grad_loss.data_ptr<double>(), grad_loss.stride(0),
                                         row_lse.data_ptr<double>(), grad_logits.data_ptr()};
  launch(logits, ::mixup_cross_entropy_bwd, &args);
  return grad_logits;
}

TORCH_LIBRARY_IMPL(ssl_kernels, CUDA, library) {
  library.impl("mixup_cross_entropy_fwd.native", &mixup_cross_entropy_fwd);
  library.impl("mixup_cross_entropy_bwd.native", &mixup_cross_entropy_bwd);
}

}  // namespace
}  // namespace ssl_kernels
