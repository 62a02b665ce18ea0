// Work on one tile by the classes of its rows and columns, in a version for each instruction set, as
// tile_math.h has them. The loops live in class_math.inc.
#pragma once

#include <cstdint>

namespace ssl_kernels::cpu {

// Numbers of rows or columns for pairs of other classes, and for those of their own.
template <class T>
struct ByClass {
  T *other, *own;
};

// Of a tile v (m, n) with leading dimension ld: its pairs of equal classes, but not i == j with
// `but_diagonal`.
template <class T>
struct ClassMath {
  // row_sum[i] = the sum of their v_ij and row_count[i] how many they are; column_sum[j] += v_ij and
  // column_count[j] += 1, unless these are null.
  void (*sums)(const T* v, int64_t ld, int64_t m, int64_t n, const int32_t* row_class,
               const int32_t* column_class, bool but_diagonal, T* row_sum, T* row_count, T* column_sum,
               T* column_count);

  // v_ij <- v_ij - (row_weight[i] + column_weight[j])
  void (*subtract)(T* v, int64_t ld, int64_t m, int64_t n, const int32_t* row_class,
                   const int32_t* column_class, bool but_diagonal, const T* row_weight,
                   const T* column_weight);

  // Of all pairs, those of equal classes (own) apart from the rest: of_rows.own[i] = the sum of the v_ij of
  // equal classes, of_rows.other[i] = that of the rest; of_columns.own[j] += v_ij or of_columns.other[j] +=
  // v_ij, unless these are null.
  void (*sums_apart)(const T* v, int64_t ld, int64_t m, int64_t n, const int32_t* row_class,
                     const int32_t* column_class, const ByClass<T>& of_rows, const ByClass<T>& of_columns);

  // out_ij = v_ij * (of_rows[i] + of_columns[j]), both own where classes are equal and other elsewhere; out
  // may be v.
  void (*coefficients_apart)(const T* v, int64_t ld, T* out, int64_t ld_out, int64_t m, int64_t n,
                             const int32_t* row_class, const int32_t* column_class,
                             const ByClass<const T>& of_rows, const ByClass<const T>& of_columns);
};

template <class T>
const ClassMath<T>& class_math();

}  // namespace ssl_kernels::cpu
