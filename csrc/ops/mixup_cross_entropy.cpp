// Registers the CPU kernels of mixup_cross_entropy. The schemas are defined in ssl_kernels/ops/mixup_cross_entropy.py.
#include "../cpu/mixup_cross_entropy.h"

#include <torch/library.h>

#include "mixing.h"

namespace ssl_kernels {
namespace {

std::tuple<at::Tensor, at::Tensor> mixup_cross_entropy_fwd(const at::Tensor& logits, const at::Tensor& target,
                                                           const at::Tensor& permutation, const at::Tensor& lam,
                                                           double label_smoothing) {
  check_mixup_cross_entropy(logits, target, permutation, lam);
  return cpu::mixup_cross_entropy_fwd(logits, target, permutation, lam, label_smoothing);
}

at::Tensor mixup_cross_entropy_bwd(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                                   const at::Tensor& permutation, const at::Tensor& lam, const at::Tensor& lse,
                                   double label_smoothing) {
  check_mixup_cross_entropy(logits, target, permutation, lam);
  check_row_numbers("grad_loss", grad_loss, logits);
  check_row_numbers("lse", lse, logits);
  TORCH_CHECK(lse.is_contiguous(), "mixup_cross_entropy: lse must be what mixup_cross_entropy_fwd returned");
  return cpu::mixup_cross_entropy_bwd(grad_loss, logits, target, permutation, lam, lse, label_smoothing);
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("mixup_cross_entropy_fwd.native", &mixup_cross_entropy_fwd);
  library.impl("mixup_cross_entropy_bwd.native", &mixup_cross_entropy_bwd);
}

}  // namespace
}  // namespace ssl_kernels
