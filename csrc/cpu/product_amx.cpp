// Products of float32 matrices on tiles of bfloat16. A float32 number of 24 bits is the sum of three bfloat16
// numbers of 8 bits each, exactly:
//
//   x = x0 + x1 + x2      x0 = bf16(x)      x1 = bf16(x - x0)      x2 = x - x0 - x1
//
// so x y = x0 y0 + (x0 y1 + x1 y0) + (x0 y2 + x1 y1 + x2 y0) and what is below 2^-23 |x y|, left out. The
// five small products are added up first, over all the depth, so that sums round as often as float32's own:
// the error is a quarter of torch.mm's at 128 of depth. A number below 2^-110 loses its x2, which AMX takes
// for 0. Where less is asked for, numbers are split into two pieces, with x0 y0 + (x0 y1 + x1 y0), or rounded
// to one.
//
// Tiling: operands are copied piece by piece into AMX tiles of 16 x 64 bytes, a in blocks of 16 rows by 32 of
//   depth, b in blocks of 32 of depth by 16 columns (pairs of rows interleaved). A block of 32 x 32 of c is
//   four tiles of sums.
// Work: for such a block a step of 32 of depth is 24 tile products of 16 cycles, and 18 loads of 8 cycles
//   beside them: 2.7 times the rate of two AVX-512 units, less the copying (about 9 cycles for 32 numbers).
//   Measured for 256 x 256 x 128:
//   44 us of products (38 by this count) and 9 us of copying; 93 us by AVX-512.
// Memory: 6 bytes per number of two panels of at most 256 rows or columns by 128 of depth, 393 KB per thread.
#include "product_amx.h"

#include <algorithm>
#include <vector>

#include "amx.h"

#ifdef SSL_KERNELS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ssl_kernels::cpu::amx {

#ifdef SSL_KERNELS_AMX
namespace {

constexpr int64_t kStep = 32;     // bfloat16 numbers of a row of a tile
constexpr int64_t kTile = 512;    // bfloat16 numbers of a tile
constexpr int kMostPieces = 3;    // of a float32 number
constexpr int64_t kPanel = 256;   // rows of a and columns of b at once
constexpr int64_t kDepth = 128;   // a row of blocks of b stays in the first-level cache: 24 KB for 32 columns
constexpr int64_t kSteps = kDepth / kStep;

// Panels of a and b in tiles: (blocks of 16, steps, pieces, 16, 32).
struct alignas(64) Workspace {
  uint16_t a[kPanel / kSide * kSteps * kMostPieces * kTile];
  uint16_t b[kPanel / kSide * kSteps * kMostPieces * kTile];
  float c[4 * kSide * kSide];
};

// x without what a bfloat16 number cannot hold, to the nearest (halves away from 0). A NaN may become 0.
SSL_KERNELS_AMX_TARGET inline __m512 rounded(__m512 x) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

template <int kPieces>
struct Pieces {
  __m512i part[kPieces];  // bfloat16 numbers in the upper halves
};

// The last piece is NaN where x is.
template <int kPieces>
SSL_KERNELS_AMX_TARGET inline Pieces<kPieces> split(__m512 x) {
  Pieces<kPieces> pieces;
  for (int piece = 0; piece + 1 < kPieces; ++piece) {
    const __m512 part = rounded(x);
    pieces.part[piece] = _mm512_castps_si512(part);
    x = _mm512_sub_ps(x, part);
  }
  if constexpr (kPieces < kMostPieces) {
    const __m512i quiet_nan = _mm512_set1_epi32(0x7fc00000);
    const __m512i last = _mm512_castps_si512(rounded(x));
    pieces.part[kPieces - 1] = _mm512_mask_mov_epi32(last, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet_nan);
  } else {
    pieces.part[kPieces - 1] = _mm512_castps_si512(x);
  }
  return pieces;
}

// Rows of a (rows, depth), depth <= kDepth; 0 past the last row and column.
template <int kPieces>
SSL_KERNELS_AMX_TARGET void pack_rows(const float* a, int64_t ld, int64_t rows, int64_t depth, uint16_t* to) {
  const int64_t blocks = (rows + kSide - 1) / kSide, steps = (depth + kStep - 1) / kStep;
  alignas(64) uint16_t upper_halves[kStep];
  for (int i = 0; i < kStep; ++i) upper_halves[i] = static_cast<uint16_t>(2 * i + 1);
  const __m512i halves = _mm512_load_si512(upper_halves);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t step = 0; step < steps; ++step, to += kPieces * kTile) {
      const int64_t width = depth - step * kStep;
      const __mmask16 left = first(width), right = first(width - kSide);
      for (int64_t r = 0; r < kSide; ++r) {
        const int64_t row = block * kSide + r;
        const float* from = a + std::min(row, rows - 1) * ld + step * kStep;
        const auto low = split<kPieces>(_mm512_maskz_loadu_ps(row < rows ? left : 0, from));
        const auto high = split<kPieces>(_mm512_maskz_loadu_ps(row < rows ? right : 0, from + kSide));
        for (int piece = 0; piece < kPieces; ++piece)
          _mm512_store_si512(to + piece * kTile + r * kStep,
                             _mm512_permutex2var_epi16(low.part[piece], halves, high.part[piece]));
      }
    }
}

// Columns of b (depth, columns), depth <= kDepth; 0 past the last row and column.
template <int kPieces>
SSL_KERNELS_AMX_TARGET void pack_columns(const float* b, int64_t ld, int64_t depth, int64_t columns,
                                         uint16_t* to) {
  const int64_t blocks = (columns + kSide - 1) / kSide, steps = (depth + kStep - 1) / kStep;
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t block = 0; block < blocks; ++block) {
    const __mmask16 mask = first(columns - block * kSide);
    for (int64_t step = 0; step < steps; ++step, to += kPieces * kTile)
      for (int64_t r = 0; r < kSide; ++r) {
        const int64_t row = step * kStep + 2 * r;
        const float* from = b + std::min(row, depth - 1) * ld + block * kSide;
        const auto even = split<kPieces>(_mm512_maskz_loadu_ps(row < depth ? mask : 0, from));
        const auto odd = split<kPieces>(
            _mm512_maskz_loadu_ps(row + 1 < depth ? mask : 0, from + (row + 1 < depth ? ld : 0)));
        for (int piece = 0; piece < kPieces; ++piece)
          _mm512_store_si512(to + piece * kTile + r * kStep,
                             _mm512_or_si512(_mm512_srli_epi32(even.part[piece], 16),
                                             _mm512_and_si512(odd.part[piece], upper)));
      }
  }
}

// The products of blocks of a and b, `stride` bytes from block to block.
template <int kPieces, int kRows, int kColumns>
SSL_KERNELS_AMX_TARGET void multiply_block(const uint16_t* a, const uint16_t* b, int64_t steps, float* c,
                                           int64_t ld) {
  using B = Block<kRows, kColumns>;
  const int64_t stride = steps * kPieces * kTile * static_cast<int64_t>(sizeof(uint16_t));
  B::set_to_zero();
  for (int64_t step = 0; step < steps; ++step) {
    const uint16_t *a0 = a + step * kPieces * kTile, *a1 = a0 + kTile, *a2 = a1 + kTile;
    const uint16_t *b0 = b + step * kPieces * kTile, *b1 = b0 + kTile, *b2 = b1 + kTile;
    if constexpr (kPieces == 3) {
      B::load_a(a1, stride);
      B::load_b(b1, stride);
      B::multiply();
      B::load_b(b0, stride);
      B::multiply();
      B::load_a(a2, stride);
      B::multiply();
      B::load_a(a0, stride);
      B::load_b(b2, stride);
      B::multiply();
      B::load_b(b1, stride);
      B::multiply();
    } else if constexpr (kPieces == 2) {
      B::load_a(a1, stride);
      B::load_b(b0, stride);
      B::multiply();
      B::load_a(a0, stride);
      B::load_b(b1, stride);
      B::multiply();
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    B::load_a(a + step * kPieces * kTile, stride);
    B::load_b(b + step * kPieces * kTile, stride);
    B::multiply();
  }
  B::store(c, ld);
}

template <int kPieces>
SSL_KERNELS_AMX_TARGET void multiply_panels(const uint16_t* a, const uint16_t* b, int64_t m, int64_t n,
                                            int64_t depth, float* c, int64_t ld_c, bool add, float* scratch) {
  // Of a row or column.
  const int64_t steps = (depth + kStep - 1) / kStep, stride = steps * kPieces * kTile / kSide;
  for (int64_t column = 0; column < n; column += 2 * kSide)
    for (int64_t row = 0; row < m; row += 2 * kSide) {
      const int64_t rows = std::min(2 * kSide, m - row), columns = std::min(2 * kSide, n - column);
      float* out = c + row * ld_c + column;
      for (int64_t r = 2 * kSide; r < std::min(4 * kSide, m - row); ++r)
        // The next block.
        for (int64_t j = 0; j < columns; j += kSide) __builtin_prefetch(out + r * ld_c + j, 1);
      const bool whole = !add && rows % kSide == 0 && columns % kSide == 0;
      const auto run =
          rows > kSide ? (columns > kSide ? multiply_block<kPieces, 2, 2> : multiply_block<kPieces, 2, 1>)
                       : (columns > kSide ? multiply_block<kPieces, 1, 2> : multiply_block<kPieces, 1, 1>);
      run(a + row * stride, b + column * stride, steps, whole ? out : scratch, whole ? ld_c : 2 * kSide);
      if (!whole) hand_over(scratch, out, ld_c, rows, columns, add);
    }
}

bool asked() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return false;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!(edx & kAmxBf16) || !(edx & kAmxTile)) return false;
  // Linux keeps the tiles' state for processes that asked for it.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

template <int kPieces>
SSL_KERNELS_AMX_TARGET void multiply_pieces(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a,
                                            const float* b, int64_t ld_b, float* c, int64_t ld_c, bool add) {
  static thread_local std::vector<Workspace> kept(1);
  Workspace& workspace = kept[0];
  configure_tiles();
  for (int64_t depth = 0; depth < k; depth += kDepth) {
    const int64_t steps = std::min(kDepth, k - depth);
    for (int64_t column = 0; column < n; column += kPanel) {
      const int64_t columns = std::min(kPanel, n - column);
      pack_columns<kPieces>(b + depth * ld_b + column, ld_b, steps, columns, workspace.b);
      for (int64_t row = 0; row < m; row += kPanel) {
        const int64_t rows = std::min(kPanel, m - row);
        pack_rows<kPieces>(a + row * ld_a + depth, ld_a, rows, steps, workspace.a);
        memory_fence();
        multiply_panels<kPieces>(workspace.a, workspace.b, rows, columns, steps, c + row * ld_c + column,
                                 ld_c, add || depth > 0, workspace.c);
      }
    }
  }
  _tile_release();
}

}  // namespace

bool can_run() {
  static const bool answer = asked();
  return answer;
}

void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a, const float* b, int64_t ld_b,
              float* c, int64_t ld_c, bool add, Precision precision) {
  const auto multiply = precision == Precision::kBf16     ? multiply_pieces<1>
                        : precision == Precision::kBf16x3 ? multiply_pieces<2>
                                                          : multiply_pieces<kMostPieces>;
  multiply(m, n, k, a, ld_a, b, ld_b, c, ld_c, add);
}

#else

bool can_run() { return false; }

void multiply(int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, bool,
              Precision) {}

#endif

}  // namespace ssl_kernels::cpu::amx
