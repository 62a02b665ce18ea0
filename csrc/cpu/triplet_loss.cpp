// `triplet_loss.native`: the loss of the hardest triplets as one node of autograd on the CPU, and
// `triplet_loss.given` that of triplets of indices. At small batches the three dozen operators that they
// stand for, and their nodes, cost several times the search of `batch_hard`. On other devices and backends
// ssl_kernels/losses/triplet.py composes the first of torch's operators, and
// ssl_kernels/adapters/pytorch_metric_learning.py the second.
//
//   With i an anchor, p and n the indices of `batch_hard` or those given, u_k = x^_i - x^_k and d_k = |u_k|,
//   or d_k = 1 - <x^_i, x^_k> for "cosine":
//   loss_i = max(0, gap_i + margin) or softplus(gap_i),   gap_i = d_p - d_n;   0 where p or n is -1
//   with g_i the derivative by gap_i and w_p = g_i / d_p, w_n = -g_i / d_n, 0 where d is 0:
//   dx^_i += w_p u_p + w_n u_n,   dx^_p -= w_p u_p,   dx^_n -= w_n u_n
//   cosine: dx^_i += g_i (x^_n - x^_p),   dx^_p -= g_i x^_i,   dx^_n += g_i x^_i
// Traffic: the forward reads three rows for each triplet and keeps the normalised rows, the backward reads
//   and adds to three.
// Numerics: rows and differences in acc_t, distances and losses in double. The gradient is added up by one
//   thread, in the order of the triplets, so that it is the same bit for bit.
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

#include "rows.h"
#include "triplet.h"

namespace ssl_kernels::cpu {
namespace {

struct Options {
  bool soft, normalize, cosine;
  std::string reduction;
};

// Indices of rows, (T,) int64 each and contiguous. Without anchors, those of the first T rows, which have no
// triplet where an index is -1.
struct Triplets {
  Tensor anchor, positive, negative;

  int64_t count() const { return positive.numel(); }
  int64_t anchor_of(int64_t t) const { return anchor.defined() ? anchor.const_data_ptr<int64_t>()[t] : t; }
  int64_t positive_of(int64_t t) const { return positive.const_data_ptr<int64_t>()[t]; }
  int64_t negative_of(int64_t t) const { return negative.const_data_ptr<int64_t>()[t]; }
  bool has(int64_t t) const { return positive_of(t) >= 0 && negative_of(t) >= 0; }
  int64_t averaged() const {
    int64_t found = 0;
    for (int64_t t = 0; t < count(); ++t) found += has(t);
    return std::max<int64_t>(found, 1);
  }
};

// What the forward keeps of each triplet: distances, and the derivative of its loss by the gap, 0 where it is
// none.
struct Measured {
  double to_positive, to_negative, slope;
};

template <class acc_t>
Measured measured(const acc_t* x, int64_t d, int64_t i, int64_t p, int64_t n, bool cosine) {
  const auto& math = tile_math<acc_t>();
  const auto distance = [&](int64_t k) {
    return cosine ? 1 - math.dot(x + i * d, x + k * d, d)
                  : std::sqrt(math.difference_sums(x + i * d, x + k * d, d).squares);
  };
  return {distance(p), distance(n), 0};
}

struct Forward {
  Tensor loss, measured;
  Rows rows;
};

template <class scalar_t, class acc_t>
Forward forward(const Tensor& embeddings, const Triplets& triplets, double margin, const Options& options) {
  const Rows rows = load_rows<scalar_t, acc_t>(embeddings, options.normalize);
  const int64_t n = triplets.count(), d = embeddings.size(1);
  const acc_t* x = rows.values.template const_data_ptr<acc_t>();
  const Tensor kept = pooled({n, 3}, embeddings.options().dtype(at::kDouble));
  Measured* each = reinterpret_cast<Measured*>(kept.mutable_data_ptr<double>());
  std::vector<double> losses(n);
  at::parallel_for(0, n, rows_per_task(d), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      each[t] = {};
      if (!triplets.has(t)) continue;
      each[t] = measured(x, d, triplets.anchor_of(t), triplets.positive_of(t), triplets.negative_of(t),
                         options.cosine);
      const auto made = loss_of_gap(each[t].to_positive - each[t].to_negative, margin, options.soft);
      losses[t] = made.loss, each[t].slope = made.slope;
    }
  });
  const auto acc = embeddings.options().dtype(c10::CppTypeToScalarType<acc_t>::value);
  if (options.reduction == "none") {
    const Tensor of_triplets = at::empty({n}, acc);
    std::copy(losses.begin(), losses.end(), of_triplets.template mutable_data_ptr<acc_t>());
    return {of_triplets, kept, rows};
  }
  double sum = 0;
  for (double loss : losses) sum += loss;
  if (options.reduction == "mean") sum /= triplets.averaged();
  return {at::scalar_tensor(sum, acc), kept, rows};
}

struct Gradients {
  Tensor by_embeddings;
  double by_margin;
};

template <class scalar_t, class acc_t>
Gradients backward(const Tensor& grad, const Rows& rows, const Tensor& kept, const Triplets& triplets,
                   const Options& options) {
  const int64_t n = rows.values.size(0), d = rows.values.size(1);
  const Tensor gradient = pooled({n, d}, rows.values.options());
  acc_t* out = gradient.template mutable_data_ptr<acc_t>();
  std::fill_n(out, n * d, acc_t(0));
  const acc_t* x = rows.values.template const_data_ptr<acc_t>();
  const Measured* each = reinterpret_cast<const Measured*>(kept.const_data_ptr<double>());
  const Tensor incoming = grad.to(at::kDouble).contiguous();
  const double* by_loss = incoming.const_data_ptr<double>();
  const int64_t count = options.reduction == "mean" ? triplets.averaged() : 1;
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
  for (int64_t t = 0; t < triplets.count(); ++t) {
    const double g = each[t].slope * by_loss[options.reduction == "none" ? t : 0] / count;
    if (!triplets.has(t) || g == 0) continue;
    const int64_t i = triplets.anchor_of(t), p = triplets.positive_of(t), q = triplets.negative_of(t);
    by_margin += g;
    if (options.cosine) {
      add(i, difference(q, p), g);
      add(p, x + i * d, -g);
      add(q, x + i * d, g);
      continue;
    }
    const auto pull = [&](int64_t k, double weight) {
      const acc_t* along = difference(i, k);
      add(i, along, weight);
      add(k, along, -weight);
    };
    if (each[t].to_positive != 0) pull(p, g / each[t].to_positive);
    if (each[t].to_negative != 0) pull(q, -g / each[t].to_negative);
  }
  const auto storage = rows.values.options().dtype(c10::CppTypeToScalarType<scalar_t>::value);
  return {finish_gradient<scalar_t, acc_t>(gradient, rows, 1, storage).values, by_margin};
}

// The same by torch's operators, which differentiate twice.
Tensor composed(const Tensor& embeddings, const Triplets& triplets, const Tensor& margin,
                const Options& options) {
  const auto acc = accumulation_type(embeddings);
  Tensor x = embeddings.to(acc);
  if (options.normalize)
    x = x.mul(at::linalg_vector_norm(x, 2, {{1}}, /*keepdim=*/true).clamp_min(kNormEpsilon).reciprocal());
  const Tensor &positive = triplets.positive, &negative = triplets.negative;
  const Tensor complete = positive.ge(0).logical_and(negative.ge(0));
  // An anchor is at distance 0 of itself, whatever other rows hold.
  const Tensor itself =
      triplets.anchor.defined() ? triplets.anchor : at::arange(x.size(0), positive.options());
  const Tensor others = at::embedding(x, at::stack({positive, negative}).where(complete, itself));
  if (triplets.anchor.defined()) x = at::embedding(x, triplets.anchor);
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

struct TripletLoss : Node<TripletLoss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& embeddings, const Tensor& margin,
                        const Triplets& triplets, Options options) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Forward made = run(embeddings, margin, triplets, options);
    const Rows& rows = made.rows;
    ctx->save_for_backward(savable({embeddings, margin, triplets.anchor, triplets.positive,
                                    triplets.negative, made.measured, rows.values, rows.rnorm}));
    ctx->saved_data["soft"] = options.soft;
    ctx->saved_data["normalize"] = options.normalize;
    ctx->saved_data["cosine"] = options.cosine;
    ctx->saved_data["reduction"] = options.reduction;
    return made.loss;
  }

  static Forward run(const Tensor& embeddings, const Tensor& margin, const Triplets& triplets,
                     const Options& options) {
    const double by = margin.item<double>();
    return SSL_KERNELS_DISPATCH(embeddings.scalar_type(), "triplet_loss", [&] {
      return cpu::forward<scalar_t, acc_t>(embeddings, triplets, by, options);
    });
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &embeddings = saved[0], &margin = saved[1];
    const Triplets triplets{saved[2], saved[3], saved[4]};
    auto& data = ctx->saved_data;
    const Options options{data["soft"].toBool(), data["normalize"].toBool(), data["cosine"].toBool(),
                          data["reduction"].toStringRef()};
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    variable_list results(4);
    if (at::GradMode::is_enabled()) {
      variable_list inputs;
      for (const int k : {0, 1})
        if (ctx->needs_input_grad(k)) inputs.push_back(saved[k]);
      const Tensor loss = composed(embeddings, triplets, margin, options);
      const variable_list found = torch::autograd::grad({loss}, inputs, {grads[0]}, /*retain_graph=*/true,
                                                        /*create_graph=*/true, /*allow_unused=*/true);
      for (int k = 0, taken = 0; k < 2; ++k)
        if (ctx->needs_input_grad(k)) results[k] = found[taken++];
      return results;
    }
    const Rows rows{saved[6], saved[7], 0, {}};
    const Gradients made = SSL_KERNELS_DISPATCH(embeddings.scalar_type(), "triplet_loss", [&] {
      return cpu::backward<scalar_t, acc_t>(grads[0], rows, saved[5], triplets, options);
    });
    if (ctx->needs_input_grad(0)) results[0] = made.by_embeddings;
    if (ctx->needs_input_grad(1))
      results[1] = at::scalar_tensor(options.soft ? 0 : made.by_margin, margin.options());
    return results;
  }
};

Tensor differentiated(const Tensor& embeddings, const Tensor& margin, const Triplets& triplets,
                      const Options& options) {
  if (!at::GradMode::is_enabled() || !(embeddings.requires_grad() || margin.requires_grad()))
    return TripletLoss::run(embeddings, margin, triplets, options).loss;
  refuse_torch_func("triplet_loss");
  return TripletLoss::apply(embeddings, margin, triplets, options);
}

Tensor triplet_loss(const Tensor& embeddings, const Tensor& labels, const Tensor& margin, bool soft,
                    bool normalize, std::string_view distance, std::string_view reduction) {
  check_triplets_readable(embeddings, {&labels}, margin);
  using Mine = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, bool, std::string_view);
  static const auto batch_hard = native_overload<Mine>("ssl_kernels::batch_hard");
  Triplets triplets;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::tie(triplets.positive, triplets.negative) = batch_hard.call(embeddings, labels, normalize, distance);
  }
  return differentiated(embeddings, margin, triplets,
                        {soft, normalize, distance == "cosine", std::string(reduction)});
}

// Indices counted from 0, of which negative ones count from the end.
Tensor checked_indices(const Tensor& indices, int64_t n) {
  const Tensor counted = at::empty(indices.sizes(), indices.options().dtype(at::kLong)).copy_(indices);
  int64_t* index = counted.mutable_data_ptr<int64_t>();
  for (int64_t t = 0; t < counted.numel(); ++t) {
    TORCH_CHECK_INDEX(index[t] >= -n && index[t] < n, "triplet_loss: indices must be in [-", n, ", ", n,
                      "), got ", index[t]);
    if (index[t] < 0) index[t] += n;
  }
  return counted;
}

Tensor given_triplets(const Tensor& embeddings, const Tensor& anchor, const Tensor& positive,
                      const Tensor& negative, const Tensor& margin, bool normalize, std::string_view distance,
                      std::string_view reduction) {
  check_triplets_readable(embeddings, {&anchor, &positive, &negative}, margin);
  TORCH_CHECK(embeddings.dim() == 2 && embeddings.size(1) > 0 && anchor.dim() == 1 && anchor.numel() > 0 &&
                  positive.sizes() == anchor.sizes() && negative.sizes() == anchor.sizes(),
              "triplet_loss: embeddings must have shape (N, D), and anchor, positive and negative (T,)");
  const int64_t n = embeddings.size(0);
  Triplets triplets;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    triplets = {checked_indices(anchor, n), checked_indices(positive, n), checked_indices(negative, n)};
  }
  return differentiated(embeddings, margin, triplets,
                        {/*soft=*/false, normalize, distance == "cosine", std::string(reduction)});
}

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  // margin: () of any floating dtype, not read where the loss is soft.
  library.def(
      "triplet_loss.native(Tensor embeddings, Tensor labels, Tensor margin, bool soft, bool normalize, str "
      "distance, "
      "str reduction) -> Tensor",
      &triplet_loss);
  // anchor, positive, negative: (T,) integers, indices of rows.
  library.def(
      "triplet_loss.given(Tensor embeddings, Tensor anchor, Tensor positive, Tensor negative, Tensor margin, "
      "bool normalize, str distance, str reduction) -> Tensor",
      &given_triplets);
}

}  // namespace
}  // namespace ssl_kernels::cpu
