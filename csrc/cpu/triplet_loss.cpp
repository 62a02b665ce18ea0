// `triplet_loss.native`: the loss of the hardest triplets as one node of autograd on the CPU. At small
// batches the three dozen operators that it stands for, and their nodes, cost several times the search of
// `batch_hard`. On other devices and backends ssl_kernels/losses/triplet.py composes it of torch's operators.
//
//   With p and n the indices of `batch_hard`, u_k = x^_i - x^_k and d_k = |u_k|, or d_k = 1 - <x^_i, x^_k>
//   for "cosine":
//   loss_i = max(0, gap_i + margin) or softplus(gap_i),   gap_i = d_p - d_n;   0 where p or n is -1
//   with g_i the derivative by gap_i and w_p = g_i / d_p, w_n = -g_i / d_n, 0 where d is 0:
//   dx^_i += w_p u_p + w_n u_n,   dx^_p -= w_p u_p,   dx^_n -= w_n u_n
//   cosine: dx^_i += g_i (x^_n - x^_p),   dx^_p -= g_i x^_i,   dx^_n += g_i x^_i
// Traffic: the forward reads three rows for each anchor and keeps the normalised rows, the backward reads and
//   adds to three.
// Numerics: rows and differences in acc_t, distances and losses in double. The gradient is added up by one
//   thread, in the order of the anchors, so that it is the same bit for bit.
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>

#include <cmath>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "../ops/autograd.h"
#include "../ops/readable.h"
#include "rows.h"

namespace ssl_kernels::cpu {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct Options {
  bool soft, normalize, cosine;
  std::string reduction;
};

// What the forward keeps of each anchor: distances, and the derivative of its loss by the gap, 0 where it has
// no triplet.
struct Anchor {
  double to_positive, to_negative, slope;
};

// The loss and, in `anchor`, its derivative, as F.relu and F.logsigmoid have them at 0 and for NaN.
double hinge(double gap, double margin, bool soft, Anchor& anchor) {
  if (soft) {
    const double e = std::exp(-std::abs(gap));
    anchor.slope = (gap >= 0 ? 1 : e) / (1 + e);
    return std::isnan(gap) ? gap : std::max(gap, 0.) + std::log1p(e);
  }
  const double loss = gap + margin;
  anchor.slope = loss <= 0 ? 0 : 1;
  return loss <= 0 ? 0 : loss;
}

bool has_triplet(const int64_t* positive, const int64_t* negative, int64_t i) {
  return positive[i] >= 0 && negative[i] >= 0;
}

int64_t count_triplets(const Tensor& positive, const Tensor& negative) {
  int64_t count = 0;
  for (int64_t i = 0; i < positive.numel(); ++i)
    count += has_triplet(positive.const_data_ptr<int64_t>(), negative.const_data_ptr<int64_t>(), i);
  return std::max<int64_t>(count, 1);
}

template <class acc_t>
Anchor measured(const acc_t* x, int64_t d, int64_t i, int64_t p, int64_t n, bool cosine) {
  const auto& math = tile_math<acc_t>();
  const auto distance = [&](int64_t k) {
    return cosine ? 1 - math.dot(x + i * d, x + k * d, d)
                  : std::sqrt(math.difference_sums(x + i * d, x + k * d, d).squares);
  };
  return {distance(p), distance(n), 0};
}

struct Forward {
  Tensor loss, anchors;
  Rows rows;
};

template <class scalar_t, class acc_t>
Forward forward(const Tensor& embeddings, const Tensor& positive, const Tensor& negative, double margin,
                const Options& options) {
  const Rows rows = load_rows<scalar_t, acc_t>(embeddings, options.normalize);
  const int64_t n = embeddings.size(0), d = embeddings.size(1);
  const acc_t* x = rows.values.template const_data_ptr<acc_t>();
  const int64_t *p = positive.const_data_ptr<int64_t>(), *q = negative.const_data_ptr<int64_t>();
  const Tensor anchors = pooled({n, 3}, embeddings.options().dtype(at::kDouble));
  Anchor* anchor = reinterpret_cast<Anchor*>(anchors.mutable_data_ptr<double>());
  std::vector<double> losses(n);
  at::parallel_for(0, n, rows_per_task(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      anchor[i] = {};
      if (!has_triplet(p, q, i)) continue;
      anchor[i] = measured(x, d, i, p[i], q[i], options.cosine);
      losses[i] = hinge(anchor[i].to_positive - anchor[i].to_negative, margin, options.soft, anchor[i]);
    }
  });
  const auto acc = embeddings.options().dtype(c10::CppTypeToScalarType<acc_t>::value);
  if (options.reduction == "none") {
    const Tensor each = at::empty({n}, acc);
    std::copy(losses.begin(), losses.end(), each.template mutable_data_ptr<acc_t>());
    return {each, anchors, rows};
  }
  double sum = 0;
  for (double loss : losses) sum += loss;
  if (options.reduction == "mean") sum /= count_triplets(positive, negative);
  return {at::scalar_tensor(sum, acc), anchors, rows};
}

struct Gradients {
  Tensor by_embeddings;
  double by_margin;
};

template <class scalar_t, class acc_t>
Gradients backward(const Tensor& grad, const Rows& rows, const Tensor& anchors, const Tensor& positive,
                   const Tensor& negative, const Options& options) {
  const int64_t n = rows.values.size(0), d = rows.values.size(1);
  const Tensor gradient = pooled({n, d}, rows.values.options());
  acc_t* out = gradient.template mutable_data_ptr<acc_t>();
  std::fill_n(out, n * d, acc_t(0));
  const acc_t* x = rows.values.template const_data_ptr<acc_t>();
  const int64_t *p = positive.const_data_ptr<int64_t>(), *q = negative.const_data_ptr<int64_t>();
  const Anchor* anchor = reinterpret_cast<const Anchor*>(anchors.const_data_ptr<double>());
  const Tensor incoming = grad.to(at::kDouble).contiguous();
  const double* by_loss = incoming.const_data_ptr<double>();
  const int64_t count = options.reduction == "mean" ? count_triplets(positive, negative) : 1;
  const auto& math = tile_math<acc_t>();
  std::vector<acc_t> u(d);
  double by_margin = 0;
  const auto add = [&](int64_t row, const acc_t* values, double weight) {
    math.add_scaled(out + row * d, values, static_cast<acc_t>(weight), d);
  };
  const auto difference = [&](int64_t a, int64_t b) {
    std::copy_n(x + a * d, d, u.data());
    math.add_scaled(u.data(), x + b * d, acc_t(-1), d);
    return u.data();
  };
  for (int64_t i = 0; i < n; ++i) {
    const double g = anchor[i].slope * by_loss[options.reduction == "none" ? i : 0] / count;
    if (!has_triplet(p, q, i) || g == 0) continue;
    by_margin += g;
    if (options.cosine) {
      add(i, difference(q[i], p[i]), g);
      add(p[i], x + i * d, -g);
      add(q[i], x + i * d, g);
      continue;
    }
    const auto pull = [&](int64_t k, double weight) {
      const acc_t* along = difference(i, k);
      add(i, along, weight);
      add(k, along, -weight);
    };
    if (anchor[i].to_positive != 0) pull(p[i], g / anchor[i].to_positive);
    if (anchor[i].to_negative != 0) pull(q[i], -g / anchor[i].to_negative);
  }
  const auto storage = rows.values.options().dtype(c10::CppTypeToScalarType<scalar_t>::value);
  return {finish_gradient<scalar_t, acc_t>(gradient, rows, 1, storage).values, by_margin};
}

// The same by torch's operators, which differentiate twice.
Tensor composed(const Tensor& embeddings, const Tensor& positive, const Tensor& negative,
                const Tensor& margin, const Options& options) {
  const auto acc = embeddings.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor x = embeddings.to(acc);
  if (options.normalize)
    x = x.mul(at::linalg_vector_norm(x, 2, {{1}}, /*keepdim=*/true).clamp_min(kNormEpsilon).reciprocal());
  const Tensor complete = positive.ge(0).logical_and(negative.ge(0));
  const Tensor itself = at::arange(x.size(0), positive.options());  // at distance 0, whatever other rows hold
  const Tensor others = at::embedding(x, at::stack({positive, negative}).where(complete, itself));
  Tensor gap;
  if (options.cosine) {
    gap = x.mul(others.select(0, 1).sub(others.select(0, 0))).sum(1);
  } else {
    const Tensor squares = x.sub(others).square().sum(2), zero = squares.eq(0);
    const Tensor distances = squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0);
    gap = distances.select(0, 0).sub(distances.select(0, 1));
  }
  gap = gap.to(at::kDouble).masked_fill(complete.logical_not(), -std::numeric_limits<double>::infinity());
  const Tensor losses = options.soft ? at::log_sigmoid(gap.neg()).neg() : at::relu(gap.add(margin));
  if (options.reduction == "none") return losses.to(acc);
  const Tensor sum = losses.sum();
  return (options.reduction == "mean" ? sum.div(complete.sum().clamp_min(1)) : sum).to(acc);
}

struct TripletLoss : Function<TripletLoss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& embeddings, const Tensor& margin,
                        const Tensor& positive, const Tensor& negative, Options options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Forward made = run(embeddings, margin, positive, negative, options);
    const Rows& rows = made.rows;
    ctx->save_for_backward(
        savable({embeddings, margin, positive, negative, made.anchors, rows.values, rows.rnorm}));
    ctx->saved_data["soft"] = options.soft;
    ctx->saved_data["normalize"] = options.normalize;
    ctx->saved_data["cosine"] = options.cosine;
    ctx->saved_data["reduction"] = options.reduction;
    return made.loss;
  }

  static Forward run(const Tensor& embeddings, const Tensor& margin, const Tensor& positive,
                     const Tensor& negative, const Options& options) {
    const double by = margin.item<double>();
    return SSL_KERNELS_DISPATCH(embeddings.scalar_type(), "triplet_loss", [&] {
      return cpu::forward<scalar_t, acc_t>(embeddings, positive, negative, by, options);
    });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &embeddings = saved[0], &margin = saved[1], &positive = saved[2], &negative = saved[3];
    auto& data = ctx->saved_data;
    const Options options{data["soft"].toBool(), data["normalize"].toBool(), data["cosine"].toBool(),
                          data["reduction"].toStringRef()};
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    variable_list results(5);
    if (at::GradMode::is_enabled()) {
      variable_list inputs;
      for (const int k : {0, 1})
        if (ctx->needs_input_grad(k)) inputs.push_back(saved[k]);
      const Tensor loss = composed(embeddings, positive, negative, margin, options);
      const variable_list found = torch::autograd::grad({loss}, inputs, {grads[0]}, /*retain_graph=*/true,
                                                        /*create_graph=*/true, /*allow_unused=*/true);
      for (int k = 0, taken = 0; k < 2; ++k)
        if (ctx->needs_input_grad(k)) results[k] = found[taken++];
      return results;
    }
    const Rows rows{saved[5], saved[6], 0, {}};
    const Gradients made = SSL_KERNELS_DISPATCH(embeddings.scalar_type(), "triplet_loss", [&] {
      return cpu::backward<scalar_t, acc_t>(grads[0], rows, saved[4], positive, negative, options);
    });
    if (ctx->needs_input_grad(0)) results[0] = made.by_embeddings;
    if (ctx->needs_input_grad(1))
      results[1] = at::scalar_tensor(options.soft ? 0 : made.by_margin, margin.options());
    return results;
  }
};

Tensor triplet_loss(const Tensor& embeddings, const Tensor& labels, const Tensor& margin, bool soft,
                    bool normalize, std::string_view distance, std::string_view reduction) {
  TORCH_CHECK(can_be_read(embeddings) && can_be_read(labels) && can_be_read(margin) && margin.dim() == 0,
              "triplet_loss: embeddings, labels and a margin without dimensions must be on cpu");
  refuse_forward_mode("triplet_loss", {&embeddings, &margin});
  using Mine = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, bool, std::string_view);
  static const auto batch_hard = native_overload<Mine>("ssl_kernels::batch_hard");
  const Options options{soft, normalize, distance == "cosine", std::string(reduction)};
  Tensor positive, negative;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::tie(positive, negative) = batch_hard.call(embeddings, labels, normalize, distance);
  }
  if (!at::GradMode::is_enabled() || !(embeddings.requires_grad() || margin.requires_grad()))
    return TripletLoss::run(embeddings, margin, positive, negative, options).loss;
  refuse_torch_func("triplet_loss");
  return TripletLoss::apply(embeddings, margin, positive, negative, options);
}

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  // margin: () of any floating dtype, not read where the loss is soft.
  library.def(
      "triplet_loss.native(Tensor embeddings, Tensor labels, Tensor margin, bool soft, bool normalize, str "
      "distance, "
      "str reduction) -> Tensor",
      &triplet_loss);
}

}  // namespace
}  // namespace ssl_kernels::cpu
