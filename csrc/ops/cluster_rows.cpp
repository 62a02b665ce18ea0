// Registers the CPU kernels as `cluster_rows_.native`, `view_cross_entropy_fwd.native` and
// `view_cross_entropy_bwd.native`, whose schemas are defined in ssl_kernels/ops/cluster_cross_entropy.py and
// view_cross_entropy.py, so that they exist where nothing was compiled; and `view_loss.native`, a reduced
// loss of views with its derivative as one node of autograd: of few logits the operators around the kernel
// cost more than it does.
#include "../cpu/cluster_rows.h"

#include <ATen/ops/scalar_tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "autograd.h"
#include "operands.h"

namespace ssl_kernels {
namespace {

void check_pairs(at::IntArrayRef pairs, int64_t teachers, int64_t views) {
  TORCH_CHECK(pairs.size() % 2 == 0, "pairs must have two numbers each, got ", pairs.size(), " numbers");
  for (size_t i = 0; i < pairs.size(); ++i)
    TORCH_CHECK(pairs[i] >= 0 && pairs[i] < (i % 2 ? views : teachers),
                "pairs must be of views that there are, got ", pairs);
}

Tensor cluster_rows_(Tensor& logits, Tensor& codes, const std::optional<Tensor>& biases,
                     at::IntArrayRef pairs, bool differentiate, bool less_entropy) {
  TORCH_CHECK(logits.dim() == 3 && codes.dim() == 3 && logits.size(1) == codes.size(1) &&
                  logits.size(2) == codes.size(2),
              "cluster_rows_: logits and codes must have shapes (V, N, K) and (A, N, K), got ",
              logits.sizes(), " and ", codes.sizes());
  const auto dtype = logits.scalar_type();
  TORCH_CHECK((dtype == at::kFloat || dtype == at::kDouble) && codes.scalar_type() == dtype &&
                  logits.is_contiguous() && codes.is_contiguous(),
              "cluster_rows_: logits and codes must be contiguous, float32 or float64");
  if (biases)
    TORCH_CHECK(biases->dim() == 2 && (biases->size(0) == 1 || biases->size(0) == codes.size(0)) &&
                    biases->size(1) == codes.size(2) && biases->scalar_type() == dtype &&
                    biases->is_contiguous(),
                "cluster_rows_: biases must have shape (A, K) or (1, K) and the dtype of logits, got ",
                biases->sizes());
  check_pairs(pairs, codes.size(0), logits.size(0));
  return cpu::cluster_rows_(logits, codes, biases, pairs, differentiate, less_entropy);
}

cpu::ViewLogits checked(at::TensorList student, at::TensorList teacher, double scale, double steepness,
                        const std::optional<Tensor>& bias, at::IntArrayRef pairs) {
  TORCH_CHECK(!student.empty() && !teacher.empty() && student[0].dim() == 2,
              "view_cross_entropy: student and teacher must hold tensors (N, K)");
  const bool wide = student[0].scalar_type() == at::kDouble;
  for (const at::TensorList views : {student, teacher})
    for (const Tensor& view : views)
      TORCH_CHECK(view.sizes() == student[0].sizes() && (view.scalar_type() == at::kDouble) == wide,
                  "view_cross_entropy: views must have one shape, and float64 goes with float64, got ",
                  view.sizes());
  for (const Tensor& view : student)
    TORCH_CHECK(view.scalar_type() == student[0].scalar_type(),
                "view_cross_entropy: student must have one dtype");
  check_pairs(pairs, static_cast<int64_t>(teacher.size()), static_cast<int64_t>(student.size()));
  Tensor added;
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == student[0].size(1),
                "view_cross_entropy: bias must have shape (K,)");
    added = bias->to(wide ? at::kDouble : at::kFloat).contiguous();
  }
  return {student.vec(), teacher.vec(), scale, steepness, added, pairs.vec()};
}

double number_of(const Tensor& x) {
  TORCH_CHECK(x.numel() == 1, "view_cross_entropy: scale and steepness must have one element");
  return x.item<double>();
}

Tensor view_cross_entropy_fwd(at::TensorList student, at::TensorList teacher, const Tensor& scale,
                              const Tensor& steepness, const std::optional<Tensor>& bias,
                              at::IntArrayRef pairs) {
  const double by_scale = number_of(scale), by_steepness = number_of(steepness);
  return cpu::view_cross_entropy_fwd(checked(student, teacher, by_scale, by_steepness, bias, pairs));
}

std::vector<Tensor> view_cross_entropy_bwd(const Tensor& weights, at::TensorList student,
                                           at::TensorList teacher, const Tensor& scale,
                                           const Tensor& steepness, const std::optional<Tensor>& bias,
                                           at::IntArrayRef pairs, at::IntArrayRef needs) {
  const auto views = checked(student, teacher, number_of(scale), number_of(steepness), bias, pairs);
  TORCH_CHECK(
      weights.dim() == 1 && weights.size(0) == student[0].size(0) && weights.scalar_type() == at::kDouble,
      "view_cross_entropy: weights must be float64 of shape (N,)");
  TORCH_CHECK(needs.size() == student.size() + 1,
              "view_cross_entropy: needs must tell of each view and of scale");
  return cpu::view_cross_entropy_bwd(weights, views, std::vector<bool>(needs.begin(), needs.end()));
}

struct ViewLoss : Node<ViewLoss> {
  static Tensor forward(AutogradContext* ctx, at::TensorList student, at::TensorList teacher, double scale,
                        double steepness, const OptionalTensor& bias, std::vector<int64_t> pairs, bool mean) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto views = checked(student, teacher, scale, steepness, bias, pairs);
    const Tensor losses = cpu::view_cross_entropy_fwd(views);
    const double* loss = losses.const_data_ptr<double>();
    const int64_t n = losses.size(0);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += loss[i] < 0 ? 0 : loss[i];  // below 0 by rounding; NaN stays
    const double share = 2.0 / static_cast<double>(mean ? pairs.size() * n : pairs.size());
    if (ctx) {
      variable_list kept = student.vec();
      kept.insert(kept.end(), teacher.begin(), teacher.end());
      kept.push_back(views.bias);
      ctx->save_for_backward(savable(kept));
      ctx->saved_data["students"] = static_cast<int64_t>(student.size());
      ctx->saved_data["scale"] = scale;
      ctx->saved_data["steepness"] = steepness;
      ctx->saved_data["pairs"] = pairs;
      ctx->saved_data["share"] = share;
    }
    const auto acc = accumulation_type(student[0]);
    return at::scalar_tensor(sum * share, losses.options().dtype(acc));
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    variable_list kept = ctx->get_saved_variables();
    const Tensor bias = kept.back();
    kept.pop_back();
    const auto students = kept.begin() + ctx->saved_data["students"].toInt();
    const cpu::ViewLogits views = {{kept.begin(), students},
                                   {students, kept.end()},
                                   ctx->saved_data["scale"].toDouble(),
                                   ctx->saved_data["steepness"].toDouble(),
                                   bias,
                                   ctx->saved_data["pairs"].toIntVector()};
    std::vector<bool> needs;
    for (size_t v = 0; v < views.student.size(); ++v) needs.push_back(ctx->needs_input_grad(v));
    needs.push_back(false);
    variable_list made;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const Tensor weight = grads[0].to(at::kDouble).mul(ctx->saved_data["share"].toDouble());
      made = cpu::view_cross_entropy_bwd(weight.expand({views.student[0].size(0)}), views, needs);
    }
    for (size_t v = 0; v < made.size(); ++v)
      if (!needs[v]) made[v] = Tensor();
    made.resize(kept.size() + 5);
    variable_list origins = views.student;
    origins.push_back(grads[0]);
    return without_second_derivative("dino_loss", made, origins);
  }
};

Tensor view_loss(at::TensorList student, at::TensorList teacher, double scale, double steepness,
                 const OptionalTensor& bias, at::IntArrayRef pairs, bool mean) {
  bool differentiate = false;
  for (const at::TensorList views : {student, teacher})
    for (const Tensor& view : views) {
      TORCH_CHECK(can_be_read(view) && view.dim() == 2, "view_loss: student and teacher must be on cpu");
      refuse_forward_mode("dino_loss", {&view});
    }
  for (const Tensor& view : student) differentiate |= view.requires_grad();
  return as_node<ViewLoss>("dino_loss", differentiate, student, teacher, scale, steepness, bias, pairs.vec(),
                           mean);
}

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  library.def(
      "view_loss.native(Tensor[] student, Tensor[] teacher, float scale, float steepness, Tensor? bias,"
      " int[] pairs, bool mean) -> Tensor",
      &view_loss);
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("cluster_rows_.native", &cluster_rows_);
  library.impl("view_cross_entropy_fwd.native", &view_cross_entropy_fwd);
  library.impl("view_cross_entropy_bwd.native", &view_cross_entropy_bwd);
}

}  // namespace
}  // namespace ssl_kernels
