// Cross-entropy of the views of a sample against a teacher's softmax, sample by sample. With s_v the
// student's logits and q_a = softmax(t_a + bias) the teacher's probabilities, c_v pairs (a, v) with view v,
// and Q_v their sum of q_a:
//   loss = sum_v c_v lse(s_v) - <Q_v, s_v>        by s_v:  c_v softmax(s_v) - Q_v
// Tiling: threads share the samples. A row of logits is read for its largest, its sum of exponentials, the
//   dot and the gradient while it is in the first- or second-level cache; probabilities that several views
//   share are added up once.
// Traffic: cluster_rows_ reads and writes each row once; view_cross_entropy reads student and teacher once in
//   each direction and writes the gradients once.
// Memory: view_cross_entropy A + 1 rows of acc_t a thread, both one for each sum of several teachers.
// Numerics: exponentials and lane sums in acc_t relative to a row's largest logit, losses in double.
#include "cluster_rows.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <vector>

#include "cluster_views.h"
#include "rows.h"

namespace ssl_kernels::cpu {
namespace {

using at::Tensor;

// A row of any storage type that accumulates in T.
template <class T>
struct Loader {
  explicit Loader(const Tensor& rows)
      : tensor(with_neighbours(rows)),
        data(static_cast<const char*>(tensor.const_data_ptr())),
        bytes(tensor.stride(0) * tensor.element_size()) {
    load = dispatch_storage<T>(tensor.scalar_type(), [](auto storage) -> void (*)(T*, const void*, int64_t) {
      using S = decltype(storage);
      return [](T* out, const void* x, int64_t k) {
        row_conversion<S, T>().load(out, static_cast<const S*>(x), k);
      };
    });
  }
  void operator()(T* out, int64_t i, T factor, int64_t k) const {
    load(out, data + i * bytes, k);
    tile_math<T>().scale(out, factor, k);
  }
  Tensor tensor;
  const char* data;
  int64_t bytes;
  void (*load)(T*, const void*, int64_t);
};

template <class T>
std::vector<Loader<T>> loaders(const std::vector<Tensor>& views) {
  return std::vector<Loader<T>>(views.begin(), views.end());
}

// visit(sample, probabilities of each set of teachers, scratch for a row) of every sample, in parallel.
template <class T, class Visit>
void each_sample(const ViewLogits& views, const Targets& targets, const Visit& visit) {
  const int64_t n = views.student[0].size(0), k = views.student[0].size(1);
  const int64_t teachers = static_cast<int64_t>(views.teacher.size());
  const auto load_teacher = loaders<T>(views.teacher);
  const T* bias = views.bias.defined() ? views.bias.const_data_ptr<T>() : nullptr;
  at::parallel_for(0, n, rows_per_task(k * targets.views()), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch((teachers + targets.sets() + 1) * k);
    std::vector<T*> codes(teachers);
    for (int64_t a = 0; a < teachers; ++a) codes[a] = scratch.data() + a * k;
    T* const sums = scratch.data() + teachers * k;
    std::vector<const T*> rows(targets.sets());
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t a = 0; a < teachers; ++a) {
        load_teacher[a](codes[a], i, static_cast<T>(views.steepness), k);
        softmax(codes[a], bias, k);
      }
      targets.add_up(rows, codes, sums, k);
      visit(i, rows, sums + targets.sets() * k);
    }
  });
}

}  // namespace

Tensor cluster_rows_(const Tensor& logits, const Tensor& codes, const std::optional<Tensor>& biases,
                     at::IntArrayRef pairs, bool differentiate, bool less_entropy) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t views = logits.size(0), n = logits.size(1), k = logits.size(2), teachers = codes.size(0);
  const Targets targets(views, pairs);
  const Tensor losses = at::empty({n}, logits.options().dtype(at::kDouble));
  double* loss = losses.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "cluster_rows_", [&] {
    scalar_t *z = logits.mutable_data_ptr<scalar_t>(), *t = codes.mutable_data_ptr<scalar_t>();
    const scalar_t* bias = biases ? biases->const_data_ptr<scalar_t>() : nullptr;
    const int64_t bias_stride = biases && biases->size(0) > 1 ? k : 0;
    at::parallel_for(0, n, rows_per_task(k * (views + teachers)), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> scratch((targets.sets() + 1) * k);
      scalar_t* const taken = less_entropy ? scratch.data() + targets.sets() * k : nullptr;
      std::vector<scalar_t*> rows(teachers);
      std::vector<const scalar_t*> sums(targets.sets());
      for (int64_t i = begin; i < end; ++i) {
        double total = 0;
        for (int64_t a = 0; a < teachers; ++a) {
          rows[a] = t + (a * n + i) * k;
          total += softmax(rows[a], bias ? bias + a * bias_stride : nullptr, k, taken) * targets.met(a);
        }
        targets.add_up(sums, rows, scratch.data(), k);
        for (int64_t v = 0; v < views; ++v) {
          scalar_t* const row = z + (v * n + i) * k;
          if (targets.count(v))
            total += view_loss(row, sums[targets.set_of(v)], targets.count(v), k, differentiate);
          else if (differentiate)
            std::fill_n(row, k, scalar_t(0));
        }
        loss[i] = total;
      }
    });
  });
  return losses;
}

Tensor view_cross_entropy_fwd(const ViewLogits& views) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t n = views.student[0].size(0), k = views.student[0].size(1);
  const Targets targets(static_cast<int64_t>(views.student.size()), views.pairs);
  const Tensor losses = at::empty({n}, views.student[0].options().dtype(at::kDouble));
  double* loss = losses.mutable_data_ptr<double>();
  SSL_KERNELS_DISPATCH(views.student[0].scalar_type(), "view_cross_entropy", [&] {
    const auto load = loaders<acc_t>(views.student);
    each_sample<acc_t>(views, targets, [&](int64_t i, const std::vector<const acc_t*>& rows, acc_t* z) {
      loss[i] = 0;
      for (int64_t v = 0; v < targets.views(); ++v) {
        if (!targets.count(v)) continue;
        load[v](z, i, static_cast<acc_t>(views.scale), k);
        loss[i] += view_loss(z, rows[targets.set_of(v)], targets.count(v), k, false);
      }
    });
  });
  return losses;
}

std::vector<Tensor> view_cross_entropy_bwd(const Tensor& weights, const ViewLogits& views,
                                           const std::vector<bool>& needs) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t n = views.student[0].size(0), k = views.student[0].size(1);
  const Targets targets(static_cast<int64_t>(views.student.size()), views.pairs);
  const Tensor upstream = weights.contiguous();
  const double* weight = upstream.const_data_ptr<double>();
  std::vector<Tensor> grads;
  for (size_t v = 0; v < views.student.size(); ++v)
    grads.push_back(
        at::empty(needs[v] ? views.student[v].sizes() : at::IntArrayRef({0}), views.student[v].options()));
  std::vector<double> by_scale(n, 0.);
  const bool scale_needs_grad = needs.back();
  SSL_KERNELS_DISPATCH(views.student[0].scalar_type(), "view_cross_entropy", [&] {
    const auto load = loaders<acc_t>(views.student);
    std::vector<scalar_t*> out;
    for (size_t v = 0; v < grads.size(); ++v)
      out.push_back(needs[v] ? grads[v].mutable_data_ptr<scalar_t>() : nullptr);
    each_sample<acc_t>(views, targets, [&](int64_t i, const std::vector<const acc_t*>& rows, acc_t* z) {
      std::vector<acc_t> raw(scale_needs_grad ? k : 0);
      for (int64_t v = 0; v < targets.views(); ++v) {
        if (!targets.count(v)) {
          if (out[v]) std::fill_n(out[v] + i * k, k, scalar_t(0));
          continue;
        }
        load[v](z, i, static_cast<acc_t>(views.scale), k);
        view_loss(z, rows[targets.set_of(v)], targets.count(v), k, true, static_cast<acc_t>(weight[i]));
        if (scale_needs_grad) {
          load[v](raw.data(), i, acc_t(1), k);
          by_scale[i] += tile_math<acc_t>().dot(z, raw.data(), k);
        }
        if (!out[v]) continue;
        tile_math<acc_t>().scale(z, static_cast<acc_t>(views.scale), k);
        row_conversion<scalar_t, acc_t>().store(out[v] + i * k, z, k);
      }
    });
  });
  double total = 0;
  for (const double of_sample : by_scale) total += of_sample;
  const auto acc = accumulation_type(views.student[0]);
  Tensor scale_grad = at::empty({}, views.student[0].options().dtype(acc));
  if (acc == at::kDouble)
    *scale_grad.mutable_data_ptr<double>() = total;
  else
    *scale_grad.mutable_data_ptr<float>() = static_cast<float>(total);
  grads.push_back(scale_grad);
  return grads;
}

}  // namespace ssl_kernels::cpu
