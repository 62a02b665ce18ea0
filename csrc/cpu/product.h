// Products of small row-major matrices. For float32 on processors with AVX-512 they are oneDNN's batch-reduce
// kernels, which torch carries ("brgemm"): code made for one shape and kept by the thread that asked (0.1 ms
// and 20 KB a shape). They read their operands where these lie, and need none packed, so that tiles of 64 rows
// run as fast as large ones. Everything else goes to the BLAS that torch carries.
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
