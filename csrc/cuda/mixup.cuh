// Device code of `mixup`: y_j = own_j x_j + next_j x_s(j), where s is the permutation (own_j = lam_j,
// next_j = 1 - lam_j) or, for the gradient by x, its inverse (next_j = 1 - lam_s(j)).
//
// Tiling: a thread owns 16 bytes of consecutive features and walks all samples, or one of `parts` equal
//   pieces of their order (blockIdx.y), see permutation_walk.cuh; nothing is shared between threads. Where
//   samples are not aligned to 16 bytes, and for the features left over, it owns one feature.
// Traffic: 2 B F elements out of place; in place as much at most, as samples that stay as they are are not
//   written. One 16-byte step a sample for each warp, 3 % of its traffic, from the first-level cache. Each
//   cut between parts costs two more samples read, in place also written and read: walk_parts.cuh says how
//   many.
// Numerics: shares, products and sum in acc_t, rounded once to scalar_t. A weight of 0 leaves its sample out;
//   an own weight of 1 beside it copies.
#pragma once

#include "device/vector_access.cuh"
#include "permutation_walk.cuh"

namespace ssl_kernels {
namespace mixing {

constexpr int kThreads = 128;
constexpr int kAhead = 4;

// Samples of consecutive features.
template <typename scalar_t>
struct Batch {
  scalar_t* data;  // null: absent
  int64_t stride;
};

// One piece of the walk.
struct Part {
  int begin, end;
  __device__ Part(int count)
      : begin(static_cast<int>(int64_t{count} * blockIdx.y / gridDim.y)),
        end(static_cast<int>(int64_t{count} * (blockIdx.y + 1) / gridDim.y)) {}
};

template <typename acc_t>
__device__ __forceinline__ acc_t mix(acc_t own, acc_t x, acc_t next, acc_t partner) {
  if (next == acc_t(0)) return own == acc_t(1) ? x : own * x;
  if (own == acc_t(0)) return next == acc_t(1) ? partner : next * partner;
  return Math<acc_t>::fma(own, x, next * partner);
}

template <typename scalar_t, int kVec, typename acc_t>
__device__ __forceinline__ Chunk<scalar_t, kVec> mix(acc_t own, const Chunk<scalar_t, kVec>& x, acc_t next,
                                                     const Chunk<scalar_t, kVec>& partner) {
  if (next == acc_t(0) && own == acc_t(1)) return x;
  if (own == acc_t(0) && next == acc_t(1)) return partner;
  Chunk<scalar_t, kVec> mixed;
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    mixed.value[e] = from_acc<scalar_t>(mix(own, to_acc(x.value[e]), next, to_acc(partner.value[e])));
  }
  return mixed;
}

// In place: copies to `edges` (2 (parts - 1), features) what other parts overwrite before it is read: for
// every cut between parts the sample after it, then the head of the cycle that it cuts.
template <typename scalar_t, int kVec, typename acc_t>
__global__ __launch_bounds__(kThreads, 4) void mixup_edges_kernel(Batch<scalar_t> x, int64_t features,
                                                                  int count, int parts,
                                                                  const Step<acc_t>* steps, scalar_t* edges) {
  const int64_t feature = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVec;
  if (feature >= features) return;
  const int cut = blockIdx.y / 2 + 1;
  const Step<acc_t> step = steps[int64_t{count} * cut / parts];
  if (step.starts()) return;
  using Values = Chunk<scalar_t, kVec>;
  const int64_t sample = blockIdx.y % 2 ? step.head() : step.sample();
  *reinterpret_cast<Values*>(edges + blockIdx.y * features + feature) =
      *reinterpret_cast<const Values*>(x.data + sample * x.stride + feature);
}

// Out of place `edges` is null: nothing that is read is overwritten.
template <typename scalar_t, int kVec, typename acc_t>
__global__ __launch_bounds__(kThreads, 4) void mixup_walk_kernel(Batch<scalar_t> x, Batch<scalar_t> out,
                                                                 int64_t features, int count,
                                                                 const Step<acc_t>* steps, scalar_t* edges) {
  const int64_t feature = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVec;
  if (feature >= features) return;
  using Values = Chunk<scalar_t, kVec>;
  const Part part(count);
  const auto load = [&](int64_t sample) {
    return load_streaming(reinterpret_cast<const Values*>(x.data + sample * x.stride + feature));
  };
  const auto edge = [&](int64_t row) {
    return load_streaming(reinterpret_cast<const Values*>(edges + row * features + feature));
  };
  walk<kAhead>(
      steps, count, part.begin, part.end, Values{},
      [&](const Step<acc_t>& step) { return load(step.sample()); },
      [&] { return edges ? edge(2 * int64_t{blockIdx.y}) : load(steps[part.end].sample()); },
      [&] { return edges ? edge(2 * int64_t{blockIdx.y} - 1) : load(steps[part.begin].head()); },
      [&](const Step<acc_t>& step, const Values& own, const Values& partner, int) {
        store_streaming(reinterpret_cast<Values*>(out.data + step.sample() * out.stride + feature),
                        mix(step.own, own, step.next, partner));
      });
}

// Backward with the gradient by lam: g is walked along the inverse, and x with it.
//   grad_x_j = own_j g_j + next_j g_s(j)    grad_lam_s(j) = sum_f g_s(j)f (x_s(j)f - x_jf), as p(s(j)) = j
// Tiling: as above; parts need no edges, as nothing that is read is overwritten. A warp adds up its features
//   of each sample and writes one number to `partial` (warps, B), which mixup_grad_lam_kernel adds up.
// Traffic: reads 2 B F elements, writes B F and 4 bytes of partial sums for each 512 of a sample.
// Numerics: products and sums in acc_t: over a thread's features, a warp, then all warps, in a fixed order.
template <typename scalar_t, int kVec, typename acc_t>
__global__ __launch_bounds__(kThreads, 4) void mixup_grad_kernel(Batch<scalar_t> g, Batch<scalar_t> x,
                                                                 Batch<scalar_t> grad_x, int64_t features,
                                                                 int count, const Step<acc_t>* steps,
                                                                 acc_t* partial) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t feature = thread * kVec;
  const bool inside = feature < features;
  if ((thread - threadIdx.x % kWarpSize) * kVec >= features) return;
  struct Values {
    Chunk<scalar_t, kVec> g, x;
  };
  const Part part(count);
  acc_t* sums = partial + thread / kWarpSize * count;
  const auto load = [&](const Batch<scalar_t>& batch, int64_t sample) {
    return load_streaming(
        reinterpret_cast<const Chunk<scalar_t, kVec>*>(batch.data + sample * batch.stride + feature));
  };
  const auto values = [&](int64_t sample) {
    return inside ? Values{load(g, sample), load(x, sample)} : Values{};
  };
  walk<kAhead / 2>(
      steps, count, part.begin, part.end, Values{},
      [&](const Step<acc_t>& step) { return values(step.sample()); },
      [&] { return values(steps[part.end].sample()); }, [&] { return values(steps[part.begin].head()); },
      [&](const Step<acc_t>& step, const Values& own, const Values& partner, int successor) {
        if (grad_x.data && inside) {
          store_streaming(
              reinterpret_cast<Chunk<scalar_t, kVec>*>(grad_x.data + step.sample() * grad_x.stride + feature),
              mix(step.own, own.g, step.next, partner.g));
        }
        acc_t sum = 0;
        if (successor != step.sample()) {
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            sum = Math<acc_t>::fma(to_acc(partner.g.value[e]),
                                   to_acc(partner.x.value[e]) - to_acc(own.x.value[e]), sum);
          }
        }
        sum = warp_sum(sum);
        if (threadIdx.x % kWarpSize == 0) sums[successor] = sum;
      });
}

// grad_lam_i = sum of partial (warps, B) over warps: 32 samples per block, each warp a 32nd of the rows.
template <typename acc_t>
__global__ __launch_bounds__(1024) void mixup_grad_lam_kernel(const acc_t* partial, int64_t warps, int count,
                                                        acc_t* grad_lam) {
  __shared__ acc_t sums[kWarpSize][kWarpSize + 1];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t sample = int64_t{blockIdx.x} * kWarpSize + lane;
  acc_t sum = 0;
  if (sample < count) {
    for (int64_t row = warp; row < warps; row += kWarpSize) sum += partial[row * count + sample];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  sum = warp_sum(sums[lane][warp]);
  const int64_t own = int64_t{blockIdx.x} * kWarpSize + warp;
  if (lane == 0 && own < count) grad_lam[own] = sum;
}

}  // namespace mixing
}  // namespace ssl_kernels
