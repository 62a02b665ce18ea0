// Registers the CPU kernels of mixup_cross_entropy. The schemas are defined in ssl_kernels/ops/mixup_cross_entropy.py.
#include "../cpu/mixup_cross_entropy.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "mixing.h"

namespace ssl_kernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor, at::Tensor> mixup_cross_entropy_fwd(
    const at::Tensor& logits, const at::Tensor& target, const at::Tensor& partner, const at::Tensor& lam,
    const OptionalTensor& weight, double label_smoothing, int64_t ignore_index, bool partner_is_class,
    std::string_view reduction) {
  check_mixup_cross_entropy(logits, target, partner, lam, weight);
  const auto [rows, lse, counted] = cpu::mixup_cross_entropy_fwd(
      logits, target, partner, lam, weight.value_or(at::Tensor()), {label_smoothing, ignore_index, partner_is_class});
  const bool is_mean = reduction == "mean";
  const at::Tensor loss = reduction == "none" ? rows.to(lam.scalar_type()) : at::sum(rows, lam.scalar_type());
  const at::Tensor total = is_mean ? at::empty({}, lam.options()) : at::empty({0}, lam.options());
  if (is_mean) {  // by hand: an operation on one number takes longer than the rows of a small batch
    AT_DISPATCH_FLOATING_TYPES(lam.scalar_type(), "mixup_cross_entropy", [&] {
      *total.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(counted);
      *loss.mutable_data_ptr<scalar_t>() /= static_cast<scalar_t>(counted);
    });
  }
  return {loss, lse, total};
}

at::Tensor mixup_cross_entropy_bwd(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                                   const at::Tensor& partner, const at::Tensor& lam, const OptionalTensor& weight,
                                   const at::Tensor& lse, double label_smoothing, int64_t ignore_index,
                                   bool partner_is_class) {
  check_mixup_cross_entropy(logits, target, partner, lam, weight);
  check_row_numbers("grad_loss", grad_loss, logits);
  check_row_numbers("lse", lse, logits);
  TORCH_CHECK(lse.is_contiguous(), "mixup_cross_entropy: lse must be what mixup_cross_entropy_fwd returned");
  return cpu::mixup_cross_entropy_bwd(grad_loss, logits, target, partner, lam, weight.value_or(at::Tensor()), lse,
                                      {label_smoothing, ignore_index, partner_is_class});
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("mixup_cross_entropy_fwd.native", &mixup_cross_entropy_fwd);
  library.impl("mixup_cross_entropy_bwd.native", &mixup_cross_entropy_bwd);
}

}  // namespace
}  // namespace ssl_kernels
