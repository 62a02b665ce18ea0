// Products of float32 matrices by AMX, whose tiles multiply bfloat16 numbers and add up in float32.
#pragma once

#include <cstdint>

#include "product.h"

namespace ssl_kernels::cpu::amx {

// Whether splitting the operands costs less than AMX saves.
inline bool is_worthwhile(int64_t m, int64_t n, int64_t k) {
  return m >= 64 && n >= 64 && m * n > 2 * 64 * 64 && k >= 32;
}

// As multiply_small.
void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a, const float* b, int64_t ld_b,
              float* c, int64_t ld_c, bool add, Precision precision);

}  // namespace ssl_kernels::cpu::amx
