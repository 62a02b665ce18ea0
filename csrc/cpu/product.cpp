#include "product.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "packed.h"
#include "product_amx.h"
#include "tile_math.h"

namespace ssl_kernels::cpu {
namespace {

#ifdef SSL_KERNELS_X86
// c in strips of kRows x 16, whose 12 vectors of sums stay in registers along the depth: a step of it reads 2
// vectors of b and 6 numbers of a for 12 multiply-adds, two of which are begun in a cycle. The 16 columns of
// b are copied next to each other once for all strips, since rows of b a power of two apart would share the
// sets of the first-level cache.
namespace avx2 {
#define SSL_KERNELS_TARGET __attribute__((target("avx2,fma")))

constexpr int64_t kRows = 6, kLanes = 8, kColumns = 2 * kLanes;
constexpr int64_t kDepth = 256;  // 16 KB of b, half of a first-level cache

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4)));

template <int kCount>
SSL_KERNELS_TARGET inline void multiply_strip(int64_t k, const float* a, int64_t ld_a, const float* b,
                                              float* c, int64_t ld_c, bool add) {
  Vector sum[kCount][2] = {};
  for (int64_t d = 0; d < k; ++d) {
    const Vector left = *reinterpret_cast<const Vector*>(b + d * kColumns);
    const Vector right = *reinterpret_cast<const Vector*>(b + d * kColumns + kLanes);
#pragma GCC unroll 6
    for (int row = 0; row < kCount; ++row) {
      const float x = a[row * ld_a + d];
      const Vector all = {x, x, x, x, x, x, x, x};
      sum[row][0] += all * left;
      sum[row][1] += all * right;
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kCount; ++row)
    for (int half = 0; half < 2; ++half) {
      Vector* out = reinterpret_cast<Vector*>(c + row * ld_c + half * kLanes);
      *out = add ? *out + sum[row][half] : sum[row][half];
    }
}

SSL_KERNELS_TARGET void multiply_rows(int64_t m, int64_t k, const float* a, int64_t ld_a, const float* b,
                                      float* c, int64_t ld_c, bool add) {
  for (; m >= kRows; m -= kRows, a += kRows * ld_a, c += kRows * ld_c)
    multiply_strip<kRows>(k, a, ld_a, b, c, ld_c, add);
  if (m == 5) multiply_strip<5>(k, a, ld_a, b, c, ld_c, add);
  if (m == 4) multiply_strip<4>(k, a, ld_a, b, c, ld_c, add);
  if (m == 3) multiply_strip<3>(k, a, ld_a, b, c, ld_c, add);
  if (m == 2) multiply_strip<2>(k, a, ld_a, b, c, ld_c, add);
  if (m == 1) multiply_strip<1>(k, a, ld_a, b, c, ld_c, add);
}

SSL_KERNELS_TARGET void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a,
                                 const float* b, int64_t ld_b, float* c, int64_t ld_c, bool add) {
  alignas(64) float panel[kDepth * kColumns];
  for (int64_t depth = 0; depth < k; depth += kDepth, add = true) {
    const int64_t steps = std::min(kDepth, k - depth);
    for (int64_t column = 0; column < n; column += kColumns) {
      const int64_t width = std::min(kColumns, n - column);
      for (int64_t d = 0; d < steps; ++d) {
        const float* from = b + (depth + d) * ld_b + column;
        float* to = panel + d * kColumns;
        if (width == kColumns)
          std::memcpy(to, from, sizeof(float) * kColumns);
        else
          std::fill(std::copy_n(from, width, to), to + kColumns, 0.f);
      }
      const float* a_here = a + depth;
      float* c_here = c + column;
      if (width == kColumns) {
        multiply_rows(m, steps, a_here, ld_a, panel, c_here, ld_c, add);
        continue;
      }
      for (int64_t row = 0; row < m; row += kRows) {  // at the ragged edge through a strip of its own
        float strip[kRows * kColumns];
        const int64_t rows = std::min(kRows, m - row);
        multiply_rows(rows, steps, a_here + row * ld_a, ld_a, panel, strip, kColumns, false);
        for (int64_t r = 0; r < rows; ++r) {
          float* out = c_here + (row + r) * ld_c;
          for (int64_t j = 0; j < width; ++j)
            out[j] = add ? out[j] + strip[r * kColumns + j] : strip[r * kColumns + j];
        }
      }
    }
  }
}

#undef SSL_KERNELS_TARGET
}  // namespace avx2
#endif

using Multiply = void (*)(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a, const float* b,
                          int64_t ld_b, float* c, int64_t ld_c, bool add);

namespace avx512 {
// A panel of b at a time, packed for all rows of a.
void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a, const float* b, int64_t ld_b,
              float* c, int64_t ld_c, bool add) {
  constexpr int64_t kDepth = 128;
  alignas(64) uint32_t panel[kDepth * packed::kPanel];
  for (int64_t depth = 0; depth < k; depth += kDepth)
    for (int64_t column = 0; column < n; column += packed::kPanel) {
      const int64_t steps = std::min(kDepth, k - depth), width = std::min(packed::kPanel, n - column);
      packed::pack_float32(b + depth * ld_b + column, ld_b, steps, width, panel);
      packed::multiply(/*in_bfloat16=*/false, {m, width, steps, reinterpret_cast<const uint32_t*>(a + depth),
                                               ld_a, 1, panel, c + column, ld_c, add || depth > 0});
    }
}
}  // namespace avx512

Multiply chosen() {
  static const Multiply multiply = []() -> Multiply {
    if (isa() >= Isa::kAvx512) return avx512::multiply;
#ifdef SSL_KERNELS_X86
    if (isa() >= Isa::kAvx2) return avx2::multiply;
#endif
    return nullptr;
  }();
  return multiply;
}

}  // namespace

template <>
bool has_small_products<float>() {
  return chosen() != nullptr;
}

template <>
bool has_small_products<double>() {
  return false;
}

template <>
void multiply_small(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a, const float* b,
                    int64_t ld_b, float* c, int64_t ld_c, bool add, Precision precision) {
  static const bool has_amx = isa() >= Isa::kAmx;
  if (has_amx && amx::is_worthwhile(m, n, k))
    return amx::multiply(m, n, k, a, ld_a, b, ld_b, c, ld_c, add, precision);
  chosen()(m, n, k, a, ld_a, b, ld_b, c, ld_c, add);
}

template <>
void multiply_small(int64_t, int64_t, int64_t, const double*, int64_t, const double*, int64_t, double*,
                    int64_t, bool, Precision) {
  TORCH_INTERNAL_ASSERT(false, "there are no small products of float64");
}

}  // namespace ssl_kernels::cpu
