// Registers the CUDA kernel as `batch_hard.native`: allocates results and scratch memory, passes plain
// pointers to the launcher of csrc/cuda/batch_hard.h on the current stream.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "../cuda/batch_hard.h"
#include "batch_hard.h"
#include "cuda_launch.h"

namespace ssl_kernels {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> batch_hard(const Tensor& embeddings, const Tensor& labels, bool normalize,
                                      std::string_view distance) {
  check_batch_hard(embeddings, labels, distance);
  const c10::cuda::CUDAGuard guard(embeddings.device());
  const Tensor label = labels.contiguous();
  const Tensor positive_index = at::empty({embeddings.size(0)}, label.options());
  const Tensor negative_index = at::empty({embeddings.size(0)}, label.options());
  BatchHardArgs args = {};
  args.common.dtype = kernel_dtype("batch_hard: embeddings", embeddings.scalar_type());
  args.common.normalize = normalize;
  args.common.cosine = distance == "cosine";
  args.common.allow_tf32 = allow_tf32();
  args.common.N = embeddings.size(0);
  args.common.D = embeddings.size(1);
  for (int i = 0; i < 2; ++i) args.common.strides[i] = embeddings.stride(i);
  args.common.embeddings = embeddings.data_ptr();
  args.common.labels = pointer<int64_t>(label);
  args.positive_index = pointer<int64_t>(positive_index);
  args.negative_index = pointer<int64_t>(negative_index);
  launch_with_workspace(args, args.common.workspace, embeddings, batch_hard_workspace, ::batch_hard);
  return {positive_index, negative_index};
}

TORCH_LIBRARY_IMPL(ssl_kernels, CUDA, library) { library.impl("batch_hard.native", &batch_hard); }

}  // namespace
}  // namespace ssl_kernels
