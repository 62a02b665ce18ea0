// Registers the CPU kernel as `patch_errors_fwd.native` and `patch_errors_bwd.native`. The schema is defined in
// ssl_kernels/ops/patch_errors.py, so that it exists where nothing was compiled.
#include "../cpu/patch_errors.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>

namespace ssl_kernels {
namespace {

using at::Tensor;

at::ScalarType accumulation_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_patches(const Tensor& prediction, const Tensor& target) {
  TORCH_CHECK(prediction.dim() == 2 && prediction.size(0) > 0 && prediction.size(1) > 0 &&
                  target.sizes() == prediction.sizes() && target.device() == prediction.device(),
              "patch_errors: prediction and target must have the same shape (P, C) with P, C >= 1, got ",
              prediction.sizes(), " and ", target.sizes());
  TORCH_CHECK(accumulation_type(prediction) == accumulation_type(target),
              "patch_errors: target must be float64 where prediction is, got ", target.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> patch_errors_fwd(const Tensor& prediction, const Tensor& target, const Tensor& eps,
                                                    bool normalize) {
  check_patches(prediction, target);
  TORCH_CHECK(eps.numel() == 1, "patch_errors: eps must have one element, got ", eps.numel());
  TORCH_CHECK(!normalize || prediction.size(1) > 1, "patch_errors: C must be at least 2, got ", prediction.size(1));
  return cpu::patch_errors_fwd(prediction, target, eps.item<double>(), normalize);
}

Tensor patch_errors_bwd(const Tensor& grad, const Tensor& prediction, const Tensor& target, const Tensor& mean,
                        const Tensor& rstd) {
  check_patches(prediction, target);
  const auto acc = accumulation_type(prediction);
  const int64_t n = prediction.size(0);
  TORCH_CHECK(grad.dim() == 1 && grad.size(0) == n && grad.scalar_type() == acc, "patch_errors: grad must have shape (P,)");
  for (const Tensor& kept : {mean, rstd})
    TORCH_CHECK((kept.numel() == 0 || kept.numel() == n) && kept.is_contiguous() && kept.scalar_type() == acc &&
                    kept.numel() == mean.numel(),
                "patch_errors: mean and rstd must be what the forward made");
  return cpu::patch_errors_bwd(grad, prediction, target, mean, rstd);
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("patch_errors_fwd.native", &patch_errors_fwd);
  library.impl("patch_errors_bwd.native", &patch_errors_bwd);
}

}  // namespace
}  // namespace ssl_kernels
