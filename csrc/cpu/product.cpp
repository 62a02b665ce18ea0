#include "product.h"

#include <ATen/native/CPUBlas.h>

#include <cstring>

#include "tile_math.h"

namespace ssl_kernels::cpu {
namespace {

// torch refuses where its oneDNN or the processor lacks the kernels: ask it once.
bool probe() {
  if (std::strcmp(instruction_set(), "avx512") != 0) return false;
  const float a = 2, b = 3;
  float c = 0;
  try {
    at::native::cpublas::brgemm(1, 1, 1, 1, 1, 1, false, &a, &b, &c, /*is_vnni=*/false);
  } catch (const c10::Error&) {
    return false;
  }
  return c == 6;
}

}  // namespace

template <>
bool has_small_products<float>() {
  static const bool works = probe();
  return works;
}

template <>
bool has_small_products<double>() {
  return false;
}

template <>
void multiply_small(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a, const float* b, int64_t ld_b,
                    float* c, int64_t ld_c, bool add) {
  at::native::cpublas::brgemm(m, n, k, ld_a, ld_b, ld_c, add, a, b, c, /*is_vnni=*/false);
}

template <>
void multiply_small(int64_t, int64_t, int64_t, const double*, int64_t, const double*, int64_t, double*, int64_t,
                    bool) {
  TORCH_INTERNAL_ASSERT(false, "there are no small products of float64");
}

}  // namespace ssl_kernels::cpu
