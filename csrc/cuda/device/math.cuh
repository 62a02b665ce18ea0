// Arithmetic shared by the kernels for float and double accumulation, and conversions from the storage types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

#include <cstdint>
#include <type_traits>

namespace ssl_kernels {

template <typename T>
struct Math;

template <>
struct Math<float> {
  static constexpr float kLog2e = 1.44269504088896341f;
  static constexpr float kTiny = 1.1754943508222875e-38f;
  static constexpr float kNormEps = 1e-12f;
  static __device__ __forceinline__ float infinity() { return CUDART_INF_F; }
  // Relative error 2^-22; results under 2^-126 become 0.
  static __device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  // log(1 + x) for 0 <= x <= 1, relative error 2^-22: x times a Chebyshev fit of log(1 + x) / x.
  static __device__ __forceinline__ float log1p_unit(float x) {
    float y = -0.003256378462538123f;
    y = fma(y, x, 0.019907161593437195f);
    y = fma(y, x, -0.057064201682806015f);
    y = fma(y, x, 0.10614264756441116f);
    y = fma(y, x, -0.15311862528324127f);
    y = fma(y, x, 0.19678117334842682f);
    y = fma(y, x, -0.24954558908939362f);
    y = fma(y, x, 0.33330005407333374f);
    y = fma(y, x, -0.4999990463256836f);
    y = fma(y, x, 1.0f);
    return x * y;
  }
  static __device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }
  static __device__ __forceinline__ float sqrt(float x) { return __fsqrt_rn(x); }
  static __device__ __forceinline__ float abs(float x) { return fabsf(x); }
  static __device__ __forceinline__ float max(float x, float y) { return fmaxf(x, y); }
  static __device__ __forceinline__ float fma(float x, float y, float z) { return __fmaf_rn(x, y, z); }
  // A product that the compiler must not fuse with a following addition.
  static __device__ __forceinline__ float mul(float x, float y) { return __fmul_rn(x, y); }
};

template <>
struct Math<double> {
  static constexpr double kLog2e = 1.44269504088896341;
  static constexpr double kLn2 = 0.693147180559945309;
  static constexpr double kTiny = 2.2250738585072014e-308;
  static constexpr double kNormEps = 1e-12;
  static __device__ __forceinline__ double infinity() { return CUDART_INF; }
  static __device__ __forceinline__ double exp2(double x) { return ::exp2(x); }
  static __device__ __forceinline__ double log2(double x) { return ::log2(x); }
  static __device__ __forceinline__ double log1p_unit(double x) { return ::log1p(x); }
  // Of x within float's range: two steps of Newton's from its 22 bits, without the slow path of a division.
  static __device__ __forceinline__ double reciprocal(double x) {
    double y = __fdividef(1.0f, static_cast<float>(x));
    y = __fma_rn(y, __fma_rn(-x, y, 1.0), y);
    return __fma_rn(y, __fma_rn(-x, y, 1.0), y);
  }
  static __device__ __forceinline__ double sqrt(double x) { return __dsqrt_rn(x); }
  static __device__ __forceinline__ double abs(double x) { return ::fabs(x); }
  static __device__ __forceinline__ double max(double x, double y) { return ::fmax(x, y); }
  static __device__ __forceinline__ double fma(double x, double y, double z) { return __fma_rn(x, y, z); }
  static __device__ __forceinline__ double mul(double x, double y) { return __dmul_rn(x, y); }
};

__device__ __forceinline__ float to_acc(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_acc(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_acc(float x) {
  return x;
}
__device__ __forceinline__ double to_acc(double x) {
  return x;
}

template <typename scalar_t, typename acc_t>
__device__ __forceinline__ scalar_t from_acc(acc_t x) {
  if constexpr (sizeof(scalar_t) == sizeof(acc_t)) {
    return x;
  } else if constexpr (std::is_same_v<scalar_t, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// 16 bytes of scalar_t, for vector access.
template <typename scalar_t>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(scalar_t);
  scalar_t value[kSize];
};

// Two neighbours in one access.
template <typename scalar_t>
struct alignas(2 * sizeof(scalar_t)) Pair {
  scalar_t value[2];
};

// Both in one store; `global` points to global memory, aligned to two values. Written out because the
// compiler may split the store of a Pair.
__device__ __forceinline__ void store_pair(float* global, float x, float y) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(global), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ void store_pair(double* global, double x, double y) {
  asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(global), "d"(x), "d"(y) : "memory");
}

// The same of 16 bytes to shared memory.
__device__ __forceinline__ void store_vector(void* shared, const Vector<float>& x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "f"(x.value[0]), "f"(x.value[1]), "f"(x.value[2]), "f"(x.value[3])
               : "memory");
}

__device__ __forceinline__ void store_vector(void* shared, const Vector<double>& x) {
  asm volatile(
      "st.shared.v2.f64 [%0], {%1, %2};" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "d"(x.value[0]), "d"(x.value[1])
      : "memory");
}

}  // namespace ssl_kernels
