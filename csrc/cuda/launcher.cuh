// Host side that the launchers share: scratch memory, launches, the split of a walk, operands as kernels read
// them.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "dtype.h"
#include "matrix_product.h"
#include "rows.cuh"
#include "tile_walk.cuh"

namespace ssl_kernels {

// Shared memory of a launch, in bytes, and the most that any launch of its kernel takes.
struct SharedBytes {
  int used, most;
};

// Steps of own rows that may stay in shared memory: kOwnerSlots, and more where the device has room for them
// beside as many blocks a multiprocessor as with those.
template <typename Shape>
int most_owner_slots() {
  int device = 0, of_block = 48 * 1024, of_multiprocessor = 48 * 1024, reserved = 1024;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
  const auto blocks = [&](int slots) {
    const int bytes = Shape::shared_bytes(slots);
    return bytes > of_block ? 0 : std::min(Shape::kBlocksPerSm, of_multiprocessor / (bytes + reserved));
  };
  int slots = kOwnerSlots;
  while (blocks(slots + 1) >= std::max(blocks(kOwnerSlots), 1)) ++slots;
  return slots;
}

// That of a Shape's launch with `chunks` steps a row.
template <typename Shape>
SharedBytes shared_bytes_of(int chunks) {
  const int most = most_owner_slots<Shape>(), needed = owner_slots<Shape::kHeldSteps>(chunks);
  return {Shape::shared_bytes(needed <= most ? needed : kOwnerSlots), Shape::shared_bytes(most)};
}

// Lets launches of `kernel` have up to `bytes` on the current device. The limit is the kernel's, whichever
// thread launches it: it is set once, to the most, so that no thread lowers it between another's setting and
// launch.
inline cudaError_t allow_shared_bytes(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

// A launcher is written once as a sequence of launches over an arena of scratch memory; dry, the same
// sequence tells how large the arena is.
class Launcher {
 public:
  Launcher(void* workspace, cudaStream_t stream, bool dry)
      : base_(static_cast<char*>(workspace)), stream_(stream), dry_(dry) {}

  template <typename T>
  T* scratch(int64_t count) {
    const size_t offset = used_;
    used_ = (used_ + count * sizeof(T) + 255) / 256 * 256;
    return dry_ ? nullptr : reinterpret_cast<T*>(base_ + offset);
  }

  template <typename... Params, typename... Args>
  void launch(void (*kernel)(Params...), dim3 grid, int threads, SharedBytes shared, Args... args) {
    if (dry_ || error_ != cudaSuccess) return;
    if (shared.most > 48 * 1024) {
      error_ = allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared.most);
      if (error_ != cudaSuccess) return;
    }
    kernel<<<grid, threads, shared.used, stream_>>>(args...);
    error_ = cudaGetLastError();
  }

  template <typename... Params, typename... Args>
  void launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes, Args... args) {
    launch(kernel, grid, threads, SharedBytes{shared_bytes, shared_bytes}, args...);
  }

  // By the library of the caller.
  void multiply(MultiplyMatrices library, const MatrixProduct& product) {
    if (dry_ || error_ != cudaSuccess) return;
    error_ = library ? static_cast<cudaError_t>(library(&product, stream_)) : cudaErrorInvalidValue;
  }

  size_t used() const { return used_; }
  int error() const { return error_; }

 private:
  char* base_;
  cudaStream_t stream_;
  bool dry_;
  size_t used_ = 0;
  cudaError_t error_ = cudaSuccess;
};

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

inline int64_t round_up(int64_t a, int64_t b) {
  return (a + b - 1) / b * b;
}
inline unsigned blocks_for(int64_t count, int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return std::max(count, 1);
}

constexpr int kMinTilesPerSplit = 4;

// Parts of the walk over `tiles`, at most `limit`, that finish `row_blocks` owners soonest on a card with
// `slots` blocks at a time: waves of blocks times tiles per block. Fewer parts win ties.
inline int pick_splits(int requested, int64_t row_blocks, int64_t tiles, int64_t slots, int64_t limit) {
  if (requested > 0) return static_cast<int>(std::min<int64_t>({requested, tiles, kMaxSplits}));
  const int64_t most = std::min<int64_t>(kMaxSplits, limit);
  int best = 1;
  int64_t best_cost = 0;
  for (int parts = 1; parts <= std::max<int64_t>(most, 1); ++parts) {
    const int64_t waves = (row_blocks * parts + slots - 1) / slots;
    const int64_t cost = waves * ((tiles + parts - 1) / parts + 1);
    if (parts == 1 || cost < best_cost) {
      best = parts;
      best_cost = cost;
    }
  }
  return best;
}
inline int pick_splits(int requested, int64_t row_blocks, int64_t tiles, int64_t slots) {
  return pick_splits(requested, row_blocks, tiles, slots, tiles / kMinTilesPerSplit);
}

// The strided matrix a caller passed.
template <typename scalar_t>
struct Matrix {
  const scalar_t* data;
  int64_t strides[2];
  int64_t count;
  int64_t D;

  static constexpr int64_t kVector = 16 / sizeof(scalar_t);
  int64_t width() const { return round_up(D, kVector); }
  StridedRows<scalar_t> strided() const { return {data, strides[0], strides[1]}; }
  // Rows that 16-byte copies can read as they are.
  bool aligned() const {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[1] == 1 && D % kVector == 0 &&
           (strides[0] % kVector == 0 || count == 1);
  }
};

// Norms into `rnorm`, half squares into `half_square` (unless null) and, where the matrix is not aligned, a
// packed copy: the operand the kernels read.
template <typename scalar_t, typename acc_t>
Operand<scalar_t, acc_t> prepare(Launcher& launcher, const Matrix<scalar_t>& matrix, acc_t* rnorm,
                                 acc_t* half_square = nullptr) {
  const bool aligned = matrix.aligned();
  scalar_t* packed = aligned ? nullptr : launcher.scratch<scalar_t>(matrix.count * matrix.width());
  if ((rnorm || half_square || !aligned) && matrix.count > 0) {
    launcher.launch(prepare_rows_kernel<scalar_t, acc_t>, blocks_for(matrix.count, kRowWarps),
                    kRowWarps * kWarpSize, 0, matrix.data, matrix.strides[0], matrix.strides[1], matrix.count,
                    matrix.D, aligned, rnorm, half_square, packed, matrix.width());
  }
  return {aligned ? matrix.data : packed, aligned ? matrix.strides[0] : matrix.width(), matrix.count, rnorm};
}

// Calls f with the engine that multiplies operands of a Dtype.
template <typename F>
void with_engine(int dtype, bool allow_tf32, F f) {
  switch (dtype) {
    case kFloat64: return f(FmaEngine<double>());
    case kFloat16: return f(MmaEngine<__half>());
    case kBFloat16: return f(MmaEngine<__nv_bfloat16>());
    default: break;
  }
  if (allow_tf32) return f(MmaEngine<float>());
  return f(FmaEngine<float>());
}

// Rows of 512 bytes and more, with exact products of float of more than one step: their gradients are made
// from stored coefficients (coefficient_blocks.cuh), which on paper is faster from there on (docs/gpu.md).
template <typename Engine>
constexpr bool is_wide(int64_t D) {
  const int64_t bytes = D * static_cast<int64_t>(sizeof(typename Engine::scalar_t));
  return std::is_base_of_v<FmaEngine<float>, Engine> ? bytes > kTileRowBytes : bytes >= 4 * kTileRowBytes;
}

// Calls f with the accumulator of a ProductShape that holds rows that are not wide, as its kWarpsM and
// kSliceChunks.
template <typename scalar_t, typename F>
void with_shape_for_narrow_rows(int64_t D, F f) {
  if constexpr (sizeof(scalar_t) == 2) {
    if (D <= 128) return f(Constant<4>(), Constant<2>());
  }
  return f(Constant<4>(), Constant<4>());
}

// Rows of more than 1024 bytes, wider than the accumulator of any ProductShape.
template <typename scalar_t>
constexpr bool exceeds_accumulators(int64_t D) {
  return D * static_cast<int64_t>(sizeof(scalar_t)) > 8 * kTileRowBytes;
}

// Calls f with the narrowest accumulator that holds D, or the widest one.
template <typename scalar_t, typename F>
void with_shape_for_width(int64_t D, F f) {
  if constexpr (sizeof(scalar_t) == 2) {
    if (D <= 128) return f(Constant<4>(), Constant<2>());
    if (D <= 256) return f(Constant<4>(), Constant<4>());
    return f(Constant<2>(), Constant<8>());
  } else {
    return f(Constant<4>(), Constant<8>());
  }
}

}  // namespace ssl_kernels
