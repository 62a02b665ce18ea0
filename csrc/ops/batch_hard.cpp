// Registers the CPU kernel as `batch_hard.native`. The schema is defined in ssl_kernels/ops/batch_hard.py, so that it
// exists where nothing was compiled.
#include "batch_hard.h"

#include <torch/library.h>

#include <tuple>

#include "../cpu/batch_hard.h"

namespace ssl_kernels {
namespace {

std::tuple<at::Tensor, at::Tensor> batch_hard(const at::Tensor& embeddings, const at::Tensor& labels, bool normalize,
                                              std::string_view distance) {
  check_batch_hard(embeddings, labels, distance);
  return cpu::batch_hard(embeddings, labels, normalize, distance == "cosine");
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) { library.impl("batch_hard.native", &batch_hard); }

}  // namespace
}  // namespace ssl_kernels
