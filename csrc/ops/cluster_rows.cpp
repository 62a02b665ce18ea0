// Registers the CPU kernels as `cluster_rows_.native`, `view_cross_entropy_fwd.native` and `view_cross_entropy_bwd.native`.
// The schemas are defined in ssl_kernels/ops/cluster_cross_entropy.py and view_cross_entropy.py, so that they exist where
// nothing was compiled.
#include "../cpu/cluster_rows.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <optional>
#include <vector>

namespace ssl_kernels {
namespace {

using at::Tensor;

void check_pairs(at::IntArrayRef pairs, int64_t teachers, int64_t views) {
  TORCH_CHECK(pairs.size() % 2 == 0, "pairs must have two numbers each, got ", pairs.size(), " numbers");
  for (size_t i = 0; i < pairs.size(); ++i)
    TORCH_CHECK(pairs[i] >= 0 && pairs[i] < (i % 2 ? views : teachers), "pairs must be of views that there are, got ", pairs);
}

Tensor cluster_rows_(Tensor& logits, Tensor& codes, const std::optional<Tensor>& biases, at::IntArrayRef pairs,
                     bool differentiate) {
  TORCH_CHECK(logits.dim() == 3 && codes.dim() == 3 && logits.size(1) == codes.size(1) && logits.size(2) == codes.size(2),
              "cluster_rows_: logits and codes must have shapes (V, N, K) and (A, N, K), got ", logits.sizes(), " and ",
              codes.sizes());
  const auto dtype = logits.scalar_type();
  TORCH_CHECK((dtype == at::kFloat || dtype == at::kDouble) && codes.scalar_type() == dtype && logits.is_contiguous() &&
                  codes.is_contiguous(),
              "cluster_rows_: logits and codes must be contiguous, float32 or float64");
  if (biases)
    TORCH_CHECK(biases->dim() == 2 && (biases->size(0) == 1 || biases->size(0) == codes.size(0)) &&
                    biases->size(1) == codes.size(2) && biases->scalar_type() == dtype && biases->is_contiguous(),
                "cluster_rows_: biases must have shape (A, K) or (1, K) and the dtype of logits, got ", biases->sizes());
  check_pairs(pairs, codes.size(0), logits.size(0));
  return cpu::cluster_rows_(logits, codes, biases, pairs, differentiate);
}

cpu::ViewLogits checked(at::TensorList student, at::TensorList teacher, const Tensor& scale, const Tensor& steepness,
                        const std::optional<Tensor>& bias, at::IntArrayRef pairs) {
  TORCH_CHECK(!student.empty() && !teacher.empty() && student[0].dim() == 2,
              "view_cross_entropy: student and teacher must hold tensors (N, K)");
  const bool wide = student[0].scalar_type() == at::kDouble;
  for (const at::TensorList views : {student, teacher})
    for (const Tensor& view : views)
      TORCH_CHECK(view.sizes() == student[0].sizes() && (view.scalar_type() == at::kDouble) == wide,
                  "view_cross_entropy: views must have one shape, and float64 goes with float64, got ", view.sizes());
  for (const Tensor& view : student)
    TORCH_CHECK(view.scalar_type() == student[0].scalar_type(), "view_cross_entropy: student must have one dtype");
  check_pairs(pairs, static_cast<int64_t>(teacher.size()), static_cast<int64_t>(student.size()));
  TORCH_CHECK(scale.numel() == 1 && steepness.numel() == 1, "view_cross_entropy: scale and steepness must have one element");
  Tensor added;
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == student[0].size(1), "view_cross_entropy: bias must have shape (K,)");
    added = bias->to(wide ? at::kDouble : at::kFloat).contiguous();
  }
  return {student.vec(), teacher.vec(), scale.item<double>(), steepness.item<double>(), added, pairs.vec()};
}

Tensor view_cross_entropy_fwd(at::TensorList student, at::TensorList teacher, const Tensor& scale, const Tensor& steepness,
                              const std::optional<Tensor>& bias, at::IntArrayRef pairs) {
  return cpu::view_cross_entropy_fwd(checked(student, teacher, scale, steepness, bias, pairs));
}

std::vector<Tensor> view_cross_entropy_bwd(const Tensor& weights, at::TensorList student, at::TensorList teacher,
                                           const Tensor& scale, const Tensor& steepness, const std::optional<Tensor>& bias,
                                           at::IntArrayRef pairs, at::IntArrayRef needs) {
  const auto views = checked(student, teacher, scale, steepness, bias, pairs);
  TORCH_CHECK(weights.dim() == 1 && weights.size(0) == student[0].size(0) && weights.scalar_type() == at::kDouble,
              "view_cross_entropy: weights must be float64 of shape (N,)");
  TORCH_CHECK(needs.size() == student.size() + 1, "view_cross_entropy: needs must tell of each view and of scale");
  return cpu::view_cross_entropy_bwd(weights, views, std::vector<bool>(needs.begin(), needs.end()));
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("cluster_rows_.native", &cluster_rows_);
  library.impl("view_cross_entropy_fwd.native", &view_cross_entropy_fwd);
  library.impl("view_cross_entropy_bwd.native", &view_cross_entropy_bwd);
}

}  // namespace
}  // namespace ssl_kernels
