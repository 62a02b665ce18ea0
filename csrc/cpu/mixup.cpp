// Mixup of a batch x (B, F):  out_i = own_i x_i + other_i x_p(i), in place or not.
//   forward:  own_i = lam_i, other_i = 1 - lam_i, p the permutation
//   backward: own_j = lam_j, other_j = 1 - lam_q(j), p its inverse q
//   grad_lam_i = sum_f g_if (x_if - x_p(i)f)
// Tiling: a task is a chunk of kChunkBytes of every sample, a quarter of a first-level cache. It walks the
//   cycles of p two samples at a time, which are read and written side by side with what the second one
//   needs; that stays in the cache and is the next to be written. In place the first one of a longer cycle is
//   held aside. A thread takes a cycle through its neighbouring chunks before it takes the next, so that
//   short cycles stream through memory. Tasks touch disjoint elements.
// Traffic: in place each element is read once and written once; out of place likewise. Scratch: a few chunks
//   a thread.
// Numerics: in acc_t, one rounding to the storage type. Terms of weight 0 are left out, not multiplied.
//   grad_lam: sums of a chunk in acc_t over the lanes of a vector, chunks in double in a fixed order.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstring>

#include "../ops/mixing.h"
#include "huge_pages.h"
#include "mixing_math.h"
#include "permutation.h"
#include "rows.h"
#include "sample_runs.h"

namespace ssl_kernels::cpu {
namespace {

constexpr int64_t kChunkBytes = 1 << 13;
constexpr int64_t kChunksInARow = 64;     // of a cycle, before the next cycle
constexpr int64_t kLeastBytes = 1 << 16;  // of a batch that is worth a second thread
constexpr int64_t kLargestSums = 256;     // partial sums of grad_lam that are kept for each sample

template <class T>
struct Weights {
  std::vector<int64_t> partner;
  std::vector<T> own, other;

  Weights(std::vector<int64_t> partners, const std::vector<T>& lam, bool backward)
      : partner(std::move(partners)) {
    const int64_t batch = lam.size();
    for (int64_t i = 0; i < batch; ++i) {
      const bool fixed = partner[i] == i;
      own.push_back(fixed ? T(1) : lam[i]);
      other.push_back(fixed ? T(0) : T(1) - lam[backward ? partner[i] : i]);
    }
  }
  bool keeps(int64_t i) const { return own[i] == T(1) && other[i] == T(0); }
  bool mixes(int64_t i) const { return own[i] != T(0) && other[i] != T(0); }
};

int64_t tasks_per_thread(int64_t tasks, int64_t bytes) {
  return std::max<int64_t>(1, tasks * kLeastBytes / (bytes + 1));
}

// A chunk of one tensor's sample: in place where its elements are consecutive, else gathered into `buffer`.
template <class S>
const S* gathered(const S* p, int64_t step, int64_t n, S* buffer) {
  if (step == 1) return p;
  for (int64_t k = 0; k < n; ++k) buffer[k] = p[k * step];
  return buffer;
}

template <class S>
void mix_chunk(S* out, const S* own, Accumulation<S> a, const S* other, Accumulation<S> b, int64_t n,
               const S* next) {
  const auto& math = mixing_math<S>();
  const auto weigh = [&](const S* x, Accumulation<S> weight) {
    if (weight != 1)
      math.scale(out, x, weight, n);
    else if (out != x)
      std::memcpy(out, x, n * sizeof(S));
  };
  if (b == 0)
    weigh(own, a);
  else if (a == 0)
    weigh(other, b);
  else
    math.mix(out, own, a, other, b, n, next);
}

// out_i = own_i x_i + other_i x_p(i); out may be x itself.
template <class S>
void mix_batch(const at::Tensor& out, const at::Tensor& x, const Weights<Accumulation<S>>& weights) {
  const bool in_place = out.is_same(x);
  const SampleRuns runs{&out, &x};
  const RunChunks chunks(runs, kChunkBytes / sizeof(S));
  const Cycles cycles(weights.partner, [&](int64_t i) { return !in_place || !weights.keeps(i); });
  S* const to = out.mutable_data_ptr<S>();
  const S* const from = x.const_data_ptr<S>();
  const int64_t to_batch = out.stride(0), from_batch = x.stride(0), to_step = runs.step(0),
                from_step = runs.step(1);
  const bool consecutive = to_step == 1 && from_step == 1;
  const auto& math = mixing_math<S>();
  if (cycles.count() == 0) return;
  at::parallel_for(
      0, chunks.count(), tasks_per_thread(chunks.count(), x.numel() * sizeof(S)),
      [&](int64_t begin, int64_t end) {
        std::vector<S> scratch(4 * chunks.largest());
        S* const held = scratch.data();
        S* const result = held + chunks.largest();
        S* const buffers[2] = {result + chunks.largest(), result + 2 * chunks.largest()};
        const auto walk = [&](int64_t cycle, int64_t n, S* to_chunk, const S* from_chunk) {
          const int64_t* samples = cycles.order.data() + cycles.begin[cycle];
          const int64_t length = cycles.begin[cycle + 1] - cycles.begin[cycle];
          const auto read = [&](int64_t q) {
            return gathered(from_chunk + samples[q] * from_batch, from_step, n, buffers[q % 2]);
          };
          // Whether samples q and q + 1 are mixed in one pass.
          const auto two_at = [&](int64_t q) {
            return consecutive && q + 1 < length && weights.mixes(samples[q]) &&
                   weights.mixes(samples[q + 1]);
          };
          const S* own = read(0);
          const S* first = own;
          const bool overwritten = in_place && length > 1 && weights.other[samples[length - 1]] != 0;
          if (in_place ? overwritten && !(length == 2 && two_at(0)) : from_step != 1) {
            std::memcpy(held, own, n * sizeof(S));
            first = held;
          }
          for (int64_t q = 0; q < length; ++q) {
            const int64_t i = samples[q];
            const S* other = q + 1 < length ? read(q + 1) : first;
            S* const target = to_chunk + i * to_batch;
            if (two_at(q)) {
              const int64_t j = samples[++q];
              const S* after = q + 1 < length ? read(q + 1) : first;
              math.mix_two(target, to_chunk + j * to_batch, own, weights.own[i], other, weights.other[i],
                           weights.own[j], after, weights.other[j], n);
              own = after;
              continue;
            }
            if (!in_place || !weights.keeps(i)) {
              S* const written = to_step == 1 ? target : result;
              // What is read two steps from here, which a walk in no order of addresses keeps from being
              // foreseen.
              const S* next =
                  from_step == 1 && q + 2 < length ? from_chunk + samples[q + 2] * from_batch : own;
              mix_chunk(written, own, weights.own[i], other, weights.other[i], n, next);
              if (to_step != 1)
                for (int64_t k = 0; k < n; ++k) target[k * to_step] = written[k];
            }
            own = other;
          }
        };
        for (int64_t group = begin; group < end; group += kChunksInARow) {
          const int64_t group_end = std::min(end, group + kChunksInARow);
          for (int64_t cycle = 0; cycle < cycles.count(); ++cycle)
            for (int64_t task = group; task < group_end; ++task)
              walk(cycle, chunks.length(task), to + chunks.offset(0, task), from + chunks.offset(1, task));
        }
      });
}

// grad_lam_i = sum_f g_if (x_if - x_p(i)f)
template <class S>
at::Tensor lam_gradient(const at::Tensor& grad, const at::Tensor& x, const std::vector<int64_t>& partner) {
  using T = Accumulation<S>;
  const int64_t batch = x.size(0);
  const SampleRuns runs{&x, &grad};
  const RunChunks chunks(runs, kChunkBytes / sizeof(S));
  const Cycles cycles(partner, [&](int64_t i) { return partner[i] != i; });
  const int64_t tasks = chunks.count(), groups = std::min(tasks, kLargestSums);
  std::vector<double> sums(groups * batch);
  const S* const from = x.const_data_ptr<S>();
  const S* const weights = grad.const_data_ptr<S>();
  const auto& math = mixing_math<S>();
  at::parallel_for(
      0, groups, tasks_per_thread(groups, 2 * x.numel() * sizeof(S)), [&](int64_t begin, int64_t end) {
        std::vector<S> scratch(3 * chunks.largest());
        S* const buffers[3] = {scratch.data(), scratch.data() + chunks.largest(),
                               scratch.data() + 2 * chunks.largest()};
        for (int64_t group = begin; group < end; ++group)
          for (int64_t task = group * tasks / groups; task < (group + 1) * tasks / groups; ++task) {
            const int64_t n = chunks.length(task);
            const S* const x_chunk = from + chunks.offset(0, task);
            const S* const g_chunk = weights + chunks.offset(1, task);
            for (int64_t i : cycles.order)
              sums[group * batch + i] += math.difference_dot(
                  gathered(g_chunk + i * grad.stride(0), runs.step(1), n, buffers[0]),
                  gathered(x_chunk + i * x.stride(0), runs.step(0), n, buffers[1]),
                  gathered(x_chunk + partner[i] * x.stride(0), runs.step(0), n, buffers[2]), n);
          }
      });
  at::Tensor result = at::empty({batch}, x.options().dtype(c10::CppTypeToScalarType<T>::value));
  T* out = result.mutable_data_ptr<T>();
  for (int64_t i = 0; i < batch; ++i) {
    double sum = 0;
    for (int64_t group = 0; group < groups; ++group) sum += sums[group * batch + i];
    out[i] = static_cast<T>(sum);
  }
  return result;
}

void mixup_(const at::Tensor& x, const at::Tensor& lam, const at::Tensor& permutation) {
  check_mixup("mixup_", x, lam, permutation);
  SSL_KERNELS_DISPATCH(x.scalar_type(), "mixup_", [&] {
    auto partner = checked_permutation("mixup_", permutation);
    mix_batch<scalar_t>(x, x, Weights<acc_t>(std::move(partner), checked_lam<acc_t>("mixup_", lam), false));
  });
}

at::Tensor mixup_fwd(const at::Tensor& x, const at::Tensor& lam, const at::Tensor& permutation) {
  check_mixup("mixup", x, lam, permutation);
  return SSL_KERNELS_DISPATCH(x.scalar_type(), "mixup", [&] {
    auto partner = checked_permutation("mixup", permutation);
    const Weights<acc_t> weights(std::move(partner), checked_lam<acc_t>("mixup", lam), false);
    at::Tensor out = in_huge_pages(at::empty_like(x));
    mix_batch<scalar_t>(out, x, weights);
    return out;
  });
}

std::tuple<at::Tensor, at::Tensor> mixup_bwd(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                                             const at::Tensor& lam, const at::Tensor& permutation,
                                             bool x_needs_grad) {
  check_mixup("mixup", grad, lam, permutation);
  if (x) check_like("mixup", "x", *x, grad);
  return SSL_KERNELS_DISPATCH(grad.scalar_type(), "mixup", [&] {
    const auto partner = checked_permutation("mixup", permutation);
    const auto shares = checked_lam<acc_t>("mixup", lam);
    at::Tensor grad_x = x_needs_grad ? in_huge_pages(at::empty_like(grad)) : at::empty({0}, grad.options());
    if (x_needs_grad) mix_batch<scalar_t>(grad_x, grad, Weights<acc_t>(inverse(partner), shares, true));
    at::Tensor grad_lam = x ? lam_gradient<scalar_t>(grad, *x, partner) : at::empty({0}, lam.options());
    return std::make_tuple(grad_x, grad_lam);
  });
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("mixup_.native", &mixup_);
  library.impl("mixup_fwd.native", &mixup_fwd);
  library.impl("mixup_bwd.native", &mixup_bwd);
}

}  // namespace
}  // namespace ssl_kernels::cpu
