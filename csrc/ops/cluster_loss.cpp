// `cluster_loss.native`: a reduced loss of views against a teacher's softmax, of few logits, with its
// derivative, as one node of autograd on the CPU. Its gradients are made in the forward, while the logits are
// there: nothing of the size of these is kept.
#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "../cpu/cluster_loss.h"
#include "autograd.h"
#include "operands.h"

namespace ssl_kernels {
namespace {

using PotentialsOp = Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
                            std::string_view);

const auto& potentials_op() {
  static const auto op = overload_of<PotentialsOp>("ssl_kernels::column_potentials", "");
  return op;
}

// The views of (V, N, D), or those that there are, with neighbouring elements in memory.
std::vector<Tensor> views_of(at::TensorList features) {
  std::vector<Tensor> views = features[0].dim() == 3 ? features[0].unbind(0) : features.vec();
  for (Tensor& view : views) view = with_neighbours(view);
  return views;
}

// What is no operand of the node.
struct Options {
  double steepness;
  int64_t iterations;
  std::vector<int64_t> assign, pairs;
  bool normalize_rows, normalize_columns, less_entropy;
  std::string group, caller;
  std::vector<Tensor> teacher;  // its views and last its prototypes, or none
  Tensor bias;
};

struct ClusterLoss : Node<ClusterLoss> {
  static Tensor forward(AutogradContext* ctx, at::TensorList features, const Tensor& prototypes,
                        const Tensor& scale, const Tensor& weights, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    cpu::ClusterCall call = {views_of(features),
                             prototypes,
                             scale.item<double>(),
                             options.steepness,
                             options.pairs,
                             options.normalize_rows,
                             options.normalize_columns,
                             options.less_entropy};
    if (options.teacher.empty()) {
      call.assign = options.assign;
      call.iterations = options.iterations;
      call.potentials_only = !options.group.empty();
      call.potentials = [&](const Tensor& logits) {
        return potentials_op().call(logits, std::nullopt, std::nullopt, options.iterations, options.group);
      };
    } else {
      call.teacher = views_of(at::TensorList(options.teacher).slice(0, options.teacher.size() - 1));
      call.teacher_prototypes = options.teacher.back();
      call.bias = options.bias;
    }
    bool rows_need_grad = false;
    if (ctx)
      for (const Tensor& each : features) rows_need_grad |= each.requires_grad();
    const auto made = cpu::cluster_loss(call, weights, rows_need_grad, ctx && prototypes.requires_grad(),
                                     ctx && scale.requires_grad());
    if (ctx) {
      variable_list kept = features.vec();
      kept.insert(kept.end(), {prototypes, scale, made.grad_rows, made.grad_columns,
                               weights.requires_grad() ? made.losses : Tensor()});
      ctx->save_for_backward(savable(kept));
      ctx->saved_data["grad_scale"] = made.grad_scale;
      ctx->saved_data["caller"] = options.caller;
    }
    const auto acc = accumulation_type(prototypes);
    return made.losses.mul(weights).sum().to(acc);
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    const variable_list kept = ctx->get_saved_variables();
    const size_t count = kept.size() - 5;
    const Tensor &prototypes = kept[count], &scale = kept[count + 1], &by_rows = kept[count + 2],
                 &by_columns = kept[count + 3], &losses = kept[count + 4];
    variable_list made(count + 3);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const double grad = grads[0].item<double>();
      if (by_rows.defined()) {
        const Tensor of_rows = made_weighted(by_rows, grad).to(kept[0].scalar_type());
        const int64_t n = of_rows.size(0) / static_cast<int64_t>(count);
        for (size_t v = 0; v < count; ++v)
          if (ctx->needs_input_grad(v))
            made[v] = of_rows.narrow(0, static_cast<int64_t>(v) * n, n).view(kept[v].sizes());
      }
      if (by_columns.defined()) made[count] = made_weighted(by_columns, grad).to(prototypes.scalar_type());
      if (ctx->needs_input_grad(count + 1))
        made[count + 1] =
            at::scalar_tensor(ctx->saved_data["grad_scale"].toDouble() * grad, scale.options());
      if (losses.defined()) made[count + 2] = losses.mul(grad);
    }
    variable_list origins(kept.begin(), kept.begin() + static_cast<int64_t>(count) + 2);
    origins.push_back(grads[0]);
    made.resize(count + 4);
    return without_second_derivative(ctx->saved_data["caller"].toStringRef().c_str(), made, origins);
  }
};

Tensor cluster_loss(at::TensorList features, const Tensor& prototypes, const Tensor& scale,
                    const Tensor& weights, at::TensorList teacher, const OptionalTensor& bias,
                    double steepness, int64_t iterations, at::IntArrayRef assign, at::IntArrayRef pairs,
                    bool normalize_rows, bool normalize_columns, bool less_entropy, std::string_view group,
                    std::string_view caller) {
  TORCH_CHECK(!features.empty() && prototypes.dim() == 2 && scale.numel() == 1,
              "cluster_loss: features and prototypes must be rows, scale a number");
  TORCH_CHECK(features.size() == 1 || features[0].dim() == 2,
              "cluster_loss: features must be one tensor (V, N, D) or several (N, D), got ",
              features[0].sizes());
  const Options options = {steepness,       iterations,        assign.vec(),
                           pairs.vec(),     normalize_rows,    normalize_columns,
                           less_entropy,    std::string(group), std::string(caller),
                           teacher.vec(),   or_undefined(bias)};
  const char* const name = options.caller.c_str();
  bool differentiate = prototypes.requires_grad() || scale.requires_grad() || weights.requires_grad();
  for (const Tensor& each : features) {
    TORCH_CHECK(can_be_read(each) && each.dim() >= 2 && each.sizes() == features[0].sizes() &&
                    each.numel() > 0 && each.size(-1) == prototypes.size(1) &&
                    each.scalar_type() == prototypes.scalar_type(),
                "cluster_loss: features must be on cpu, of one shape, the width and dtype of prototypes");
    refuse_forward_mode(name, {&each, &prototypes, &scale, &weights});
    differentiate |= each.requires_grad();
  }
  const int64_t n = features[0].size(-2), k = prototypes.size(0);
  const bool is_whole = features.size() == 1 && features[0].dim() == 3;
  const int64_t views = is_whole ? features[0].size(0) : static_cast<int64_t>(features.size());
  TORCH_CHECK(can_be_read(prototypes) && can_be_read(scale) && can_be_read(weights) && weights.dim() == 1 &&
                  weights.size(0) == n && weights.scalar_type() == at::kDouble,
              "cluster_loss: prototypes, scale and weights must be on cpu, weights float64 of shape (N,)");
  const auto acc = accumulation_type(prototypes);
  int64_t teachers = static_cast<int64_t>(assign.size());
  if (teacher.empty()) {
    TORCH_CHECK(iterations > 0, "cluster_loss: iterations must be at least 1");
    for (const int64_t a : assign)
      TORCH_CHECK(a >= 0 && a < views, "cluster_loss: assign must be of views that there are, got ", assign);
  } else {
    teachers = static_cast<int64_t>(teacher.size()) - 1;
    for (int64_t a = 0; a <= teachers; ++a)
      TORCH_CHECK(can_be_read(teacher[a]) && teacher[a].dim() == 2 && teacher[a].scalar_type() == acc &&
                      teacher[a].size(0) == (a == teachers ? k : n) &&
                      teacher[a].size(1) == teacher[0].size(1) && teacher[a].numel() > 0,
                  "cluster_loss: teacher must hold views (N, T) and prototypes (K, T), of the dtype of sums");
    TORCH_CHECK(!bias || (can_be_read(*bias) && bias->dim() == 1 && bias->size(0) == k &&
                          bias->scalar_type() == acc && bias->is_contiguous()),
                "cluster_loss: bias must have shape (K,), in the accumulation dtype");
  }
  TORCH_CHECK(!pairs.empty() && pairs.size() % 2 == 0, "cluster_loss: pairs must have two numbers each");
  for (size_t i = 0; i < pairs.size(); ++i)
    TORCH_CHECK(pairs[i] >= 0 && pairs[i] < (i % 2 ? views : teachers),
                "cluster_loss: pairs must be of views that there are, got ", pairs);
  return as_node<ClusterLoss>(name, differentiate, features, prototypes, scale, weights, options);
}

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  // features: one tensor (V, N, D), or V of (N, D). teacher: none for SwAV, or A views and the prototypes.
  // weights: (N,) float64 of what is added up. caller: named in errors.
  library.def(
      "cluster_loss.native(Tensor[] features, Tensor prototypes, Tensor scale, Tensor weights,"
      " Tensor[] teacher, Tensor? bias, float steepness, int iterations, int[] assign, int[] pairs,"
      " bool normalize_rows, bool normalize_columns, bool less_entropy, str group, str caller) -> Tensor",
      &cluster_loss);
}

}  // namespace
}  // namespace ssl_kernels
