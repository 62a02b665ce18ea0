// Orders in which tiles are visited so that no two tiles of one parallel round share a row block or a
// column block. Every block then has one owner at a time: no atomics, no buffer per thread, and sums
// that come out in the same order, bit for bit, whatever the number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace ssl_kernels::cpu {

// A run of rows (or columns).
struct Block {
  int64_t begin, size;
};

// n cut into blocks of one size, the last one ragged.
struct Blocks {
  int64_t n, size;
  int64_t count() const { return (n + size - 1) / size; }
  Block operator[](int64_t b) const { return {b * size, std::min(size, n - b * size)}; }
};

// visit(i, j, thread) for every unordered pair of `count` blocks, i == j included: first the diagonal, then a
// round-robin tournament by the circle method, in which round r pairs the blocks whose numbers add
// up to 2r modulo count - 1 (count made even by a block that sits out).
template <class Visit>
void for_each_pair(int64_t count, const Visit& visit) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) visit(i, i, at::get_thread_num());
  });
  const int64_t players = count + count % 2, others = players - 1;
  for (int64_t round = 0; round < others && count > 1; ++round) {
    at::parallel_for(0, players / 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t a = (round + k) % others;
        const int64_t b = k == 0 ? others : (round - k + others) % others;
        if (std::max(a, b) < count) visit(std::min(a, b), std::max(a, b), at::get_thread_num());
      }
    });
  }
}

// visit(i, j, thread) for every block i of `rows` and j of `columns`. Where rows only are owned, one thread
// walks all columns of its rows; columns likewise; where both are, the rounds are the shifted diagonals.
enum class Owned { kRows, kColumns, kBoth };

template <class Visit>
void for_each_tile(int64_t rows, int64_t columns, Owned owned, const Visit& visit) {
  if (owned == Owned::kBoth) {
    const int64_t rounds = std::max(rows, columns), width = std::min(rows, columns);
    for (int64_t round = 0; round < rounds; ++round) {
      at::parallel_for(0, width, 1, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          const int64_t shifted = (k + round) % rounds;
          visit(rows < columns ? k : shifted, rows < columns ? shifted : k, at::get_thread_num());
        }
      });
    }
    return;
  }
  const bool by_rows = owned == Owned::kRows;
  at::parallel_for(0, by_rows ? rows : columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t a = begin; a < end; ++a)
      for (int64_t b = 0; b < (by_rows ? columns : rows); ++b)
        visit(by_rows ? a : b, by_rows ? b : a, at::get_thread_num());
  });
}

}  // namespace ssl_kernels::cpu
