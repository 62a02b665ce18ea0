// Registers the CUDA kernel as `queue_push_.native`: passes plain pointers to the launcher of
// csrc/cuda/queue_push.h on the current stream.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../cuda/queue_push.h"
#include "cuda_launch.h"
#include "queue_push.h"

namespace ssl_kernels {
namespace {

void queue_push_(const at::Tensor& storage, const at::Tensor& keys, const at::Tensor& position,
                 const at::Tensor& filled, bool normalize) {
  check_queue_push(storage, keys, position, filled);
  const c10::cuda::CUDAGuard guard(storage.device());
  QueuePushArgs args = {};
  args.storage_dtype = kernel_dtype("queue_push_: storage", storage.scalar_type());
  args.key_dtype = kernel_dtype("queue_push_: keys", keys.scalar_type());
  args.normalize = normalize;
  args.K = storage.size(0);
  args.B = keys.size(0);
  args.D = storage.size(1);
  for (int i = 0; i < 2; ++i) args.key_strides[i] = keys.stride(i);
  args.storage = storage.data_ptr();
  args.keys = keys.data_ptr();
  args.position = position.data_ptr<int64_t>();
  args.filled = filled.data_ptr<int64_t>();
  launch(storage, ::queue_push, &args);
}

TORCH_LIBRARY_IMPL(ssl_kernels, CUDA, library) { library.impl("queue_push_.native", &queue_push_); }

}  // namespace
}  // namespace ssl_kernels
