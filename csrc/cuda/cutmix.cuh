// Device code of `cutmix`: x_i inside box i becomes x_p(i).
//
// Tiling: a thread owns 16 bytes of consecutive features, whose pixels it finds once. In place it walks all
//   samples along the cycles of the permutation (permutation_walk.cuh): a sample is read for its predecessor
//   before its own box is pasted over. Only the first of a cycle is pasted too early for the last, and where
//   both boxes cover a feature it is held aside. Boxes come through shared memory, kCutChunk steps at a time.
//   Out of place and backward, a thread takes kGatherSamples samples one after the other. Where samples are
//   not aligned to 16 bytes, and for the features left over, a thread owns one feature.
// Traffic: in place the sectors under the boxes, read once and written once, plus those of the first samples
//   held aside; 32 bytes per sample for each block. Out of place and backward 2 B F elements, and the boxes
//   once for each block.
// Numerics: values are moved as they are; the gradient adds two at most, in acc_t, rounded once.
#pragma once

#include "device/vector_access.cuh"
#include "permutation_walk.cuh"

namespace ssl_kernels {
namespace mixing {

constexpr int kCutThreads = 128;
constexpr int kCutChunk = 128;
constexpr int kCutAhead = 4;
constexpr int kGatherThreads = 256;
constexpr int kGatherSamples = 16;

// Blocks over `features` of a sample, out of place.
__host__ __device__ __forceinline__ int64_t gather_blocks(int64_t features, int vec) {
  const int64_t of_a_block = int64_t{kGatherThreads} * vec;
  return (features + of_a_block - 1) / of_a_block;
}

struct Box {
  int y0, y1, x0, x1;
};

struct Boxes {
  const int64_t* data;
  int64_t strides[2];
  int H, W;

  __device__ __forceinline__ Box operator[](int64_t i) const {
    const int64_t* row = data + i * strides[0];
    const auto clip = [&](int column, int size) {
      const int64_t value = row[column * strides[1]];
      return static_cast<int>(value < 0 ? 0 : value > size ? size : value);
    };
    return {clip(0, H), clip(1, H), clip(2, W), clip(3, W)};
  }
};

// How pixels lie in a sample, see cutmix.h.
struct Image {
  int64_t row_stride, column_stride;
  int H, W;
};

// The pixels of kVec consecutive features.
template <int kVec>
class Pixels {
 public:
  __device__ __forceinline__ Pixels(const Image& image, int64_t feature) {
    first_row_ = first_column_ = INT32_MAX;
    last_row_ = last_column_ = 0;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      rows_[e] = static_cast<int>((feature + e) / image.row_stride % image.H);
      columns_[e] = static_cast<int>((feature + e) / image.column_stride % image.W);
      first_row_ = min(first_row_, rows_[e]);
      last_row_ = max(last_row_, rows_[e]);
      first_column_ = min(first_column_, columns_[e]);
      last_column_ = max(last_column_, columns_[e]);
    }
  }

  static constexpr unsigned kAll = (1u << kVec) - 1;

  // Bit e: feature e lies inside.
  __device__ __forceinline__ unsigned inside(const Box& box) const {
    if (last_row_ < box.y0 || first_row_ >= box.y1 || last_column_ < box.x0 || first_column_ >= box.x1)
      return 0;
    if (first_row_ >= box.y0 && last_row_ < box.y1 && first_column_ >= box.x0 && last_column_ < box.x1)
      return kAll;
    unsigned mask = 0;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const bool in =
          rows_[e] >= box.y0 && rows_[e] < box.y1 && columns_[e] >= box.x0 && columns_[e] < box.x1;
      mask |= in ? 1u << e : 0u;
    }
    return mask;
  }

 private:
  int rows_[kVec], columns_[kVec];
  int first_row_, last_row_, first_column_, last_column_;
};

// Stores the values whose bits are set, as few accesses as aligned halves of halves allow.
template <typename bits_t, int kVec>
__device__ __forceinline__ void store_where(bits_t* global, const Chunk<bits_t, kVec>& chunk, unsigned mask) {
  if (mask == 0) return;
  if (mask == (1u << kVec) - 1) {
    store_streaming(reinterpret_cast<Chunk<bits_t, kVec>*>(global), chunk);
  } else if constexpr (kVec > 1) {
    constexpr int kHalf = kVec / 2;
    Chunk<bits_t, kHalf> low, high;
#pragma unroll
    for (int e = 0; e < kHalf; ++e) {
      low.value[e] = chunk.value[e];
      high.value[e] = chunk.value[kHalf + e];
    }
    store_where(global, low, mask & ((1u << kHalf) - 1));
    store_where(global + kHalf, high, mask >> kHalf);
  }
}

struct alignas(16) CutStep {
  int sample, source;
  int length;  // of the cycle, at its first step, else 0
  int last;    // of its cycle: the source is the cycle's first sample
  Box box;     // empty at a fixed point
};

__global__ __launch_bounds__(kOrderThreads) void cutmix_order_kernel(Permutation permutation, Boxes boxes,
                                                                     int* scratch, CutStep* steps) {
  order_walk(permutation, false, order_scratch(scratch, permutation.count),
             [&](int j, int successor, const Place& place, int) {
               const Box nothing = {0, 0, 0, 0};
               steps[place.position] = {j, successor, j == place.head ? place.length : 0, place.last,
                                        successor == j ? nothing : boxes[j]};
             });
}

template <typename bits_t, int kVec>
__global__ __launch_bounds__(kCutThreads, 4) void cutmix_walk_kernel(bits_t* x, int64_t stride,
                                                                     int64_t first_feature, int64_t features,
                                                                     Image image, int count,
                                                                     const CutStep* steps) {
  __shared__ CutStep chunk[kCutChunk];
  using Values = Chunk<bits_t, kVec>;
  const int64_t index = (int64_t{blockIdx.x} * kCutThreads + threadIdx.x) * kVec;
  const bool exists = index < features;
  const int64_t feature = first_feature + (exists ? index : 0);
  const Pixels<kVec> pixels(image, feature);
  bits_t* const column = x + feature;
  const auto load = [&](int64_t sample) {
    return load_streaming(reinterpret_cast<const Values*>(column + sample * stride));
  };
  Values head = {};
  bool held = false;
  for (int base = 0; base < count; base += kCutChunk) {
    __syncthreads();
    const int filled = min(kCutChunk, count - base);
    for (int i = threadIdx.x; i < 2 * filled; i += kCutThreads) {
      reinterpret_cast<uint4*>(chunk)[i] = reinterpret_cast<const uint4*>(steps + base)[i];
    }
    __syncthreads();
    if (!exists) continue;
    for (int start = 0; start < filled; start += kCutAhead) {
      Values values[kCutAhead];
      unsigned masks[kCutAhead];
#pragma unroll
      for (int u = 0; u < kCutAhead; ++u) {
        masks[u] = 0;
        if (start + u >= filled) continue;
        const CutStep& step = chunk[start + u];
        masks[u] = pixels.inside(step.box);
        if (step.length > 0) held = false;
        if (masks[u] == 0) continue;
        if (step.length > 1) {
          held = (masks[u] & pixels.inside(steps[base + start + u + step.length - 1].box)) != 0;
          if (held) head = load(step.sample);
        }
        values[u] = step.last && held ? head : load(step.source);
      }
#pragma unroll
      for (int u = 0; u < kCutAhead; ++u) {
        if (masks[u]) store_where(column + chunk[start + u].sample * stride, values[u], masks[u]);
      }
    }
  }
}

// Where the result of a sample comes from: its own features outside `kept`, those of `source` inside `taken`.
struct Sources {
  int source;
  Box kept, taken;
};

// out_i for kGatherSamples samples; sources_of(i) is called once per block for each. The blocks of one group
// of samples follow one another in blockIdx.x: groups can be more than the 65535 that another dimension of a
// grid has.
template <typename scalar_t, int kVec, typename SourcesOf, typename Add>
__device__ __forceinline__ void gather(const scalar_t* x, int64_t x_stride, scalar_t* out, int64_t out_stride,
                                       int64_t first_feature, int64_t features, const Image& image, int count,
                                       SourcesOf sources_of, Add add) {
  __shared__ Sources shared[kGatherSamples];
  const unsigned blocks = static_cast<unsigned>(gather_blocks(features, kVec));
  const int64_t first = int64_t{blockIdx.x / blocks} * kGatherSamples;
  const int samples = static_cast<int>(min(int64_t{kGatherSamples}, count - first));
  if (threadIdx.x < samples) shared[threadIdx.x] = sources_of(static_cast<int>(first) + threadIdx.x);
  __syncthreads();
  using Values = Chunk<scalar_t, kVec>;
  const int64_t index = (int64_t{blockIdx.x % blocks} * kGatherThreads + threadIdx.x) * kVec;
  if (index >= features) return;
  const int64_t feature = first_feature + index;
  const Pixels<kVec> pixels(image, feature);
  const auto load = [&](int64_t sample) {
    return load_streaming(reinterpret_cast<const Values*>(x + sample * x_stride + feature));
  };
#pragma unroll 4
  for (int i = 0; i < samples; ++i) {
    const unsigned own = ~pixels.inside(shared[i].kept) & Pixels<kVec>::kAll;
    const unsigned given = pixels.inside(shared[i].taken);
    Values ours = {}, theirs = {};
    if (own) ours = load(first + i);
    if (given) theirs = load(shared[i].source);
    Values result;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const bool from_own = own >> e & 1, from_source = given >> e & 1;
      result.value[e] = from_own && from_source ? add(ours.value[e], theirs.value[e])
                        : from_source           ? theirs.value[e]
                        : from_own              ? ours.value[e]
                                                : scalar_t{};
    }
    store_streaming(reinterpret_cast<Values*>(out + (first + i) * out_stride + feature), result);
  }
}

template <typename bits_t, int kVec>
__global__ __launch_bounds__(kGatherThreads, 2) void cutmix_gather_kernel(const bits_t* x, int64_t x_stride,
                                                                      bits_t* out, int64_t out_stride,
                                                                      int64_t first_feature, int64_t features,
                                                                      Image image, Boxes boxes,
                                                                      Permutation permutation) {
  gather<bits_t, kVec>(
      x, x_stride, out, out_stride, first_feature, features, image, permutation.count,
      [&](int i) {
        const int64_t partner = permutation[i];
        const bool valid = partner >= 0 && partner < permutation.count;
        const Box box = boxes[i];
        return Sources{valid ? static_cast<int>(partner) : i, box, box};
      },
      [](bits_t own, bits_t) { return own; });
}

// The inverse of the permutation, the identity where it is none.
__global__ __launch_bounds__(kOrderThreads) void inverse_kernel(Permutation permutation, int* inverse,
                                                                int* seen) {
  find_successors(permutation, true, inverse, seen);
}

template <typename scalar_t, int kVec>
__global__ __launch_bounds__(kGatherThreads, 2) void
cutmix_grad_kernel(const scalar_t* grad, int64_t grad_stride,
                                                        scalar_t* grad_x, int64_t grad_x_stride,
                                                        int64_t first_feature, int64_t features, Image image,
                                                        Boxes boxes, int count, const int* inverse) {
  gather<scalar_t, kVec>(
      grad, grad_stride, grad_x, grad_x_stride, first_feature, features, image, count,
      [&](int j) {
        const int source = inverse[j];
        const Box nothing = {0, 0, 0, 0};
        return source == j ? Sources{j, nothing, nothing} : Sources{source, boxes[j], boxes[source]};
      },
      [](scalar_t own, scalar_t given) { return from_acc<scalar_t>(to_acc(own) + to_acc(given)); });
}

}  // namespace mixing
}  // namespace ssl_kernels
