// Products of small row-major matrices, float32. They read their operands where these lie, so that tiles of
// 64 rows run as fast as large ones.
//   AMX: product_amx.cpp splits float32 numbers into bfloat16 ones, for products large enough to repay it.
//     One core of an Intel Xeon runs 220 to 300 GFLOP/s at tiles of 128 to 256 rows, oneDNN's kernels 180.
//   AVX-512: packed.h, a panel of the right operand packed at a time. What multiplies many tiles packs them
//   once, itself. AVX2: strips of 6 x 16 in product.cpp. One core of an AMD EPYC (Zen 3) runs 93 to 97
//     GFLOP/s at tiles of 64 to 512 rows, and torch.mm of the same shapes 66 to 89.
// Everything else goes to that BLAS.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace ssl_kernels::cpu {

// How exactly float32 numbers are to be multiplied at least: as they are, each as the sum of two bfloat16
// numbers (16 bits, three products, where these are faster), or rounded to one.
enum class Precision { kFloat32, kBf16x3, kBf16 };

// What torch's settings allow for products of rows in `dtype`: docs/numerics.md has the switches.
inline Precision allowed_precision(at::ScalarType dtype) {
  if (dtype != at::kFloat) return Precision::kFloat32;
  const auto setting =
      at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return setting == at::Float32Precision::BF16   ? Precision::kBf16
         : setting == at::Float32Precision::TF32 ? Precision::kBf16x3
                                                 : Precision::kFloat32;
}

// Whether multiply_small<T> runs here. Always so or never in one process.
template <class T>
bool has_small_products();

// c (m, n) = a (m, k) * b (k, n), or += with `add`; ld: elements from row to row.
template <class T>
void multiply_small(int64_t m, int64_t n, int64_t k, const T* a, int64_t ld_a, const T* b, int64_t ld_b, T* c,
                    int64_t ld_c, bool add, Precision precision);

}  // namespace ssl_kernels::cpu
