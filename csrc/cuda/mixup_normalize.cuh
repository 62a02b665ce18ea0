// Device code of `mixup_normalize`: out_i = scale_c (lam_i x_i + (1 - lam_i) x_p(i)) + shift_c, with
// scale_c = 1 / (255 std_c), shift_c = -mean_c / std_c.
//
// Tiling: a thread owns 16 bytes of consecutive features of the result, 4 or 8 bytes of the images, and walks
//   all samples or one of `parts` pieces of their order, see permutation_walk.cuh. Where samples are not
//   aligned to that, and for the features left over, it owns one feature.
// Traffic: reads B F bytes, writes B F elements. Loads and stores of a warp are consecutive. One 16-byte step
//   a sample for each warp from the first-level cache; each cut between parts costs two more samples read.
// Numerics: scale and shift from float64; shares, products and sums in float32, rounded once to scalar_t.
#pragma once

#include "device/vector_access.cuh"
#include "permutation_walk.cuh"

namespace ssl_kernels {
namespace mixing {

constexpr int kNormalizeThreads = 128;
constexpr int kNormalizeAhead = 4;

// (C,) numbers of images in [0, 1].
struct Channels {
  const float* mean;
  const float* std;
  int64_t mean_stride, std_stride;
  int64_t count;
  int64_t stride;  // between features of neighbouring channels
};

template <typename scalar_t, int kVec>
__global__ __launch_bounds__(kNormalizeThreads, 4) void
mixup_normalize_kernel(const uint8_t* x, int64_t x_stride, scalar_t* out,
                                                            int64_t out_stride, int64_t first_feature,
                                                            int64_t features, int count, Channels channels,
                                                            const Step<float>* steps) {
  const int64_t index = (int64_t{blockIdx.x} * kNormalizeThreads + threadIdx.x) * kVec;
  if (index >= features) return;
  const int64_t feature = first_feature + index;
  float scale[kVec], shift[kVec];
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    const int64_t c = (feature + e) / channels.stride % channels.count;
    const double std = channels.std[c * channels.std_stride];
    scale[e] = static_cast<float>(1.0 / (255.0 * std));
    shift[e] = static_cast<float>(-channels.mean[c * channels.mean_stride] / std);
  }
  using Bytes = Chunk<uint8_t, kVec>;
  const int begin = static_cast<int>(int64_t{count} * blockIdx.y / gridDim.y);
  const int end = static_cast<int>(int64_t{count} * (blockIdx.y + 1) / gridDim.y);
  const auto load = [&](int64_t sample) {
    return load_streaming(reinterpret_cast<const Bytes*>(x + sample * x_stride + feature));
  };
  walk<kNormalizeAhead>(
      steps, count, begin, end, Bytes{}, [&](const Step<float>& step) { return load(step.sample()); },
      [&] { return load(steps[end].sample()); }, [&] { return load(steps[begin].head()); },
      [&](const Step<float>& step, const Bytes& own, const Bytes& partner, int) {
        Chunk<scalar_t, kVec> result;
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          const float mixed = __fmaf_rn(step.own, own.value[e], step.next * partner.value[e]);
          result.value[e] = from_acc<scalar_t>(__fmaf_rn(mixed, scale[e], shift[e]));
        }
        store_streaming(reinterpret_cast<Chunk<scalar_t, kVec>*>(out + step.sample() * out_stride + feature),
                        result);
      });
}

}  // namespace mixing
}  // namespace ssl_kernels
