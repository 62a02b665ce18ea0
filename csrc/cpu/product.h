// Products of small row-major matrices, float32. They read their operands where these lie, so that tiles of 64 rows run as
// fast as large ones.
//   AMX: product_amx.cpp splits float32 numbers into bfloat16 ones, for products large enough to repay it. One core of an
//     Intel Xeon runs 220 to 300 GFLOP/s at tiles of 128 to 256 rows, oneDNN's kernels 180.
//   AVX-512: packed.h, a panel of the right operand packed at a time. What multiplies many tiles packs them once, itself.
//   AVX2: strips of 6 x 16 in product.cpp. One core of an AMD EPYC (Zen 3) runs 93 to 97 GFLOP/s at tiles of 64 to 512
//     rows, and torch.mm of the same shapes 66 to 89.
// Everything else goes to that BLAS.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace ssl_kernels::cpu {

// Whether multiply_small<T> runs here. Always so or never in one process.
template <class T>
bool has_small_products();

// c (m, n) = a (m, k) * b (k, n), or += with `add`; ld: elements from row to row.
template <class T>
void multiply_small(int64_t m, int64_t n, int64_t k, const T* a, int64_t ld_a, const T* b, int64_t ld_b, T* c,
                    int64_t ld_c, bool add);

}  // namespace ssl_kernels::cpu
