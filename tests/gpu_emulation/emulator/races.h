// Notices data races: two threads touching a byte, at least one writing, with nothing that orders them.
//
// Order comes from barriers. Each warp of a block has a clock that advances when it passes one, and remembers
// up to which clock the other warps' accesses lie before its own (vector clocks, one entry a warp; Lamport
// 1978, Flanagan and Freund, "FastTrack", 2009). Blocks are never ordered. Lanes of one warp are ordered by
// bar.warp.sync.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

constexpr int kMaxWarps = 32;

enum class AccessKind : uint8_t { kRead, kWrite, kAtomic };

// Number of a thread in the launch, plus one: 0 is nobody.
constexpr uint32_t thread_number(uint32_t block, uint32_t thread) { return (block << 10 | thread) + 1; }

// The state of the warp that makes an access.
struct Accessor {
  uint32_t thread;       // thread_number
  uint32_t clock;        // of its warp
  uint32_t warp_epoch;   // bar.warp.sync passed
  const uint32_t* seen;  // seen[w]: accesses of warp w with a smaller clock lie before this one
};

struct RaceOptions {
  bool between_blocks;
  bool within_warps;
};

// History of a piece of memory (shared memory of a block, or a region of global memory).
class AccessHistory {
 public:
  AccessHistory(uint64_t bytes, bool shared)
      : words_(bytes > kMostDense ? 0 : (bytes + 3) / 4), split_(words_.size()), shared_(shared) {}

  // Records an access and returns what is wrong with it, or null. `new_bytes`, where known, are what a write
  // stores: several threads writing what is there already is not taken for a race (compilers do it).
  const char* record(uint64_t offset, int bytes, AccessKind kind, const Accessor& accessor,
                     const RaceOptions& options, const uint8_t* old_bytes, const uint8_t* new_bytes);

  // The other thread of the last race.
  uint32_t other_thread() const { return other_thread_; }
  // Plain reads of memory that unordered threads update atomically.
  uint64_t reads_of_atomics() const { return reads_of_atomics_; }

 private:
  struct Access {
    uint32_t thread = 0;
    uint32_t clock = 0;
    uint32_t warp_epoch = 0;
  };

  // One byte, or a word while its four bytes have the same history.
  struct Cell {
    Access writer;
    Access reader;                   // the last
    Access other_reader;             // the last of another warp or block
    Access atomic;                   // the last
    Access other_atomic;             // the last of another warp or block
    bool read_by_lanes = false;      // of reader's warp, since its last bar.warp.sync
    bool read_by_blocks = false;     // several
    bool updated_by_blocks = false;  // several, atomically
  };

  bool unordered(const Access& access, const Accessor& accessor, const RaceOptions& options) const;
  const char* check(Cell& cell, AccessKind kind, const Accessor& accessor, const RaceOptions& options,
                    bool same_value);
  static void note_read(Cell& cell, const Access& now);
  static void note_atomic(Cell& cell, const Access& now);

  // Of a region with more bytes, only the pages that are touched have a history.
  static constexpr uint64_t kMostDense = uint64_t{1} << 24, kPageWords = 256;
  struct Page {
    std::array<Cell, kPageWords> words = {};
    std::array<uint32_t, kPageWords> split = {};
  };
  // A word's cell, and 0 or 1 + index in bytes_.
  struct Word {
    Cell& cell;
    uint32_t& split;
  };
  Word at(uint64_t word) {
    if (word < words_.size()) return {words_[word], split_[word]};
    std::unique_ptr<Page>& page = pages_[word / kPageWords];
    if (!page) page = std::make_unique<Page>();
    return {page->words[word % kPageWords], page->split[word % kPageWords]};
  }

  std::vector<Cell> words_;
  std::vector<uint32_t> split_;
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
  std::vector<std::array<Cell, 4>> bytes_;
  bool shared_;
  uint32_t other_thread_ = 0;
  uint64_t reads_of_atomics_ = 0;
};

}  // namespace ptx
