// atom and red (PTX ISA 9.0, sections 9.7.13.5 and 9.7.13.6). The lanes of a warp take their turns in order.
#include <algorithm>
#include <cstring>

#include "../decoder.h"
#include "access.h"
#include "handlers.h"

namespace ptx {
namespace {

struct AtomicAdd {
  template <class T>
  T operator()(T old, T value) const {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(static_cast<uint64_t>(old) + static_cast<uint64_t>(value));
    else
      return old + value;
  }
};

struct AtomicMin {
  template <class T>
  T operator()(T old, T value) const {
    if constexpr (std::is_floating_point_v<T>)
      return std::fmin(old, value);
    else
      return std::min(old, value);
  }
};

struct AtomicMax {
  template <class T>
  T operator()(T old, T value) const {
    if constexpr (std::is_floating_point_v<T>)
      return std::fmax(old, value);
    else
      return std::max(old, value);
  }
};

struct AtomicAnd {
  template <class T>
  T operator()(T old, T value) const {
    return old & value;
  }
};

struct AtomicOr {
  template <class T>
  T operator()(T old, T value) const {
    return old | value;
  }
};

struct AtomicXor {
  template <class T>
  T operator()(T old, T value) const {
    return old ^ value;
  }
};

struct Exchange {
  template <class T>
  T operator()(T, T value) const {
    return value;
  }
};

struct Increment {
  template <class T>
  T operator()(T old, T value) const {
    return old >= value ? 0 : old + 1;
  }
};

struct Decrement {
  template <class T>
  T operator()(T old, T value) const {
    return old == 0 || old > value ? value : old - 1;
  }
};

// d = [a]; [a] = op([a], b)
template <class Op, class T>
LaneMask atomic(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const int bytes = instruction.vector * static_cast<int>(sizeof(T));
  uint64_t addresses[kWarpSize];
  machine.addresses(instruction.address, lanes, addresses);
  ++machine.count().atomics;
  for (LaneMask rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    uint8_t* memory = machine.access(instruction.space, addresses[lane], bytes, AccessKind::kAtomic, lane);
    for (int i = 0; i < instruction.vector; ++i, memory += sizeof(T)) {
      T old;
      std::memcpy(&old, memory, sizeof old);
      const T value = value_of<T>(static_cast<Slot<T>>(warp.value(instruction.b_elements[i], lane)));
      const T result = Op()(old, value);
      std::memcpy(memory, &result, sizeof result);
      if (!instruction.d_elements.empty()) warp.set_value(instruction.d_elements[i], lane, slot_of<T>(old));
    }
  }
  return lanes;
}

// d = [a]; if ([a] == b) [a] = c
template <class T>
LaneMask compare_and_swap(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  uint64_t addresses[kWarpSize];
  machine.addresses(instruction.address, lanes, addresses);
  ++machine.count().atomics;
  for (LaneMask rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    uint8_t* memory =
        machine.access(instruction.space, addresses[lane], sizeof(T), AccessKind::kAtomic, lane);
    T old;
    std::memcpy(&old, memory, sizeof old);
    const auto compare = static_cast<T>(warp.value(instruction.b_elements[0], lane));
    const auto swap = static_cast<T>(warp.value(instruction.c, lane));
    if (old == compare) std::memcpy(memory, &swap, sizeof swap);
    warp.set_value(instruction.d_elements[0], lane, old);
  }
  return lanes;
}

template <class Op>
Execute integer_atomic(Decoding& decoding, Type type) {
  switch (type) {
    case Type::kU32:
    case Type::kB32: return &atomic<Op, uint32_t>;
    case Type::kU64:
    case Type::kB64: return &atomic<Op, uint64_t>;
    case Type::kS32: return &atomic<Op, int32_t>;
    case Type::kS64: return &atomic<Op, int64_t>;
    default: decoding.unsupported("type is not implemented");
  }
}

template <class Op>
Execute number_atomic(Decoding& decoding, Type type) {
  switch (type) {
    case Type::kF32: return &atomic<Op, float>;
    case Type::kF64: return &atomic<Op, double>;
    case Type::kF16: return &atomic<InFloat<Op, Half>, Half>;
    case Type::kBf16: return &atomic<InFloat<Op, Bfloat16>, Bfloat16>;
    case Type::kF16x2: return &atomic<OnPairs<InFloat<Op, Half>, Half>, Pair<Half>>;
    case Type::kBf16x2: return &atomic<OnPairs<InFloat<Op, Bfloat16>, Bfloat16>, Pair<Bfloat16>>;
    default: return integer_atomic<Op>(decoding, type);
  }
}

Execute swap_handler(Decoding& decoding, Type type) {
  switch (size_of(type)) {
    case 2: return &compare_and_swap<uint16_t>;
    case 4: return &compare_and_swap<uint32_t>;
    case 8: return &compare_and_swap<uint64_t>;
    default: decoding.unsupported("type is not implemented");
  }
}

Execute atomic_handler(Decoding& decoding, int operation, Type type) {
  switch (operation) {
    case 0: return number_atomic<AtomicAdd>(decoding, type);
    case 1: return number_atomic<AtomicMin>(decoding, type);
    case 2: return number_atomic<AtomicMax>(decoding, type);
    case 3: return integer_atomic<AtomicAnd>(decoding, type);
    case 4: return integer_atomic<AtomicOr>(decoding, type);
    case 5: return integer_atomic<AtomicXor>(decoding, type);
    case 6: return integer_atomic<Exchange>(decoding, type);
    case 7: return integer_atomic<Increment>(decoding, type);
    case 8: return integer_atomic<Decrement>(decoding, type);
    default: return swap_handler(decoding, type);
  }
}

// atom{.sem}{.scope}{.space}.op{.level}{.vec}.type d, [a], b{, c}; red is the same without d.
void decode_atomic(Decoding& decoding, bool returns) {
  Instruction& instruction = decoding.instruction;
  accept_memory_order(decoding);
  decoding.accept("noftz");
  if (decoding.accept("const")) decoding.unsupported("constant memory is only read");
  instruction.space = decoding.space();
  instruction.vector = static_cast<uint8_t>(decoding.vector());
  const int operation =
      decoding.require_one({"add", "min", "max", "and", "or", "xor", "exch", "inc", "dec", "cas"});
  const Type type = decoding.type();
  const int first = returns ? 1 : 0;
  constexpr int kSwap = 9;
  accept_policy(decoding, first + (operation == kSwap ? 3 : 2));
  if (returns) instruction.d_elements = decoding.destination_elements(0, type);
  instruction.address = decoding.address(first);
  instruction.b_elements = decoding.source_elements(first + 1, type);
  if (operation == kSwap) {
    if (!returns) decoding.unsupported("cas without a result");
    instruction.c = decoding.source(first + 2, type);
  }
  if (instruction.b_elements.size() != instruction.vector)
    decoding.unsupported("registers do not fit the vector");
  instruction.execute = atomic_handler(decoding, operation, type);
}

}  // namespace

std::vector<Opcode> atomic_opcodes() {
  return {{"atom", [](Decoding& decoding) { decode_atomic(decoding, true); }},
          {"red", [](Decoding& decoding) { decode_atomic(decoding, false); }}};
}

}  // namespace ptx
