#include "packed.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "tile_math.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SSL_KERNELS_X86 1
#include <immintrin.h>
#endif

namespace ssl_kernels::cpu::packed {

void pack_transposed(const uint32_t* rows, int64_t ld, int64_t columns, int64_t depth, uint32_t* to) {
  const auto& math = tile_math<float>();  // which moves any bits
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int64_t count = std::min(kPanel, columns - column), width = rounded_up(count, kLanes);
    if (count < width) std::fill_n(to, width * depth, 0u);
    math.transpose(reinterpret_cast<const float*>(rows + column * ld), ld, reinterpret_cast<float*>(to), width, count,
                   depth);
    to += width * depth;
  }
}

void pack_float32(const float* rows, int64_t ld, int64_t count, int64_t columns, uint32_t* to) {
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int64_t width = std::min(kPanel, columns - column), padded = rounded_up(width, kLanes);
    for (int64_t k = 0; k < count; ++k, to += padded) {
      std::memcpy(to, rows + k * ld + column, width * sizeof(float));
      std::fill(to + width, to + padded, 0u);
    }
  }
}

#ifdef SSL_KERNELS_X86
namespace {

constexpr int64_t kRows = 6, kDepth = 128;

#define SSL_KERNELS_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))

SSL_KERNELS_TARGET inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// Where a strip's sums go.
struct Out {
  float* c;
  int64_t ld;
  __mmask16 last;  // of the last vector of a row
  bool add;
  const float *row_factor, *column_factor;
};

namespace float32 {
SSL_KERNELS_TARGET inline __m512 step(__m512 sums, __m512i left, __m512i right) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sums);
}
#include "packed.inc"
}  // namespace float32

#undef SSL_KERNELS_TARGET
#define SSL_KERNELS_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))

namespace bfloat16 {
SSL_KERNELS_TARGET inline __m512 step(__m512 sums, __m512i left, __m512i right) {
  return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right));
}
#include "packed.inc"

SSL_KERNELS_TARGET void pack(const uint16_t* rows, int64_t ld, int64_t count, int64_t columns, uint32_t* to) {
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int64_t width = std::min(kPanel, columns - column);
    for (int64_t k = 0; k < count; k += 2) {
      const uint16_t* row = rows + k * ld + column;
      for (int64_t j = 0; j < width; j += kLanes, to += kLanes) {
        const __mmask16 mask = first(width - j);
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + j));
        const bool two = k + 1 < count;
        const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(two ? mask : 0, row + j + (two ? ld : 0)));
        _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
  }
}

template <bool kFactors>
SSL_KERNELS_TARGET void round_rows(const float* c, int64_t ld, int64_t rows, int64_t columns, const float* row_factor,
                                   const float* column_factor, uint32_t* by_rows, int64_t ld_rows, uint32_t* by_columns,
                                   int64_t ld_columns) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i pairs = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(kLanes)), 16));
  for (int64_t i = 0; i < rows; i += 2) {
    const bool two = i + 1 < rows;
    const float *upper = c + i * ld, *lower = upper + (two ? ld : 0);
    const __m512 first_factor = _mm512_set1_ps(kFactors ? row_factor[i] : 1.f);
    const __m512 second_factor = _mm512_set1_ps(kFactors && two ? row_factor[i + 1] : 1.f);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const __mmask16 mask = first(columns - j);
      __m512 even = _mm512_maskz_loadu_ps(mask, upper + j), odd = _mm512_maskz_loadu_ps(two ? mask : 0, lower + j);
      if constexpr (kFactors) {
        const __m512 factor = _mm512_maskz_loadu_ps(mask, column_factor + j);
        even = _mm512_mul_ps(even, _mm512_mul_ps(factor, first_factor));
        odd = _mm512_mul_ps(odd, _mm512_mul_ps(factor, second_factor));
      }
      const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
      if (by_rows) {
        const __mmask8 units = static_cast<__mmask8>(first((columns - j + 1) / 2));
        uint32_t* to = by_rows + i * ld_rows + j / 2;
        _mm256_mask_storeu_epi32(to, units, _mm512_castsi512_si256(both));
        if (two) _mm256_mask_storeu_epi32(to + ld_rows, units, _mm512_maskz_extracti64x4_epi64(0xff, both, 1));
      }
      if (by_columns) _mm512_storeu_si512(by_columns + i / 2 * ld_columns + j, _mm512_permutexvar_epi16(pairs, both));
    }
  }
}
}  // namespace bfloat16
#undef SSL_KERNELS_TARGET

}  // namespace

void multiply_float32(const Product& product) { float32::multiply(product); }

void multiply_bfloat16(const Product& product) { bfloat16::multiply(product); }

void pack_bfloat16(const uint16_t* rows, int64_t ld, int64_t count, int64_t columns, uint32_t* to) {
  bfloat16::pack(rows, ld, count, columns, to);
}

void round_to_bfloat16(const float* c, int64_t ld, int64_t rows, int64_t columns, const float* row_factor,
                       const float* column_factor, uint32_t* by_rows, int64_t ld_rows, uint32_t* by_columns,
                       int64_t ld_columns) {
  (row_factor ? bfloat16::round_rows<true> : bfloat16::round_rows<false>)(
      c, ld, rows, columns, row_factor, column_factor, by_rows, ld_rows, by_columns, ld_columns);
}

#else  // nothing asks for them: isa() is below kAvx512

void multiply_float32(const Product&) { TORCH_INTERNAL_ASSERT(false); }
void multiply_bfloat16(const Product&) { TORCH_INTERNAL_ASSERT(false); }
void pack_bfloat16(const uint16_t*, int64_t, int64_t, int64_t, uint32_t*) { TORCH_INTERNAL_ASSERT(false); }
void round_to_bfloat16(const float*, int64_t, int64_t, int64_t, const float*, const float*, uint32_t*, int64_t, uint32_t*,
                       int64_t) {
  TORCH_INTERNAL_ASSERT(false);
}

#endif

}  // namespace ssl_kernels::cpu::packed
