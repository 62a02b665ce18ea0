// Streaming accesses to global memory of 1 to 16 bytes: each element is touched once, so lines leave the
// caches first.
#pragma once

#include <cstdint>

#include "math.cuh"

namespace ssl_kernels {

// kSize neighbours in one access, at most 16 bytes.
template <typename scalar_t, int kSize>
struct alignas(sizeof(scalar_t) * kSize) Chunk {
  static_assert(sizeof(scalar_t) * kSize <= 16, "an access has at most 16 bytes");
  scalar_t value[kSize];
};

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<1> {
  using type = uint8_t;
};
template <>
struct BitsOf<2> {
  using type = unsigned short;
};
template <>
struct BitsOf<4> {
  using type = unsigned;
};
template <>
struct BitsOf<8> {
  using type = uint2;
};
template <>
struct BitsOf<16> {
  using type = uint4;
};

template <typename T>
__device__ __forceinline__ T load_streaming(const T* global) {
  using Bits = typename BitsOf<sizeof(T)>::type;
  union {
    Bits bits;
    T value;
  } chunk = {__ldcs(reinterpret_cast<const Bits*>(global))};
  return chunk.value;
}

template <typename T>
__device__ __forceinline__ void store_streaming(T* global, const T& value) {
  using Bits = typename BitsOf<sizeof(T)>::type;
  __stcs(reinterpret_cast<Bits*>(global), *reinterpret_cast<const Bits*>(&value));
}

}  // namespace ssl_kernels
