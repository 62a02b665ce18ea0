// Products of packed bfloat16 units (packed.h) on AMX.
#pragma once

#include "packed.h"

namespace ssl_kernels::cpu::packed::amx {

// Whether it is faster than AVX512_BF16: measured from 16 x 16 x 32 numbers on, 1.4 times.
inline bool is_worthwhile(const Product& p) {
  return p.rows >= 2 && p.rows * p.columns * p.depth >= 16 * 16 * 16;
}

// As packed::multiply of bfloat16 units, where amx::can_run() (amx.h).
void multiply(const Product& product);

}  // namespace ssl_kernels::cpu::packed::amx
