// What kernels on AMX share: eight tile registers of 16 rows x 64 bytes, with which a step of depth
// multiplies two tiles of a by two of b, bfloat16, into four tiles of sums, float32.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 11)
#define SSL_KERNELS_AMX 1
#include <immintrin.h>

#include <algorithm>
#endif

namespace ssl_kernels::cpu::amx {

// Whether processor and kernel let this process use AMX. Asks the kernel on the first call.
bool can_run();

#ifdef SSL_KERNELS_AMX
#define SSL_KERNELS_AMX_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")))

constexpr int64_t kSide = 16;                // rows of a tile, and its columns in units of 32 bits
constexpr int64_t kUnits = kSide * kSide;    // of a tile
constexpr int64_t kRowBytes = 4 * kSide;     // of a tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// From here on the thread may use tiles; _tile_release ends it.
SSL_KERNELS_AMX_TARGET inline void configure_tiles() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}

// Loads and stores of tiles do not tell the compiler what they touch.
inline void memory_fence() { __asm__ volatile("" ::: "memory"); }

SSL_KERNELS_AMX_TARGET inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= kSide ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// A block of kRows x kColumns tiles of sums in registers 0 to 3, tiles of a in 4 and 5, of b in 6 and 7.
template <int kRows, int kColumns>
struct Block {
  // Addresses of neighbouring tiles of an operand lie `next` bytes apart, rows of a tile `stride` bytes.
  static SSL_KERNELS_AMX_TARGET inline void load_a(const void* a, int64_t next, int64_t stride = kRowBytes) {
    _tile_loadd(4, a, stride);
    if constexpr (kRows == 2) _tile_loadd(5, static_cast<const char*>(a) + next, stride);
  }
  static SSL_KERNELS_AMX_TARGET inline void load_b(const void* b, int64_t next, int64_t stride = kRowBytes) {
    _tile_loadd(6, b, stride);
    if constexpr (kColumns == 2) _tile_loadd(7, static_cast<const char*>(b) + next, stride);
  }
  static SSL_KERNELS_AMX_TARGET inline void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kRows == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kRows == 2 && kColumns == 2) _tile_dpbf16ps(3, 5, 7);
  }
  static SSL_KERNELS_AMX_TARGET inline void set_to_zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  static SSL_KERNELS_AMX_TARGET inline void load(const float* c, int64_t ld) {
    const int64_t stride = ld * static_cast<int64_t>(sizeof(float));
    _tile_loadd(0, c, stride);
    if constexpr (kColumns == 2) _tile_loadd(1, c + kSide, stride);
    if constexpr (kRows == 2) _tile_loadd(2, c + kSide * ld, stride);
    if constexpr (kRows == 2 && kColumns == 2) _tile_loadd(3, c + kSide * ld + kSide, stride);
  }
  static SSL_KERNELS_AMX_TARGET inline void store(float* c, int64_t ld) {
    const int64_t stride = ld * static_cast<int64_t>(sizeof(float));
    _tile_stored(0, c, stride);
    if constexpr (kColumns == 2) _tile_stored(1, c + kSide, stride);
    if constexpr (kRows == 2) _tile_stored(2, c + kSide * ld, stride);
    if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, c + kSide * ld + kSide, stride);
  }
};

// c (rows, columns) = or += block (32, 32), times row_factor_i * column_factor_j unless these are null.
SSL_KERNELS_AMX_TARGET inline void hand_over(const float* block, float* c, int64_t ld, int64_t rows,
                                             int64_t columns, bool add, const float* row_factor = nullptr,
                                             const float* column_factor = nullptr) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t column = 0; column < columns; column += kSide) {
      const __mmask16 mask = first(columns - column);
      float* to = c + r * ld + column;
      __m512 sum = _mm512_load_ps(block + r * 2 * kSide + column);
      if (row_factor) {  // their product first: s_ij and s_ji have the same bits
        const __m512 factor = _mm512_maskz_loadu_ps(mask, column_factor + column);
        sum = _mm512_mul_ps(sum, _mm512_mul_ps(factor, _mm512_set1_ps(row_factor[r])));
      }
      if (add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to));
      _mm512_mask_storeu_ps(to, mask, sum);
    }
}
#endif

}  // namespace ssl_kernels::cpu::amx
