#include "races.h"

#include <cstring>

namespace ptx {
namespace {

uint32_t block_of(uint32_t thread) { return (thread - 1) >> 10; }
uint32_t warp_of(uint32_t thread) { return ((thread - 1) & 1023) / 32; }
bool same_warp(uint32_t a, uint32_t b) { return (a - 1) / 32 == (b - 1) / 32; }

}  // namespace

bool AccessHistory::unordered(const Access& access, const Accessor& accessor,
                              const RaceOptions& options) const {
  if (access.thread == 0 || access.thread == accessor.thread) return false;
  // Shared memory of an earlier block is out of sight: its clocks are smaller than any of this block's.
  if (!shared_ && block_of(access.thread) != block_of(accessor.thread)) return options.between_blocks;
  const uint32_t warp = warp_of(access.thread);
  if (access.clock < accessor.seen[warp]) return false;
  if (warp != warp_of(accessor.thread)) return true;
  return options.within_warps && access.warp_epoch == accessor.warp_epoch;
}

void AccessHistory::note_read(Cell& cell, const Access& now) {
  Access& last = cell.reader;
  if (last.thread && !same_warp(last.thread, now.thread)) {
    if (block_of(last.thread) != block_of(now.thread)) cell.read_by_blocks = true;
    cell.other_reader = last;
    cell.read_by_lanes = false;
  } else if (last.clock != now.clock || last.warp_epoch != now.warp_epoch) {
    cell.read_by_lanes = false;
  } else if (last.thread != now.thread) {
    cell.read_by_lanes = true;
  }
  last = now;
}

void AccessHistory::note_atomic(Cell& cell, const Access& now) {
  Access& last = cell.atomic;
  if (last.thread && !same_warp(last.thread, now.thread)) {
    if (block_of(last.thread) != block_of(now.thread)) cell.updated_by_blocks = true;
    cell.other_atomic = last;
  }
  last = now;
}

const char* AccessHistory::check(Cell& cell, AccessKind kind, const Accessor& accessor,
                                 const RaceOptions& options, bool same_value) {
  const auto conflicts = [&](const Access& access) {
    if (!unordered(access, accessor, options)) return false;
    other_thread_ = access.thread;
    return true;
  };
  const Access now = {accessor.thread, accessor.clock, accessor.warp_epoch};
  const bool several_blocks_matter = !shared_ && options.between_blocks;
  const auto updated_meanwhile = [&] {
    return conflicts(cell.atomic) || conflicts(cell.other_atomic) ||
           (several_blocks_matter && cell.updated_by_blocks);
  };
  if (kind == AccessKind::kRead) {
    if (conflicts(cell.writer)) return "read conflicts with an unordered write";
    if (cell.atomic.thread && updated_meanwhile()) ++reads_of_atomics_;
    note_read(cell, now);
    return nullptr;
  }
  if (conflicts(cell.writer) && !same_value) {
    return kind == AccessKind::kWrite ? "write conflicts with an unordered write"
                                      : "atomic conflicts with an unordered plain write";
  }
  if (kind == AccessKind::kAtomic) {
    note_atomic(cell, now);
    return nullptr;
  }
  if (conflicts(cell.reader) || conflicts(cell.other_reader)) return "write conflicts with an unordered read";
  if (several_blocks_matter && cell.read_by_blocks) return "write conflicts with reads by other blocks";
  if (options.within_warps && cell.read_by_lanes && cell.reader.clock == now.clock &&
      cell.reader.warp_epoch == now.warp_epoch && same_warp(cell.reader.thread, now.thread)) {
    return "write conflicts with reads by other lanes";
  }
  if (cell.atomic.thread && updated_meanwhile()) {
    return "plain write conflicts with an unordered atomic";
  }
  cell.writer = now;
  return nullptr;
}

const char* AccessHistory::record(uint64_t offset, int bytes, AccessKind kind, const Accessor& accessor,
                                  const RaceOptions& options, const uint8_t* old_bytes,
                                  const uint8_t* new_bytes) {
  const uint64_t end = offset + bytes;
  while (offset < end) {
    const uint64_t word = offset / 4;
    const bool whole = offset % 4 == 0 && end - offset >= 4;
    const Word here = at(word);
    if (whole && here.split == 0) {
      const bool same_value = new_bytes && std::memcmp(old_bytes, new_bytes, 4) == 0;
      if (const char* race = check(here.cell, kind, accessor, options, same_value)) return race;
    } else {
      if (here.split == 0) {
        bytes_.push_back({here.cell, here.cell, here.cell, here.cell});
        here.split = static_cast<uint32_t>(bytes_.size());
      }
      auto& cells = bytes_[here.split - 1];
      for (uint64_t at = offset; at < end && at / 4 == word; ++at) {
        const uint64_t i = at - offset;
        const bool same_value = new_bytes && old_bytes[i] == new_bytes[i];
        if (const char* race = check(cells[at % 4], kind, accessor, options, same_value)) return race;
      }
    }
    const uint64_t next = (word + 1) * 4;
    if (new_bytes) {
      old_bytes += next - offset;
      new_bytes += next - offset;
    }
    offset = next;
  }
  return nullptr;
}

}  // namespace ptx
