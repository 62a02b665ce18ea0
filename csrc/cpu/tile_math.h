// Elementwise work on one tile of logits and on rows, in a version for each instruction set.
//
// A tile is row-major, m x n with leading dimension ld. Its entries v_ij are dot products; factor * v_ij,
// with factor > 0, are logits in units of log 2, so that exp(s) is 2^(factor * v). -inf where an entry is
// left out of the sums. factor * v - shift is one fused multiply-add where the processor has it.
// The loops live in tile_math.inc and are compiled three times; tile_math<T>() picks at run time.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

// `__VA_ARGS__` of the namespace of the widest instructions that this processor runs.
#if defined(__x86_64__) && defined(__GNUC__)
#define SSL_KERNELS_X86 1
#define SSL_KERNELS_WIDEST(...)                \
  (isa() >= Isa::kAvx512 ? avx512::__VA_ARGS__ \
   : isa() == Isa::kAvx2 ? avx2::__VA_ARGS__   \
                         : portable::__VA_ARGS__)
#else
#define SSL_KERNELS_WIDEST(...) (portable::__VA_ARGS__)
#endif

namespace ssl_kernels::cpu {

// What batch-hard mining keeps for each column of a tile.
template <class T>
struct ColumnHardest {
  T *far, *near;
  int32_t *far_row, *near_row;  // within the tile, -1 for none
};

// Sums over i of u_i * u_i and u_i * x_i, with u = x - y.
struct DifferenceSums {
  double squares, along;
};

// Sums over i of x_i * x_i, y_i * y_i and x_i * y_i.
struct ProductSums {
  double xx, yy, xy;
};

// factor * (sum_k weight[k] * u_k - along * x): the gradient by the row x of measures of it and the rows
// y[k], with u_k = x - y[k] (difference) or y[k]. y[1] may be null, and without `project` there is no term
// along x.
template <class T>
struct PairGradient {
  const T *x, *y[2];
  T weight[2], along, factor;
  bool difference, project;
};

template <class T>
struct TileMath {
  // row_sum[i] = sum_j 2^(factor * v_ij - shift), col_sum[j] += sum_i of it unless col_sum is null. With
  // `keep`, v_ij is overwritten by 2^(factor * v_ij - shift).
  void (*exp_sums)(T* v, int64_t ld, int64_t m, int64_t n, T factor, T shift, T* row_sum, T* col_sum,
                   bool keep);

  // row_max[i] = max_j v_ij, col_max[j] = max(col_max[j], max_i v_ij) unless col_max is null.
  void (*maxima)(const T* v, int64_t ld, int64_t m, int64_t n, T* row_max, T* col_max);

  // As exp_sums with a shift of its own for every row and every column (two exponentials per entry).
  void (*exp_sums_shifted)(const T* v, int64_t ld, int64_t m, int64_t n, T factor, const T* row_shift,
                           const T* col_shift, T* row_sum, T* col_sum);

  // out_ij = 2^(factor * v_ij - shift) * (row_weight[i] + col_weight[j]); col_weight may be null, out may be
  // v.
  void (*coefficients)(const T* v, int64_t ld, T* out, int64_t ld_out, int64_t m, int64_t n, T factor,
                       T shift, const T* row_weight, const T* col_weight);

  // The same of what exp_sums kept: out_ij = e_ij * (row_weight[i] + col_weight[j]).
  void (*coefficients_of_kept)(const T* e, int64_t ld, T* out, int64_t ld_out, int64_t m, int64_t n,
                               const T* row_weight, const T* col_weight);

  // out_ij = row_weight[i] * 2^(factor * v_ij - row_shift[i]) + col_weight[j] * 2^(factor * v_ij -
  // col_shift[j]); the column term is left out where col_weight is null, out may be v.
  void (*coefficients_shifted)(const T* v, int64_t ld, T* out, int64_t ld_out, int64_t m, int64_t n, T factor,
                               const T* row_shift, const T* row_weight, const T* col_shift,
                               const T* col_weight);

  // Online softmax of a tile of logits: top[i] rises to the maximum of row i, s_ij <- 2^(s_ij - top[i]) and
  // row_sum[i] is their sum. A row of -inf alone becomes 0.
  void (*softmax_rows)(T* s, int64_t ld, int64_t m, int64_t n, T* top, T* row_sum);

  // to (n, m) = the transpose of from (m, n).
  void (*transpose)(const T* from, int64_t ld_from, T* to, int64_t ld_to, int64_t m, int64_t n);

  // to (n, m) += the transpose of from (m, n).
  void (*add_transposed)(const T* from, int64_t ld_from, T* to, int64_t ld_to, int64_t m, int64_t n);

  // v_ij <- -inf where row_ids[i] == col_ids[j].
  void (*mask_equal_ids)(T* v, int64_t ld, int64_t m, int64_t n, const int64_t* row_ids,
                         const int64_t* col_ids);

  // v_ij <- -inf where row_ids[i] != col_ids[j].
  void (*mask_unequal_ids)(T* v, int64_t ld, int64_t m, int64_t n, const int64_t* row_ids,
                           const int64_t* col_ids);

  // v_ij <- shift - v_ij where row_ids[i] == col_ids[j]; row_sum[i] = the sum of the row after that, unless
  // it is null.
  void (*negate_equal_ids)(T* v, int64_t ld, int64_t m, int64_t n, const int64_t* row_ids,
                           const int64_t* col_ids, T shift, T* row_sum);

  // v_ij <- -inf where v_ij > row_limit[i] and v_ij > col_limit[j].
  void (*mask_above)(T* v, int64_t ld, int64_t m, int64_t n, const T* row_limit, const T* col_limit);

  // v_ij <- v_ij + bias[i], or + bias[j]; -inf stays.
  void (*add_to_rows)(T* v, int64_t ld, int64_t m, int64_t n, const T* bias);
  void (*add_to_columns)(T* v, int64_t ld, int64_t m, int64_t n, const T* bias);

  // row_sum[i] = sum_j v_ij and col_sum[j] = sum_i v_ij, each unless it is null.
  void (*sums)(const T* v, int64_t ld, int64_t m, int64_t n, T* row_sum, T* col_sum);

  // match[j] = 1 where the bits sets[j * words ...] have one in common with those of `set`, else 0.
  void (*match_bits)(T* match, const int64_t* sets, int64_t words, int64_t n, const int64_t* set);

  // *row_sum = sum of the s_j where match[j] is not 0, *row_count how many; col_sum[j] += s_j and
  // col_count[j] += 1 where match_back[j] is not 0, unless they are null.
  void (*matched_sums)(const T* s, int64_t n, const T* match, const T* match_back, T* row_sum, T* row_count,
                       T* col_sum, T* col_count);

  // c_j <- c_j - (row_weight where match[j] is not 0) - (col_weight[j] where match_back[j] is not 0)
  void (*subtract_matched)(T* c, int64_t n, const T* match, const T* match_back, T row_weight,
                           const T* col_weight);

  // With z_ij = s_ij + bias, in units of log 2: row_loss[i] = sum_j log(1 + 2^z_ij).
  void (*softplus_sums)(const T* s, int64_t ld, int64_t m, int64_t n, T bias, T* row_loss);

  // s_ij <- weight[i] / (1 + 2^-z_ij), row_sum[i] = their sum, and row_loss as above unless it is null;
  // weights that are null count as 1.
  void (*sigmoids)(T* s, int64_t ld, int64_t m, int64_t n, T bias, const T* weight, T* row_loss, T* row_sum);

  // With the keys col_half[j] - s_ij of row i: row_far[i] = the largest among the columns of its own class,
  // row_near[i] = the smallest among those of other classes, -inf and inf where there is none. With the keys
  // row_half[i] - s_ij of column j the same into `columns`, with the lowest rows that have them, unless
  // columns.far is null. A key that is NaN is passed over.
  void (*hardest)(const T* s, int64_t ld, int64_t m, int64_t n, const T* row_half, const T* col_half,
                  const int32_t* row_class, const int32_t* col_class, T* row_far, T* row_near,
                  const ColumnHardest<T>& columns);

  // The lowest j with half[j] - s_j == key whose class is (same) or is not (!same) class_of_row; n if there
  // is none.
  int64_t (*find_key)(const T* s, int64_t n, const T* half, const int32_t* classes, int32_t class_of_row,
                      bool same, T key);

  // x_i <- 2^x_i
  void (*exp2)(double* x, int64_t n);

  // sum_i a_i * b_i
  double (*dot)(const T* a, const T* b, int64_t n);

  // x <- a * x
  void (*scale)(T* x, T a, int64_t n);

  // x <- x + a * y
  void (*add_scaled)(T* x, const T* y, T a, int64_t n);

  // g <- a * (g - b * u): the gradient through a normalised row u.
  void (*project_out)(T* g, const T* u, T a, T b, int64_t n);

  // The sum of squares also where it leaves the range of T.
  DifferenceSums (*difference_sums)(const T* x, const T* y, int64_t n);

  // The same of x with y and of x with z, in one pass.
  std::array<DifferenceSums, 2> (*two_difference_sums)(const T* x, const T* y, const T* z, int64_t n);

  // softmax_rows of columns, of which there are at most 64: top[j] rises to the maximum of column j,
  // s_ij <- 2^(s_ij - top[j]) and col_sum[j] is their sum.
  void (*softmax_columns)(T* s, int64_t ld, int64_t m, int64_t n, T* top, T* col_sum);

  // v_ij <- factor[j] * v_ij
  void (*scale_columns)(T* v, int64_t ld, int64_t m, int64_t n, const T* factor);
};

// Rows of storage type S as rows of T, and back (round to nearest even).
template <class S, class T>
struct RowConversion {
  // Returns the sum of squares, also where it leaves the range of T.
  double (*load)(T* out, const S* x, int64_t n);
  // out <- a * x
  void (*load_scaled)(T* out, const S* x, T a, int64_t n);
  void (*store)(S* out, const T* x, int64_t n);
  // Nothing where a sum of squares leaves the range of T.
  std::optional<ProductSums> (*products)(const S* x, const S* y, int64_t n);
  // Sums of squares of three rows; likewise.
  std::optional<std::array<double, 3>> (*squares)(const S* x, const S* y, const S* z, int64_t n);
  // out <- a gradient of row_pairs, rounded once: see PairGradient.
  void (*pair_gradient)(S* out, const PairGradient<T>& gradient, int64_t n);
};

// Each has all of the ones before. AVX512_BF16 and AMX are for products of matrices (packed.h, product.h).
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The fastest that this processor and this build have, or the one that the environment variable
// SSL_KERNELS_CPU names ("amx", "avx512_bf16", "avx512", "avx2", "portable"); read once.
Isa isa();

const char* name_of(Isa isa);

// All that can run here, the widest first.
std::vector<Isa> runnable_isas();

template <class T>
const TileMath<T>& tile_math();

template <class S, class T>
const RowConversion<S, T>& row_conversion();

}  // namespace ssl_kernels::cpu
