// batch_hard on the CPU. For each row i the j != i of its own label with the largest key, and the j of
//   another label with the smallest, where k_ij = h_j - <x^_i, x^_j> and h_j = 1/2 |x^_j|^2 (0 for the cosine
//   distance).
// Tiling: tiles.h, tiles on and above the diagonal, each serving its rows with the keys h_j - s_ij and its
//   columns with h_i - s_ij. Tiles of a parallel round share no block, so the best of a row has one owner: no
//   atomics.
// Work: half of 2*N*N*D for the products. Of an entry, two keys, two comparisons of classes and four of keys;
//   a row's index is looked for only in tiles whose best key beats or equals that of the tiles before.
// Memory: the rows in acc_t, twice where small products run (product.h), 7 numbers per row, the scratch.
// Numerics: products, h and keys in acc_t. Equal keys go by index, so the order of the tiles does not matter.
//   Where a key could leave the range of acc_t or is NaN, a plain loop takes the place of the vectorised one.
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
#include <tuple>
#include <vector>

#include "../ops/batch_hard.h"
#include "tiles.h"

namespace ssl_kernels::cpu {
namespace {

// Labels as 32-bit numbers: themselves where they fit, else their ranks.
std::vector<int32_t> classes_of(const at::Tensor& labels) {
  const at::Tensor contiguous = labels.contiguous();
  const int64_t* label = contiguous.const_data_ptr<int64_t>();
  const int64_t n = labels.numel();
  std::vector<int32_t> classes(n);
  bool fit = true;
  for (int64_t i = 0; i < n; ++i) {
    classes[i] = static_cast<int32_t>(label[i]);
    fit &= classes[i] == label[i];
  }
  if (fit) return classes;
  std::vector<int64_t> sorted(label, label + n);
  std::sort(sorted.begin(), sorted.end());
  for (int64_t i = 0; i < n; ++i)
    classes[i] =
        static_cast<int32_t>(std::lower_bound(sorted.begin(), sorted.end(), label[i]) - sorted.begin());
  return classes;
}

// The best key of each row so far and whose it is, -1 for nobody's. Sign is 1 where the largest wins, -1 the
// smallest.
template <class acc_t, int Sign>
class Best {
 public:
  explicit Best(int64_t n) : key_(n, -Sign * std::numeric_limits<acc_t>::infinity()), index_(n, -1) {}

  // Whether a key would win the row for one of the columns from `begin` on.
  bool contends(int64_t row, acc_t key, int64_t begin) const {
    return Sign * key > Sign * key_[row] || (key == key_[row] && begin < index_[row]);
  }

  void offer(int64_t row, acc_t key, int64_t index) {
    if (index_[row] >= 0 && !wins(key, index, key_[row], index_[row])) return;
    key_[row] = key;
    index_[row] = index;
  }

  at::Tensor result(const at::TensorOptions& options) const {
    const at::Tensor index = pooled({static_cast<int64_t>(index_.size())}, options.dtype(at::kLong));
    std::copy(index_.begin(), index_.end(), index.mutable_data_ptr<int64_t>());
    return index;
  }

 private:
  static bool wins(acc_t key, int64_t index, acc_t other, int64_t other_index) {
    if (std::isnan(key) != std::isnan(other)) return std::isnan(key);
    return Sign * key > Sign * other || (!(Sign * key < Sign * other) && index < other_index);
  }
  std::vector<acc_t> key_;
  std::vector<int64_t> index_;
};

template <class scalar_t, class acc_t>
std::tuple<at::Tensor, at::Tensor> mine(const at::Tensor& embeddings, const at::Tensor& labels,
                                        bool normalize, bool cosine) {
  Tiles<acc_t> tiles(load_rows<scalar_t, acc_t>(embeddings, normalize), std::nullopt);
  tiles.prepare(/*to_multiply=*/true, /*to_add_to_rows=*/false, /*to_add_to_columns=*/false);
  const auto& math = tile_math<acc_t>();
  const int64_t n = tiles.n, d = tiles.rows.values.size(1);
  const std::vector<int32_t> classes = classes_of(labels);
  std::vector<acc_t> half(n);
  const acc_t* x = tiles.rows.values.template const_data_ptr<acc_t>();
  for (int64_t i = 0; !cosine && i < n; ++i)
    half[i] = static_cast<acc_t>(math.dot(x + i * d, x + i * d, d) / 2);
  Best<acc_t, 1> farthest(n);
  Best<acc_t, -1> nearest(n);
  // No key is longer than 3/2 of this.
  const bool finite = tiles.rows.longest * tiles.rows.longest < std::numeric_limits<acc_t>::max() / 2;

  const auto visit_each = [&](const Tile<acc_t>& tile) {
    for (int64_t i = tile.i.begin; i < tile.i.begin + tile.i.size; ++i)
      for (int64_t j = tile.j.begin; j < tile.j.begin + tile.j.size; ++j) {
        if (j <= i) continue;
        const acc_t s = tile.at(i, j);
        const bool same = classes[i] == classes[j];
        same ? farthest.offer(i, half[j] - s, j) : nearest.offer(i, half[j] - s, j);
        same ? farthest.offer(j, half[i] - s, i) : nearest.offer(j, half[i] - s, i);
      }
  };

  const auto visit = [&](int64_t block_i, int64_t block_j, int thread) {
    const Tile<acc_t> tile = tiles.scratch(block_i, block_j, thread);
    tiles.multiply(tile);
    if (!finite) return visit_each(tile);
    const int64_t i0 = tile.i.begin, j0 = tile.j.begin;
    const bool mirrored = block_i != block_j;
    if (!mirrored)
      for (int64_t i = i0; i < i0 + tile.i.size; ++i) tile.at(i, i) = std::numeric_limits<acc_t>::quiet_NaN();

    acc_t row_far[kLargestTile], row_near[kLargestTile], col_far[kLargestTile], col_near[kLargestTile];
    int32_t far_row[kLargestTile], near_row[kLargestTile];
    const ColumnHardest<acc_t> columns{mirrored ? col_far : nullptr, col_near, far_row, near_row};
    math.hardest(tile.s, tile.ld, tile.i.size, tile.j.size, half.data() + i0, half.data() + j0,
                 classes.data() + i0, classes.data() + j0, row_far, row_near, columns);
    for (int64_t k = 0; k < tile.i.size; ++k) {
      const int64_t i = i0 + k;
      const auto find = [&](bool same, acc_t key) {
        return j0 + math.find_key(tile.s + k * tile.ld, tile.j.size, half.data() + j0, classes.data() + j0,
                                  classes[i], same, key);
      };
      if (farthest.contends(i, row_far[k], j0)) farthest.offer(i, row_far[k], find(true, row_far[k]));
      if (nearest.contends(i, row_near[k], j0)) nearest.offer(i, row_near[k], find(false, row_near[k]));
    }
    for (int64_t k = 0; mirrored && k < tile.j.size; ++k) {
      if (far_row[k] >= 0) farthest.offer(j0 + k, col_far[k], i0 + far_row[k]);
      if (near_row[k] >= 0) nearest.offer(j0 + k, col_near[k], i0 + near_row[k]);
    }
  };
  tiles.for_each(Owned::kBoth, visit);
  return {farthest.result(labels.options()), nearest.result(labels.options())};
}

// positive_index, negative_index
std::tuple<at::Tensor, at::Tensor> batch_hard(const at::Tensor& embeddings, const at::Tensor& labels,
                                              bool normalize, std::string_view distance) {
  check_batch_hard(embeddings, labels, distance);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return SSL_KERNELS_DISPATCH(embeddings.scalar_type(), "batch_hard", [&] {
    return mine<scalar_t, acc_t>(embeddings, labels, normalize, distance == "cosine");
  });
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) { library.impl("batch_hard.native", &batch_hard); }

}  // namespace
}  // namespace ssl_kernels::cpu
