// Products of blocks of rows by AVX-512, float32 and bfloat16, whose right operand was packed once for many
// products.
//
// Both kinds move units of 32 bits: one float32 number, or two bfloat16 numbers that are next to each other
// along the depth and are multiplied and added up in float32 by one instruction (vdpbf16ps). A depth that is
// odd ends in a unit half of which is 0.
// Tiling: panels of 64 columns, (panel, depth, 64) units, the last one narrowed to a multiple of 16. A strip
//   of 6 rows by a panel is 24 vectors of sums in registers: a step of depth reads 4 vectors of the panel and
//   6 units of the left operand, which is read where it lies, for 24 multiply-adds. The depth is cut at 128
//   units, 32 KB of a panel.
// Speed: 116 GFLOP/s in float32 and 230 in bfloat16 for 256 x 256 x 128 to 1024 on one core of an AMD EPYC
//   (Zen 4), which has 118 and 237; oneDNN's float32 kernels run at 95 to 105 there. 160 and 105 on an Intel
//   Xeon (Sapphire Rapids), where AMX takes the bfloat16 products (packed_amx.h).
#pragma once

#include <cstdint>

namespace ssl_kernels::cpu::packed {

constexpr int64_t kPanel = 64, kLanes = 16;

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Units of a packed right operand.
inline int64_t size_of(int64_t depth, int64_t columns) { return depth * rounded_up(columns, kLanes); }

// c_ij = sum_k a_ik b_kj * row_factor_i * column_factor_j, or += with `add`. Factors that are null count as
// 1.
struct Product {
  int64_t rows, columns, depth;
  const uint32_t* a;         // unit (i, k) lies at a[i * row_stride + k * step_stride]
  int64_t row_stride, step_stride;  // one of them is 1
  const uint32_t* b;         // packed
  float* c;
  int64_t ld_c;
  bool add;
  const float *row_factor = nullptr, *column_factor = nullptr;  // both or none
};

// Of bfloat16 units, by AMX where it has them, or of float32 units. On the instruction sets from kAvx512Bf16
// or kAvx512 on (tile_math.h), as what follows.
void multiply(bool in_bfloat16, const Product& product);

// Whether float32 rows are packed here: not where AMX multiplies them (product_amx.h).
bool is_chosen_for_float32();

// Packs b whose columns are rows that lie as units, one after the other along the depth.
void pack_transposed(const uint32_t* rows, int64_t ld, int64_t columns, int64_t depth, uint32_t* to);

// Packs b (count, columns), float32.
void pack_float32(const float* rows, int64_t ld, int64_t count, int64_t columns, uint32_t* to);

// Packs b (count, columns), bfloat16: a unit is two numbers of the same column. ceil(count / 2) units deep.
void pack_bfloat16(const uint16_t* rows, int64_t ld, int64_t count, int64_t columns, uint32_t* to);

// What coefficients lose by rounding, times the logits they belong to: with it a gradient of the logits'
// scale is as it was.
struct Lost {
  const float* values;  // logits, or their exponentials, base 2
  int64_t ld;
  bool exponentials;
  const float* column_inverse;  // 1 / column_factor, null where there are no factors
  // sum_j (c_ij - rounded_ij) and the same times logit_ij, in units of row_factor_i; logits of -inf count
  // nothing.
  float *coefficients, *products;
};

// The bfloat16 numbers nearest to c_ij * row_factor_i * column_factor_j as left operands. by_rows: unit (i,
// k) holds columns 2k and 2k + 1 of row i. by_columns: unit (j, k) holds rows 2k and 2k + 1 of column j, at
// by_columns[k * ld_columns + j]. Either may be null; both are written up to the next even number of rows and
// columns, and by_columns to whole vectors.
void round_to_bfloat16(const float* c, int64_t ld, int64_t rows, int64_t columns, const float* row_factor,
                       const float* column_factor, uint32_t* by_rows, int64_t ld_rows, uint32_t* by_columns,
                       int64_t ld_columns, const Lost& lost);

}  // namespace ssl_kernels::cpu::packed
