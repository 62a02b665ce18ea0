// The walk along the cycles of a permutation: its order, computed on the device, and the loop over it.
//
// s(j) is the sample that j takes its partner from: p(j), or for gradients its inverse q(j). The order lists
// every cycle as j0, s(j0), s(s(j0)), ... from its smallest sample j0, the cycles by j0. A thread that owns a
// few features of every sample reads the samples in this order, one step ahead of what it writes, and holds
// j0's aside for the last one of the cycle: each element is read once before it is overwritten.
#pragma once

#include <cstdint>

#include "device/warp.cuh"

namespace ssl_kernels {
namespace mixing {

constexpr int kOrderThreads = 1024;
constexpr int64_t kMostSamples = int64_t{1} << 30;
// Up to here the order is made in shared memory, where a block of the card may have that much: every round
// reads what the one before wrote, so that the time is that of the memory's answers.
constexpr int64_t kMostSharedSamples = 4096;

// The permutation as the caller passed it.
struct Permutation {
  const int64_t* data;
  int64_t stride;
  int count;

  __device__ __forceinline__ int64_t operator[](int j) const { return data[j * stride]; }
};

// Memory of order_walk, count numbers each; of two one is for this round, one for the next.
struct OrderScratch {
  int* successor;
  int* jump[2];
  int* smallest[2];
  int* distance[2];
  int* begin;

  static constexpr int kArrays = 8;
  __host__ __device__ OrderScratch(int* memory, int64_t count)
      : successor(memory),
        jump{memory + count, memory + 2 * count},
        smallest{memory + 3 * count, memory + 4 * count},
        distance{memory + 5 * count, memory + 6 * count},
        begin(memory + 7 * count) {}
};

// The arrays in `memory`, or where that is null in the dynamic shared memory of the launch.
__device__ __forceinline__ OrderScratch order_scratch(int* memory, int count) {
  extern __shared__ int shared_arrays[];
  return OrderScratch(memory ? memory : shared_arrays, count);
}

// Exclusive sum over the threads of a block of kOrderThreads. `scratch` holds 32 values.
__device__ __forceinline__ int block_exclusive_sum(int x, int* scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int inclusive = x;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int below = __shfl_up_sync(kAllLanes, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  if (lane == kWarpSize - 1) scratch[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    const int total = scratch[lane];
    int sum = total;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int below = __shfl_up_sync(kAllLanes, sum, offset);
      if (lane >= offset) sum += below;
    }
    scratch[lane] = sum - total;
  }
  __syncthreads();
  return scratch[warp] + inclusive - x;
}

__device__ __forceinline__ void swap(int*& a, int*& b) {
  int* const before = a;
  a = b;
  b = before;
}

// Where a sample stands in the order.
struct Place {
  int position;
  int head;    // smallest sample of its cycle
  int length;  // of the cycle
  bool last;   // of the cycle: its successor is the head
};

// s(j) into `successor` by one block of kOrderThreads; the identity where the numbers are no permutation.
// `seen` is scratch memory of the same size.
__device__ __forceinline__ void find_successors(const Permutation& permutation, bool inverse, int* successor,
                                                int* seen) {
  __shared__ int faults;
  const int count = permutation.count, thread = threadIdx.x;
  if (thread == 0) faults = 0;
  for (int j = thread; j < count; j += kOrderThreads) seen[j] = 0;
  __syncthreads();
  for (int j = thread; j < count; j += kOrderThreads) {
    const int64_t partner = permutation[j];
    if (partner < 0 || partner >= count || atomicExch(&seen[partner], 1) != 0) atomicOr(&faults, 1);
  }
  __syncthreads();
  const bool valid = faults == 0;
  for (int j = thread; j < count; j += kOrderThreads) {
    const int partner = valid ? static_cast<int>(permutation[j]) : j;
    successor[inverse ? partner : j] = inverse ? j : partner;
  }
  __syncthreads();
}

// The order of the whole permutation by one block of kOrderThreads: calls emit(sample, successor, place,
// position of the successor) for every sample. Pointer doubling: after r rounds jump is s^(2^r), and smallest
// and distance tell the smallest sample among the 2^r from here on and how far off it is; so log2(count)
// rounds do whatever the cycles are.
template <typename Emit>
__device__ __forceinline__ void order_walk(const Permutation& permutation, bool inverse, OrderScratch scratch,
                                           Emit emit) {
  __shared__ int warp_sums[kWarpSize];
  const int count = permutation.count, thread = threadIdx.x;
  find_successors(permutation, inverse, scratch.successor, scratch.begin);
  for (int j = thread; j < count; j += kOrderThreads) {
    scratch.jump[0][j] = scratch.successor[j];
    scratch.smallest[0][j] = j;
    scratch.distance[0][j] = 0;
  }
  __syncthreads();
  int *jump = scratch.jump[0], *next_jump = scratch.jump[1];
  int *smallest = scratch.smallest[0], *next_smallest = scratch.smallest[1];
  int *distance = scratch.distance[0], *next_distance = scratch.distance[1];
  for (int64_t reach = 1; reach < count; reach *= 2) {
    for (int j = thread; j < count; j += kOrderThreads) {
      const int far = jump[j], here = smallest[j], there = smallest[far];
      next_jump[j] = jump[far];
      next_smallest[j] = there < here ? there : here;
      next_distance[j] = there < here ? static_cast<int>(reach) + distance[far] : distance[j];
    }
    swap(jump, next_jump);
    swap(smallest, next_smallest);
    swap(distance, next_distance);
    __syncthreads();
  }
  const auto length_of = [&](int head) { return distance[scratch.successor[head]] + 1; };

  const int64_t first = int64_t{count} * thread / kOrderThreads,
                end = int64_t{count} * (thread + 1) / kOrderThreads;
  int sum = 0;
  for (int64_t j = first; j < end; ++j) sum += smallest[j] == j ? length_of(j) : 0;
  int begin = block_exclusive_sum(sum, warp_sums);
  for (int64_t j = first; j < end; ++j) {
    if (smallest[j] != j) continue;
    scratch.begin[j] = begin;
    begin += length_of(j);
  }
  __syncthreads();
  for (int j = thread; j < count; j += kOrderThreads) {
    Place place;
    place.head = smallest[j];
    place.length = length_of(place.head);
    const int rank = j == place.head ? 0 : place.length - distance[j];
    place.position = scratch.begin[place.head] + rank;
    place.last = rank == place.length - 1;
    emit(j, scratch.successor[j], place, place.last ? scratch.begin[place.head] : place.position + 1);
  }
}

// One sample of the order and what becomes of it: own * its values + next * its successor's.
template <typename acc_t>
struct alignas(16) Step {
  static constexpr uint32_t kFlag = 1u << 31, kSecondFlag = 1u << 30, kIndex = kSecondFlag - 1;
  uint32_t sample_and_read;        // kFlag: its values are needed
  uint32_t head_and_write_and_last;  // kFlag: the result is written; kSecondFlag: last of its cycle
  acc_t own, next;

  __device__ __forceinline__ int sample() const { return sample_and_read & kIndex; }
  __device__ __forceinline__ int head() const { return head_and_write_and_last & kIndex; }
  __device__ __forceinline__ bool reads() const { return sample_and_read & kFlag; }
  __device__ __forceinline__ bool writes() const { return head_and_write_and_last & kFlag; }
  __device__ __forceinline__ bool last() const { return head_and_write_and_last & kSecondFlag; }
  __device__ __forceinline__ bool starts() const { return sample() == head(); }
};

// In 16-byte accesses, all lanes the same one.
template <typename T>
__device__ __forceinline__ T load_uniform(const T* global) {
  constexpr int kParts = sizeof(T) / 16;
  union {
    uint4 bits[kParts];
    T value;
  } loaded = {};
#pragma unroll
  for (int i = 0; i < kParts; ++i) loaded.bits[i] = reinterpret_cast<const uint4*>(global)[i];
  return loaded.value;
}

// Mixing shares, (count,) with any stride.
template <typename acc_t>
struct Shares {
  const acc_t* data;
  int64_t stride;
  __device__ __forceinline__ acc_t operator[](int j) const { return data[j * stride]; }
};

// Steps of a walk. Forward: own = lam_j, next = 1 - lam_j. Inverse, for gradients: next = 1 - lam_s(j). At a
// fixed point own = 1 and next = 0. `in_place`: what would stay as it is is not written. `everything`: all
// samples but fixed points are read, whatever their weights.
template <typename acc_t>
__global__ __launch_bounds__(kOrderThreads) void walk_order_kernel(Permutation permutation, Shares<acc_t> lam,
                                                                   bool inverse, bool in_place,
                                                                   bool everything, int* scratch,
                                                                   Step<acc_t>* steps) {
  using S = Step<acc_t>;
  const auto own_of = [&](int j, int successor) { return successor == j ? acc_t(1) : lam[j]; };
  const auto next_of = [&](int j, int successor) {
    return successor == j ? acc_t(0) : acc_t(1) - lam[inverse ? successor : j];
  };
  const OrderScratch arrays = order_scratch(scratch, permutation.count);
  order_walk(permutation, inverse, arrays, [&](int j, int successor, const Place& place, int next_position) {
    const auto written = [&](acc_t own, acc_t next) {
      return !in_place || own != acc_t(1) || next != acc_t(0);
    };
    const acc_t own = own_of(j, successor), next = next_of(j, successor);
    S& step = steps[place.position];
    step.head_and_write_and_last =
        place.head | (written(own, next) ? S::kFlag : 0u) | (place.last ? S::kSecondFlag : 0u);
    step.own = own;
    step.next = next;
    // Whether the successor is read depends on both, and it has this one predecessor.
    const int after = arrays.successor[successor];
    const acc_t its_own = own_of(successor, after), its_next = next_of(successor, after);
    const bool read = next != acc_t(0) || (its_own != acc_t(0) && written(its_own, its_next)) ||
                      (everything && successor != j);
    steps[next_position].sample_and_read = successor | (read ? S::kFlag : 0u);
  });
}

// Walks positions [begin, end) of the order, kAhead to 2 kAhead - 1 samples ahead. read(step) gives the
// values of a sample, before_end() those at position `end`, whose sample's cycle goes on there, and head()
// those of the head of the cycle that goes on at `begin`; write(step, own values, successor's values,
// successor) stores. Every thread that calls this makes the same calls.
template <int kAhead, typename acc_t, typename Values, typename Read, typename AtEnd, typename Head,
          typename Write>
__device__ __forceinline__ void walk(const Step<acc_t>* steps, int count, int begin, int end, Values zero,
                                     Read read, AtEnd at_end, Head head, Write write) {
  struct Slot {
    Step<acc_t> step;
    Values values;
  };
  const auto slot_at = [&](int64_t k) {
    Slot slot = {{0, 0, acc_t(1), acc_t(0)}, zero};
    if (k > end || k >= count) return slot;
    slot.step = load_uniform(steps + k);
    if (k < end) {
      if (slot.step.reads()) slot.values = read(slot.step);
    } else if (!slot.step.starts()) {
      slot.values = at_end();
    }
    return slot;
  };
  Slot now[kAhead], ahead[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) now[u] = slot_at(begin + u);
  Values first = now[0].step.starts() ? now[0].values : head();
  for (int64_t base = begin; base < end; base += kAhead) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) ahead[u] = slot_at(base + kAhead + u);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const Slot& next = u + 1 < kAhead ? now[u + 1] : ahead[0];
      if (base + u < end) {
        const bool last = now[u].step.last();
        const Values partner = last ? first : next.values;
        const int successor = last ? now[u].step.head() : next.step.sample();
        if (now[u].step.writes()) write(now[u].step, now[u].values, partner, successor);
        if (last) first = next.values;
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) now[u] = ahead[u];
  }
}

}  // namespace mixing
}  // namespace ssl_kernels
