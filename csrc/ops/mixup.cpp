// Registers the CPU kernels of mixup. The schemas are defined in ssl_kernels/ops/mixup.py.
#include "../cpu/mixup.h"

#include <torch/library.h>

#include "mixing.h"

namespace ssl_kernels {
namespace {

void mixup_(const at::Tensor& x, const at::Tensor& lam, const at::Tensor& permutation) {
  check_mixup("mixup_", x, lam, permutation);
  cpu::mixup_(x, lam, permutation);
}

at::Tensor mixup_fwd(const at::Tensor& x, const at::Tensor& lam, const at::Tensor& permutation) {
  check_mixup("mixup", x, lam, permutation);
  return cpu::mixup_fwd(x, lam, permutation);
}

std::tuple<at::Tensor, at::Tensor> mixup_bwd(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                                             const at::Tensor& lam, const at::Tensor& permutation, bool x_needs_grad) {
  check_mixup("mixup", grad, lam, permutation);
  if (x) check_like("mixup", "x", *x, grad);
  return cpu::mixup_bwd(grad, x, lam, permutation, x_needs_grad);
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("mixup_.native", &mixup_);
  library.impl("mixup_fwd.native", &mixup_fwd);
  library.impl("mixup_bwd.native", &mixup_bwd);
}

}  // namespace
}  // namespace ssl_kernels
