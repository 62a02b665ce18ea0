// Registers the CPU kernels of CutMix. The schemas are defined in ssl_kernels/ops/cutmix.py.
#include "../cpu/cutmix.h"

#include <torch/library.h>

#include "mixing.h"

namespace ssl_kernels {
namespace {

void cutmix_(const at::Tensor& x, const at::Tensor& boxes, const at::Tensor& permutation) {
  check_cutmix("cutmix_", x, boxes, permutation);
  cpu::cutmix_(x, boxes, permutation);
}

at::Tensor cutmix_fwd(const at::Tensor& x, const at::Tensor& boxes, const at::Tensor& permutation) {
  check_cutmix("cutmix", x, boxes, permutation);
  return cpu::cutmix_fwd(x, boxes, permutation);
}

at::Tensor cutmix_bwd(const at::Tensor& grad, const at::Tensor& boxes, const at::Tensor& permutation) {
  check_cutmix("cutmix", grad, boxes, permutation);
  return cpu::cutmix_bwd(grad, boxes, permutation);
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("cutmix_.native", &cutmix_);
  library.impl("cutmix_fwd.native", &cutmix_fwd);
  library.impl("cutmix_bwd.native", &cutmix_bwd);
}

}  // namespace
}  // namespace ssl_kernels
