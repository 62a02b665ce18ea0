// Orders in which tiles are visited so that no two tiles of one parallel round share a row block or a
// column block. Every block then has one owner at a time: no atomics, no buffer per thread, and sums
// that come out in the same order, bit for bit, for the same blocks and number of threads.
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

// visit(i, j, thread) with i <= j for every unordered pair of `count` blocks, i == j included. Neighbouring
// blocks form groups; one thread visits all pairs of two groups, so that a row block stays in its cache along
// a row of tiles. The groups meet in a round-robin tournament by the circle method: round r pairs those whose
// numbers add up to 2r modulo groups - 1, and group r with the last. In round 0 each group also meets itself.
template <class Visit>
void for_each_pair(int64_t count, int64_t groups, const Visit& visit) {
  if (count == 1) return visit(0, 0, 0);
  groups = std::min(groups + groups % 2, count + count % 2);  // even; surplus groups are empty and sit out
  const auto first = [&](int64_t group) { return group * count / groups; };
  const auto meet = [&](int64_t a, int64_t b) {
    for (int64_t i = first(a); i < first(a + 1); ++i) {
      const int64_t begin = a == b ? i : first(b), end = first(b + 1);
      for (int64_t k = begin; k < end; ++k) {
        const bool forward = (i - first(a)) % 2 == 0;  // to and fro: the last column block is reused
        visit(i, forward ? k : begin + end - 1 - k, at::get_thread_num());
      }
    }
  };
  const int64_t others = groups - 1;
  for (int64_t round = 0; round < others; ++round) {
    at::parallel_for(0, groups / 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t a = (round + k) % others;
        const int64_t b = k == 0 ? others : (round - k + others) % others;
        if (round == 0) {
          meet(a, a);
          meet(b, b);
        }
        meet(std::min(a, b), std::max(a, b));
      }
    });
  }
}

// The same pairs in one round: part k of `parts` visits visit(i, j, k), a run of the triangle row by row, and
// the runs take about equally long where an entry of a block with itself takes 2 and any other 3. Four equal
// blocks become two runs of three pairs and two blocks with themselves. Parts share blocks: what a visit adds
// up must be a sum of its part's own.
template <class Visit>
void for_each_pair_in_parts(const Blocks& blocks, int64_t parts, const Visit& visit) {
  const int64_t count = blocks.count();
  const auto cost = [&](int64_t i, int64_t j) { return (i == j ? 2 : 3) * blocks[i].size * blocks[j].size; };
  int64_t all = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = i; j < count; ++j) all += cost(i, j);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      int64_t spent = 0;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = i; j < count; ++j) {
          const int64_t own = cost(i, j);
          if ((2 * spent + own) * parts / (2 * all) == part) visit(i, j, static_cast<int>(part));
          spent += own;
        }
    }
  });
}

// visit(i, j, thread) for every block i of `rows` and j of `columns`. Where rows only are owned, one thread
// walks all columns of its rows; columns likewise. Where both are, rows and columns form a group per thread;
// one thread visits all pairs of two groups, row by row as above, and the groups meet in rounds, each shifted
// by one.
enum class Owned { kRows, kColumns, kBoth };

template <class Visit>
void for_each_tile(int64_t rows, int64_t columns, Owned owned, int64_t threads, const Visit& visit) {
  if (owned == Owned::kBoth) {
    const int64_t groups = std::min({threads, rows, columns});
    for (int64_t round = 0; round < groups; ++round) {
      at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          const int64_t other = (k + round) % groups;
          const int64_t first = other * columns / groups, last = (other + 1) * columns / groups;
          for (int64_t i = k * rows / groups; i < (k + 1) * rows / groups; ++i)
            for (int64_t j = first; j < last; ++j)
              visit(i, i % 2 == 0 ? j : first + last - 1 - j, at::get_thread_num());
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

// The same tiles in one round: part k of `parts` visits visit(i, j, k), all rows of its share of the columns.
// Parts share rows: what a visit adds up for them must be a sum of its part's own.
template <class Visit>
void for_each_tile_in_parts(int64_t rows, int64_t columns, int64_t parts, const Visit& visit) {
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t j = part * columns / parts; j < (part + 1) * columns / parts; ++j)
        for (int64_t i = 0; i < rows; ++i) visit(i, j, static_cast<int>(part));
  });
}

}  // namespace ssl_kernels::cpu
