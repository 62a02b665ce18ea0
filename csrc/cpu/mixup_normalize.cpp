// 8-bit images x (B, C, H, W) to mixed, normalised numbers:
//   out_ic = scale_c (lam_i x_ic + (1 - lam_i) x_p(i)c) + shift_c,  scale_c = 1 / (255 std_c),  shift_c =
//   -mean_c / std_c
// Tiling: a task is a chunk of kChunk consecutive pixels of every sample; it walks the cycles of p, so that
//   p(i)'s chunk, read for sample i, is in the first-level cache when it is the next to be mixed.
// Traffic: one byte read and one number written an element; results larger than the caches are written past
//   them.
// Numerics: float32 throughout, scale and shift taken in float64, one rounding to the result's dtype.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../ops/mixing.h"
#include "huge_pages.h"
#include "mixing_math.h"
#include "permutation.h"

namespace ssl_kernels::cpu {
namespace {

constexpr int64_t kChunk = 4096;

// Inner dimensions, outermost in memory first.
std::vector<int64_t> by_stride(const at::Tensor& x) {
  std::vector<int64_t> dims;
  for (int64_t dim = 1; dim < x.dim(); ++dim)
    if (x.size(dim) != 1) dims.push_back(dim);
  std::stable_sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  return dims;
}

bool samples_are_dense(const at::Tensor& x) {
  const auto dims = by_stride(x);
  int64_t expected = 1;
  for (size_t k = dims.size(); k-- > 0; expected *= x.size(dims[k]))
    if (x.stride(dims[k]) != expected) return false;
  return true;
}

bool same_sample_layout(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t dim = 1; dim < a.dim(); ++dim)
    if (a.size(dim) != 1 && a.stride(dim) != b.stride(dim)) return false;
  return true;
}

struct Shares {
  float own, other;
};

template <class S>
void normalize_batch(const at::Tensor& out, const at::Tensor& x, const std::vector<int64_t>& partner,
                     const std::vector<Shares>& shares, const std::vector<float>& scale,
                     const std::vector<float>& shift) {
  const int64_t elements = x.numel() / x.size(0), channels = x.size(1);
  // Element e of a sample belongs to channel e / stride % channels.
  const int64_t channel_stride = channels == 1 ? elements : out.stride(1);
  // Of a chunk that begins at a channel's first element, factors and terms of each element; long runs of one
  // channel are cut at their ends instead.
  const bool interleaved = channel_stride < 64;
  const int64_t period = channel_stride * channels;
  const int64_t chunk =
      interleaved ? std::max<int64_t>(1, kChunk / period) * period : std::min(kChunk, channel_stride);
  const int64_t per_run = interleaved ? 1 : (channel_stride + chunk - 1) / chunk;
  const int64_t tasks = interleaved ? (elements + chunk - 1) / chunk : elements / channel_stride * per_run;
  std::vector<float> factors(interleaved ? chunk : 0), terms(factors.size());
  for (size_t e = 0; e < factors.size(); ++e) {
    factors[e] = scale[e / channel_stride % channels];
    terms[e] = shift[e / channel_stride % channels];
  }
  const Cycles cycles(partner, [](int64_t) { return true; });
  S* const to = out.mutable_data_ptr<S>();
  const uint8_t* const from = x.const_data_ptr<uint8_t>();
  const auto& math = normalize_math<S>();
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t run = task / per_run, in_run = task % per_run * chunk;
      const int64_t offset = interleaved ? task * chunk : run * channel_stride + in_run;
      const int64_t n = std::min(chunk, interleaved ? elements - offset : channel_stride - in_run);
      const int64_t channel = interleaved ? 0 : run % channels;
      for (int64_t i : cycles.order) {
        const uint8_t* own = from + i * x.stride(0) + offset;
        const uint8_t* other = from + partner[i] * x.stride(0) + offset;
        S* const target = to + i * out.stride(0) + offset;
        if (interleaved)
          math.pixels(target, own, shares[i].own, other, shares[i].other, factors.data(), terms.data(), n);
        else
          math.plane(target, own, shares[i].own * scale[channel], other, shares[i].other * scale[channel],
                     shift[channel], n);
      }
    }
  });
}

at::Tensor mixup_normalize(const at::Tensor& x, const at::Tensor& lam, const at::Tensor& permutation,
                           const at::Tensor& mean, const at::Tensor& std, at::ScalarType dtype) {
  check_mixup_normalize(x, lam, permutation, mean, std, dtype);
  const auto partner = checked_permutation("mixup_normalize", permutation);
  std::vector<Shares> shares;
  for (float share : checked_lam<float>("mixup_normalize", lam)) shares.push_back({share, 1 - share});
  std::vector<float> scale, shift;
  for (int64_t c = 0; c < x.size(1); ++c) {
    const double m = mean.const_data_ptr<float>()[c * mean.stride(0)];
    const double s = std.const_data_ptr<float>()[c * std.stride(0)];
    scale.push_back(static_cast<float>(1 / (255 * s)));
    shift.push_back(static_cast<float>(-m / s));
  }
  const at::Tensor out = in_huge_pages(at::empty_like(x, x.options().dtype(dtype)));
  // The kernel takes dense samples in the layout of the result; any other goes through a copy of 8-bit
  // numbers.
  const bool dense = samples_are_dense(out);
  const at::Tensor target = dense ? out : at::empty(x.sizes(), out.options());
  const at::Tensor source = same_sample_layout(target, x)
                                ? x
                                : at::empty_strided(x.sizes(), target.strides(), x.options()).copy_(x);
  switch (dtype) {
    case at::kFloat: normalize_batch<float>(target, source, partner, shares, scale, shift); break;
    case at::kHalf: normalize_batch<c10::Half>(target, source, partner, shares, scale, shift); break;
    default: normalize_batch<c10::BFloat16>(target, source, partner, shares, scale, shift);
  }
  return dense ? out : out.copy_(target);
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) { library.impl("mixup_normalize.native", &mixup_normalize); }

}  // namespace
}  // namespace ssl_kernels::cpu
