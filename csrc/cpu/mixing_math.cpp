#include "mixing_math.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "exp2.h"
#include "tile_math.h"

#ifdef SSL_KERNELS_X86
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a call that is not inlined

namespace ssl_kernels::cpu {
namespace {

namespace portable {
#define SSL_KERNELS_TARGET
constexpr int kVectorBytes = 16;
typedef float Floats __attribute__((vector_size(kVectorBytes)));

inline Floats from_half(const c10::Half* p) {
  Floats v;
  for (int k = 0; k < 4; ++k) v[k] = static_cast<float>(p[k]);
  return v;
}

inline void to_half(c10::Half* p, const Floats& v) {
  for (int k = 0; k < 4; ++k) p[k] = static_cast<c10::Half>(v[k]);
}
#include "mixing_math.inc"
#undef SSL_KERNELS_TARGET
}  // namespace portable

#ifdef SSL_KERNELS_X86
// Every processor with AVX2 that is known has the conversions of F16C too.
namespace avx2 {
#define SSL_KERNELS_TARGET __attribute__((target("avx2,fma,f16c")))
constexpr int kVectorBytes = 32;

SSL_KERNELS_TARGET inline __attribute__((always_inline)) __m256 from_half(const c10::Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

SSL_KERNELS_TARGET inline __attribute__((always_inline)) void to_half(c10::Half* p, const __m256& v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#include "mixing_math.inc"
#undef SSL_KERNELS_TARGET
}  // namespace avx2

namespace avx512 {
#define SSL_KERNELS_TARGET \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
constexpr int kVectorBytes = 64;

SSL_KERNELS_TARGET inline __attribute__((always_inline)) __m512 from_half(const c10::Half* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

SSL_KERNELS_TARGET inline __attribute__((always_inline)) void to_half(c10::Half* p, const __m512& v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
}
#include "mixing_math.inc"
#undef SSL_KERNELS_TARGET
}  // namespace avx512
#endif

}  // namespace

template <class S>
const MixingMath<S>& mixing_math() {
  return SSL_KERNELS_WIDEST(kMixingMath<S>);
}

template <class S>
const NormalizeMath<S>& normalize_math() {
  return SSL_KERNELS_WIDEST(kNormalizeMath<S>);
}

template <class S>
const CrossEntropyMath<S>& cross_entropy_math() {
  return SSL_KERNELS_WIDEST(kCrossEntropyMath<S>);
}

template <class T>
const PatchMath<T>& patch_math() {
  return SSL_KERNELS_WIDEST(kPatchMath<T>);
}

template <class T>
const ColumnMath<T>& column_math() {
  return SSL_KERNELS_WIDEST(kColumnMath<T>);
}

template <class H, class S>
MomentumMath<H, S> momentum_math() {
  return SSL_KERNELS_WIDEST(momentum<H, S>);
}

template const MixingMath<float>& mixing_math();
template const MixingMath<double>& mixing_math();
template const MixingMath<c10::BFloat16>& mixing_math();
template const MixingMath<c10::Half>& mixing_math();
template const NormalizeMath<float>& normalize_math();
template const NormalizeMath<c10::BFloat16>& normalize_math();
template const NormalizeMath<c10::Half>& normalize_math();
template const CrossEntropyMath<float>& cross_entropy_math();
template const CrossEntropyMath<double>& cross_entropy_math();
template const CrossEntropyMath<c10::BFloat16>& cross_entropy_math();
template const CrossEntropyMath<c10::Half>& cross_entropy_math();
template const PatchMath<float>& patch_math();
template const PatchMath<double>& patch_math();
template const ColumnMath<float>& column_math();
template const ColumnMath<double>& column_math();
template MomentumMath<c10::Half, float> momentum_math();
template MomentumMath<c10::Half, c10::Half> momentum_math();
template MomentumMath<c10::Half, c10::BFloat16> momentum_math();
template MomentumMath<c10::BFloat16, float> momentum_math();
template MomentumMath<c10::BFloat16, c10::Half> momentum_math();
template MomentumMath<c10::BFloat16, c10::BFloat16> momentum_math();

}  // namespace ssl_kernels::cpu
