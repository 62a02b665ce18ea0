// Registers the CPU kernel as `queue_push_.native`. The schema is defined in ssl_kernels/ops/queue_push.py, so that it
// exists where nothing was compiled.
#include "queue_push.h"

#include <torch/library.h>

#include "../cpu/queue_push.h"

namespace ssl_kernels {
namespace {

void queue_push_(const at::Tensor& storage, const at::Tensor& keys, const at::Tensor& position,
                 const at::Tensor& filled, bool normalize) {
  check_queue_push(storage, keys, position, filled);
  cpu::queue_push_(storage, keys, position, filled, normalize);
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) { library.impl("queue_push_.native", &queue_push_); }

}  // namespace
}  // namespace ssl_kernels
