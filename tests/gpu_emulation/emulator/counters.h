// What a launch did, and the rules by which memory instructions are counted.
#pragma once
#include <cstdint>

#include "lanes.h"

namespace ptx {

// In the order of kCounterNames.
struct Counters {
  uint64_t instructions = 0;
  uint64_t thread_instructions = 0;
  uint64_t divergent_instructions = 0;
  uint64_t mma = 0;
  uint64_t mma_flops = 0;
  uint64_t fma_flops = 0;
  uint64_t special_functions = 0;
  uint64_t global_load_requests = 0;
  uint64_t global_load_sectors = 0;
  uint64_t global_load_bytes = 0;
  uint64_t global_store_requests = 0;
  uint64_t global_store_sectors = 0;
  uint64_t global_store_bytes = 0;
  uint64_t shared_requests = 0;
  uint64_t shared_wavefronts = 0;
  uint64_t shared_wavefronts_ideal = 0;
  uint64_t barriers = 0;
  uint64_t atomics = 0;
  uint64_t async_copies = 0;
};

inline constexpr const char* kCounterNames =
    "instructions thread_instructions divergent_instructions mma mma_flops fma_flops special_functions "
    "global_load_requests global_load_sectors global_load_bytes global_store_requests global_store_sectors "
    "global_store_bytes shared_requests shared_wavefronts shared_wavefronts_ideal barriers atomics async_copies";

// The 32-byte sectors that the lanes touch, each of them `bytes` from its address (CUDA C++ Best Practices
// Guide, "Coalesced Access to Global Memory").
int count_sectors(const uint64_t* addresses, LaneMask lanes, int bytes);

// Passes over the 32 four-byte banks of shared memory: lanes that want different words of one bank take
// turns, equal words are read once. Accesses of 8 and 16 bytes go by half and quarter warps (CUDA C++
// Programming Guide, "Shared Memory" of compute capability 5.x and later).
int count_wavefronts(const uint64_t* addresses, LaneMask lanes, int bytes);

// The passes that the same words would take if they were spread evenly over the banks.
int count_ideal_wavefronts(const uint64_t* addresses, LaneMask lanes, int bytes);

}  // namespace ptx
