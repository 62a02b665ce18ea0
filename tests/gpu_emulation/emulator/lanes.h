// Loops over the lanes of a warp, and the values of its registers.
#pragma once
#include <bit>
#include <cstring>
#include <type_traits>

#include "program.h"

namespace ptx {

// Calls body(lane) for every lane of the mask. A full warp is a plain loop, which the compiler vectorises;
// lanes are independent of each other.
template <class Body>
inline void for_each_lane(LaneMask lanes, Body body) {
  if (lanes == kAllLanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < kWarpSize; ++lane) body(lane);
  } else {
    for (; lanes; lanes &= lanes - 1) body(std::countr_zero(lanes));
  }
}

// The lanes for which test(lane) holds.
template <class Test>
inline LaneMask lanes_where(LaneMask lanes, Test test) {
  uint32_t holds[kWarpSize];
  for_each_lane(lanes, [&](int lane) { holds[lane] = test(lane); });
  LaneMask result = 0;
  if (lanes == kAllLanes) {
    for (int lane = 0; lane < kWarpSize; ++lane) result |= holds[lane] << lane;
  } else {
    for (LaneMask rest = lanes; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      result |= holds[lane] << lane;
    }
  }
  return result;
}

// What one lane of a register for values of type T holds: 32 bits, or 64 for types of that size.
template <class T>
using Slot = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
inline T value_of(Slot<T> slot) {
  if constexpr (sizeof(T) == sizeof(Slot<T>)) {
    return std::bit_cast<T>(slot);
  } else if constexpr (sizeof(T) == 2) {
    return std::bit_cast<T>(static_cast<uint16_t>(slot));
  } else {
    return std::bit_cast<T>(static_cast<uint8_t>(slot));
  }
}

// Upper bits of a register with more bits than T become 0.
template <class T>
inline Slot<T> slot_of(T value) {
  if constexpr (sizeof(T) == sizeof(Slot<T>)) {
    return std::bit_cast<Slot<T>>(value);
  } else if constexpr (sizeof(T) == 2) {
    return std::bit_cast<uint16_t>(value);
  } else {
    return std::bit_cast<uint8_t>(value);
  }
}

}  // namespace ptx
