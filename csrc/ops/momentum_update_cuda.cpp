// Registers the CUDA kernel as `momentum_update_.native`: passes plain pointers to the launcher of
// csrc/cuda/momentum_update.h on the current stream.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <vector>

#include "../cuda/momentum_update.h"
#include "cuda_launch.h"
#include "momentum_update.h"

namespace ssl_kernels {
namespace {

void momentum_update_(at::TensorList masters, at::TensorList shadows, at::TensorList sources,
                      const at::Tensor& weight) {
  check_momentum_update(masters, shadows, sources, weight);
  if (masters.empty()) return;
  const c10::cuda::CUDAGuard guard(masters[0].device());
  std::vector<MomentumTriple> triples;
  triples.reserve(masters.size());
  for (size_t i = 0; i < masters.size(); ++i) {
    triples.push_back({static_cast<float*>(masters[i].data_ptr()), shadows[i].data_ptr(),
                       sources[i].data_ptr(), masters[i].numel(),
                       kernel_dtype("momentum_update_: shadows", shadows[i].scalar_type()),
                       kernel_dtype("momentum_update_: sources", sources[i].scalar_type())});
  }
  launch(masters[0], ::momentum_update, triples.data(), static_cast<int64_t>(triples.size()),
         weight.const_data_ptr<float>());
}

TORCH_LIBRARY_IMPL(ssl_kernels, CUDA, library) { library.impl("momentum_update_.native", &momentum_update_); }

}  // namespace
}  // namespace ssl_kernels
