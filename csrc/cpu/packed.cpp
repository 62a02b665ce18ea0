#include "packed.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "packed_amx.h"
#include "tile_math.h"

#ifdef SSL_KERNELS_X86
#include <immintrin.h>
#endif

namespace ssl_kernels::cpu::packed {

bool is_chosen_for_float32() { return isa() == Isa::kAvx512 || isa() == Isa::kAvx512Bf16; }

void pack_transposed(const uint32_t* rows, int64_t ld, int64_t columns, int64_t depth, uint32_t* to) {
  const auto& math = tile_math<float>();  // which moves any bits
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int64_t count = std::min(kPanel, columns - column), width = rounded_up(count, kLanes);
    if (count < width) std::fill_n(to, width * depth, 0u);
    math.transpose(reinterpret_cast<const float*>(rows + column * ld), ld, reinterpret_cast<float*>(to),
                   width, count, depth);
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

// log2(1 + t) / t for t in [-1/4, 1/2].
constexpr int kLog2Terms = 6;
constexpr float kLog2Series[kLog2Terms] = {1.44269163e+00f,  -7.21170358e-01f, 4.81222781e-01f,
                                           -3.69515000e-01f, 2.95478579e-01f,  -1.52775847e-01f};

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
        const __m512i odd =
            _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(two ? mask : 0, row + j + (two ? ld : 0)));
        _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
  }
}

// log2(x) to about 1e-4 of itself, which is enough for what rounding took away.
SSL_KERNELS_TARGET inline __m512 log2_of(__m512 x) {
  const __m512 exponent = _mm512_getexp_ps(_mm512_mul_ps(x, _mm512_set1_ps(4 / 3.f)));
  const __m512 t =
      _mm512_sub_ps(_mm512_scalef_ps(x, _mm512_sub_ps(_mm512_setzero_ps(), exponent)), _mm512_set1_ps(1));
  __m512 p = _mm512_set1_ps(kLog2Series[kLog2Terms - 1]);
  for (int k = kLog2Terms - 2; k >= 0; --k) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(kLog2Series[k]));
  return _mm512_fmadd_ps(p, t, exponent);
}

// One row's share of what is lost.
struct LostSums {
  __m512 coefficients, products;
};

template <bool kExponentials>
SSL_KERNELS_TARGET inline void add_lost(LostSums& sums, __m512 exact, __m512i rounded, const float* values,
                                        __mmask16 mask, __m512 inverse) {
  const __m512 x = _mm512_maskz_loadu_ps(mask, values);
  const __m512 nothing = _mm512_set1_ps(kExponentials ? 0.f : -std::numeric_limits<float>::infinity());
  const __mmask16 counted = _mm512_mask_cmp_ps_mask(mask, x, nothing, _CMP_NEQ_UQ);
  const __m512 logit = kExponentials ? log2_of(x) : x;
  const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(exact, _mm512_castsi512_ps(rounded)), inverse);
  sums.coefficients = _mm512_mask_add_ps(sums.coefficients, counted, sums.coefficients, rest);
  sums.products = _mm512_mask3_fmadd_ps(rest, logit, sums.products, counted);
}

template <bool kFactors, bool kExponentials>
SSL_KERNELS_TARGET void round_rows(const float* c, int64_t ld, int64_t rows, int64_t columns,
                                   const float* row_factor, const float* column_factor, uint32_t* by_rows,
                                   int64_t ld_rows, uint32_t* by_columns, int64_t ld_columns,
                                   const Lost& lost) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i pairs =
      _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(kLanes)), 16));
  const __m512i upper_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t i = 0; i < rows; i += 2) {
    const bool two = i + 1 < rows;
    const float *upper = c + i * ld, *lower = upper + (two ? ld : 0);
    const __m512 first_factor = _mm512_set1_ps(kFactors ? row_factor[i] : 1.f);
    const __m512 second_factor = _mm512_set1_ps(kFactors && two ? row_factor[i + 1] : 1.f);
    const float *upper_values = lost.values + i * lost.ld, *lower_values = upper_values + (two ? lost.ld : 0);
    LostSums of_upper{_mm512_setzero_ps(), _mm512_setzero_ps()}, of_lower = of_upper;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const __mmask16 mask = first(columns - j), second = two ? mask : static_cast<__mmask16>(0);
      __m512 even = _mm512_maskz_loadu_ps(mask, upper + j), odd = _mm512_maskz_loadu_ps(second, lower + j);
      __m512 inverse = _mm512_set1_ps(1);
      if constexpr (kFactors) {
        const __m512 factor = _mm512_maskz_loadu_ps(mask, column_factor + j);
        inverse = _mm512_maskz_loadu_ps(mask, lost.column_inverse + j);
        even = _mm512_mul_ps(even, _mm512_mul_ps(factor, first_factor));
        odd = _mm512_mul_ps(odd, _mm512_mul_ps(factor, second_factor));
      }
      const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
      const __m512i units = _mm512_permutexvar_epi16(pairs, both);
      add_lost<kExponentials>(of_upper, even, _mm512_slli_epi32(units, 16), upper_values + j, mask, inverse);
      add_lost<kExponentials>(of_lower, odd, _mm512_and_si512(units, upper_half), lower_values + j, second,
                              inverse);
      if (by_rows) {
        const __mmask8 count = static_cast<__mmask8>(first((columns - j + 1) / 2));
        uint32_t* to = by_rows + i * ld_rows + j / 2;
        _mm256_mask_storeu_epi32(to, count, _mm512_castsi512_si256(both));
        if (two)
          _mm256_mask_storeu_epi32(to + ld_rows, count, _mm512_maskz_extracti64x4_epi64(0xff, both, 1));
      }
      if (by_columns) _mm512_storeu_si512(by_columns + i / 2 * ld_columns + j, units);
    }
    lost.coefficients[i] = _mm512_reduce_add_ps(of_upper.coefficients);
    lost.products[i] = _mm512_reduce_add_ps(of_upper.products);
    if (!two) continue;
    lost.coefficients[i + 1] = _mm512_reduce_add_ps(of_lower.coefficients);
    lost.products[i + 1] = _mm512_reduce_add_ps(of_lower.products);
  }
}
}  // namespace bfloat16
#undef SSL_KERNELS_TARGET

}  // namespace

void multiply(bool in_bfloat16, const Product& product) {
  static const bool has_amx = isa() >= Isa::kAmx;
  if (!in_bfloat16)
    float32::multiply(product);
  else if (has_amx && amx::is_worthwhile(product))
    amx::multiply(product);
  else
    bfloat16::multiply(product);
}

void pack_bfloat16(const uint16_t* rows, int64_t ld, int64_t count, int64_t columns, uint32_t* to) {
  bfloat16::pack(rows, ld, count, columns, to);
}

void round_to_bfloat16(const float* c, int64_t ld, int64_t rows, int64_t columns, const float* row_factor,
                       const float* column_factor, uint32_t* by_rows, int64_t ld_rows, uint32_t* by_columns,
                       int64_t ld_columns, const Lost& lost) {
  const auto round =
      row_factor
          ? (lost.exponentials ? bfloat16::round_rows<true, true> : bfloat16::round_rows<true, false>)
          : (lost.exponentials ? bfloat16::round_rows<false, true> : bfloat16::round_rows<false, false>);
  round(c, ld, rows, columns, row_factor, column_factor, by_rows, ld_rows, by_columns, ld_columns, lost);
}

#else  // nothing asks for them: isa() is below kAvx512

void multiply(bool, const Product&) { TORCH_INTERNAL_ASSERT(false); }
void pack_bfloat16(const uint16_t*, int64_t, int64_t, int64_t, uint32_t*) { TORCH_INTERNAL_ASSERT(false); }
void round_to_bfloat16(const float*, int64_t, int64_t, int64_t, const float*, const float*, uint32_t*,
                       int64_t, uint32_t*, int64_t, const Lost&) {
  TORCH_INTERNAL_ASSERT(false);
}

#endif

}  // namespace ssl_kernels::cpu::packed
