// What the memory instructions share: counting a warp-wide access.
#pragma once
#include "../machine.h"

namespace ptx {

inline bool is_shared(Space space, uint64_t address) {
  return space == Space::kShared || (space == Space::kGeneric && in_window(address, kSharedWindow));
}

inline bool is_global(Space space, uint64_t address) {
  if (space == Space::kGeneric)
    return !in_window(address, kSharedWindow) && !in_window(address, kLocalWindow);
  return space == Space::kGlobal;
}

inline void count_shared(Counters& counters, const uint64_t* addresses, LaneMask lanes, int bytes) {
  ++counters.shared_requests;
  counters.shared_wavefronts += count_wavefronts(addresses, lanes, bytes);
  counters.shared_wavefronts_ideal += count_ideal_wavefronts(addresses, lanes, bytes);
}

inline void count_global_load(Counters& counters, const uint64_t* addresses, LaneMask lanes, int bytes) {
  ++counters.global_load_requests;
  counters.global_load_sectors += count_sectors(addresses, lanes, bytes);
  counters.global_load_bytes += std::popcount(lanes) * bytes;
}

inline void count_global_store(Counters& counters, const uint64_t* addresses, LaneMask lanes, int bytes) {
  ++counters.global_store_requests;
  counters.global_store_sectors += count_sectors(addresses, lanes, bytes);
  counters.global_store_bytes += std::popcount(lanes) * bytes;
}

// The state space and cache modifiers of ld, st, atom and red that change nothing here: one memory, no
// caches.
inline void accept_memory_order(Decoding& decoding) {
  decoding.accept_one({"weak", "volatile", "relaxed", "acquire", "release", "acq_rel"});
  decoding.accept_one({"cta", "cluster", "gpu", "sys"});
}

// .L2::cache_hint adds an operand, the policy, as the last of `operands` and one more.
inline void accept_policy(Decoding& decoding, int operands) {
  const bool policy = decoding.accept("L2::cache_hint");
  decoding.expect_operands(operands + policy, operands + policy);
  if (policy) decoding.ignore(operands);
}

inline void accept_cache_hints(Decoding& decoding, int operands) {
  decoding.accept_one({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
  decoding.accept_one(
      {"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate"});
  decoding.accept_one({"L2::evict_normal", "L2::evict_first", "L2::evict_last"});
  decoding.accept_one({"L2::64B", "L2::128B", "L2::256B"});
  accept_policy(decoding, operands);
}

}  // namespace ptx
