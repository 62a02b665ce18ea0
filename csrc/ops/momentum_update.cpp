// Registers the CPU kernel as `momentum_update_.native`. The schema is defined in ssl_kernels/ops/momentum_update.py, so
// that it exists where nothing was compiled.
#include "momentum_update.h"

#include <torch/library.h>

#include "../cpu/momentum_update.h"

namespace ssl_kernels {
namespace {

void momentum_update_(at::TensorList masters, at::TensorList shadows, at::TensorList sources,
                      const at::Tensor& weight) {
  check_momentum_update(masters, shadows, sources, weight);
  cpu::momentum_update_(masters, shadows, sources, *weight.const_data_ptr<float>());
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) { library.impl("momentum_update_.native", &momentum_update_); }

}  // namespace
}  // namespace ssl_kernels
