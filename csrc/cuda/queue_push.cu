// Launcher of queue_push.h.
#include "queue_push.h"

#include <algorithm>

#include "queue_push.cuh"

namespace ssl_kernels {
namespace queue_push {
namespace {

// Whether rows of a matrix, `stride` elements apart, can be moved a group at a time.
template <typename T>
bool in_groups(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Group<T>) == 0 && stride % kGroup == 0;
}

template <typename key_t, typename storage_t>
int run(const QueuePushArgs& args, cudaStream_t stream) {
  using acc_t = std::conditional_t<std::is_same_v<key_t, double>, double, float>;
  const int64_t written = std::min(args.B, args.K);
  const unsigned blocks = static_cast<unsigned>((written + kWarps - 1) / kWarps);
  const bool grouped = (args.key_strides[1] == 1 || args.D == 1) &&
                       in_groups<key_t>(args.keys, args.B == 1 ? 0 : args.key_strides[0]) &&
                       in_groups<storage_t>(args.storage, args.D);
  queue_push_kernel<key_t, storage_t, acc_t><<<blocks, kWarps * kWarpSize, 0, stream>>>(
      static_cast<storage_t*>(args.storage), static_cast<const key_t*>(args.keys), args.key_strides[0],
      args.key_strides[1], args.K, args.B, args.D, args.position, args.normalize != 0, grouped);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  queue_push_advance_kernel<<<1, 1, 0, stream>>>(args.position, args.filled, args.K, args.B);
  return cudaGetLastError();
}

template <typename key_t>
int run_for_storage(const QueuePushArgs& args, cudaStream_t stream) {
  switch (args.storage_dtype) {
    case kFloat64: return run<key_t, double>(args, stream);
    case kFloat16: return run<key_t, __half>(args, stream);
    case kBFloat16: return run<key_t, __nv_bfloat16>(args, stream);
    default: return run<key_t, float>(args, stream);
  }
}

}  // namespace
}  // namespace queue_push
}  // namespace ssl_kernels

int queue_push(const QueuePushArgs* args, cudaStream_t stream) {
  using namespace ssl_kernels::queue_push;
  if (args->B == 0) return cudaSuccess;
  switch (args->key_dtype) {
    case kFloat64: return run_for_storage<double>(*args, stream);
    case kFloat16: return run_for_storage<__half>(*args, stream);
    case kBFloat16: return run_for_storage<__nv_bfloat16>(*args, stream);
    default: return run_for_storage<float>(*args, stream);
  }
}
