// Registers the CPU kernel of mixup_normalize. The schema is defined in ssl_kernels/ops/mixup_normalize.py.
#include "../cpu/mixup_normalize.h"

#include <torch/library.h>

#include "mixing.h"

namespace ssl_kernels {
namespace {

at::Tensor mixup_normalize(const at::Tensor& x, const at::Tensor& lam, const at::Tensor& permutation,
                           const at::Tensor& mean, const at::Tensor& std, at::ScalarType dtype) {
  check_mixup_normalize(x, lam, permutation, mean, std, dtype);
  return cpu::mixup_normalize(x, lam, permutation, mean, std, dtype);
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) { library.impl("mixup_normalize.native", &mixup_normalize); }

}  // namespace
}  // namespace ssl_kernels
