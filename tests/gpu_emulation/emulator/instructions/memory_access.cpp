// ld, ldu, st (PTX ISA 9.0, sections 9.7.9.8 to 9.7.9.12) and the hints prefetch, prefetchu (9.7.9.15),
// applypriority (9.7.9.16).
#include <algorithm>
#include <array>
#include <cstring>

#include "../decoder.h"
#include "access.h"

namespace ptx {
namespace {

constexpr int kMaxAccess = 32;  // bytes, .v8.b32

// A value of the type T, extended to the register by its sign.
template <class T>
uint64_t extended(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return static_cast<uint64_t>(static_cast<int64_t>(value));
}

template <class T>
LaneMask ld(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const int bytes = instruction.vector * static_cast<int>(sizeof(T));
  uint64_t addresses[kWarpSize];
  machine.addresses(instruction.address, lanes, addresses);
  const uint64_t first = addresses[std::countr_zero(lanes)];
  if (is_global(instruction.space, first)) count_global_load(machine.count(), addresses, lanes, bytes);
  if (is_shared(instruction.space, first)) count_shared(machine.count(), addresses, lanes, bytes);
  for (LaneMask rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const uint8_t* source =
        machine.access(instruction.space, addresses[lane], bytes, AccessKind::kRead, lane);
    for (const Operand& element : instruction.d_elements) {
      warp.set_value(element, lane, extended<T>(source));
      source += sizeof(T);
    }
  }
  return lanes;
}

// Two lanes of one store that write different values to the same bytes: which one stays is not defined.
void check_lanes_agree(Machine& machine, const uint64_t* addresses, LaneMask lanes, int bytes,
                       const std::array<uint8_t, kMaxAccess>* values) {
  int order[kWarpSize];
  int count = 0;
  bool ascending = true;
  for (LaneMask rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (count && addresses[order[count - 1]] + bytes > addresses[lane]) ascending = false;
    order[count++] = lane;
  }
  if (ascending) return;
  std::sort(order, order + count, [&](int a, int b) { return addresses[a] < addresses[b]; });
  for (int i = 1; i < count; ++i) {
    const int a = order[i - 1];
    const int b = order[i];
    if (addresses[a] + bytes <= addresses[b]) continue;
    if (addresses[a] == addresses[b] && std::memcmp(values[a].data(), values[b].data(), bytes) == 0) continue;
    machine.set_lane(b);
    throw Error("data race: lanes " + std::to_string(a) + " and " + std::to_string(b) +
                " of one store write different values to the same address");
  }
}

LaneMask st(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const int element = instruction.element;
  const int bytes = instruction.vector * element;
  uint64_t addresses[kWarpSize];
  machine.addresses(instruction.address, lanes, addresses);
  const uint64_t first = addresses[std::countr_zero(lanes)];
  const bool global = is_global(instruction.space, first);
  const bool shared = is_shared(instruction.space, first);
  if (global) count_global_store(machine.count(), addresses, lanes, bytes);
  if (shared) count_shared(machine.count(), addresses, lanes, bytes);
  std::array<uint8_t, kMaxAccess> values[kWarpSize];
  for (LaneMask rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    uint8_t* to = values[lane].data();
    for (const Operand& operand : instruction.a_elements) {
      const uint64_t value = warp.value(operand, lane);
      std::memcpy(to, &value, element);
      to += element;
    }
  }
  if (global || shared) check_lanes_agree(machine, addresses, lanes, bytes, values);
  for (LaneMask rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const uint8_t* from = values[lane].data();
    uint8_t* to = machine.access(instruction.space, addresses[lane], bytes, AccessKind::kWrite, lane, from);
    std::memcpy(to, from, bytes);
  }
  return lanes;
}

Execute ld_handler(Type type) {
  switch (size_of(type)) {
    case 1: return is_signed(type) ? &ld<int8_t> : &ld<uint8_t>;
    case 2: return is_signed(type) ? &ld<int16_t> : &ld<uint16_t>;
    case 4: return is_signed(type) ? &ld<int32_t> : &ld<uint32_t>;
    default: return &ld<uint64_t>;
  }
}

// Takes the state space, vector size and type of ld and st.
Type decode_access(Decoding& decoding, int address_position) {
  Instruction& instruction = decoding.instruction;
  accept_memory_order(decoding);
  accept_cache_hints(decoding, 2);
  instruction.space = decoding.space();
  instruction.vector = static_cast<uint8_t>(decoding.vector());
  const Type type =
      decoding.type({Type::kB8, Type::kB16, Type::kB32, Type::kB64, Type::kU8, Type::kU16, Type::kU32,
                     Type::kU64, Type::kS8, Type::kS16, Type::kS32, Type::kS64, Type::kF32, Type::kF64});
  instruction.element = static_cast<uint8_t>(size_of(type));
  if (instruction.vector * instruction.element > kMaxAccess)
    decoding.unsupported("access of more than 32 bytes");
  instruction.address = decoding.address(address_position);
  // .param variables of calls are local memory of the caller, see the decoder.
  if (instruction.space == Space::kParam && decoding.address_is_local(address_position)) {
    instruction.space = Space::kLocal;
  }
  return type;
}

// ld{.order}{.space}{.cache}{.vec}.type d, [a]
void decode_ld(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  decoding.accept("nc");
  const Type type = decode_access(decoding, 1);
  instruction.d_elements = decoding.destination_elements(0, type, true);
  if (instruction.d_elements.size() != instruction.vector)
    decoding.unsupported("registers do not fit the vector");
  instruction.execute = ld_handler(type);
}

// st{.order}{.space}{.cache}{.vec}.type [a], b
void decode_st(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  if (decoding.accept("const")) decoding.unsupported("constant memory is only read");
  const Type type = decode_access(decoding, 0);
  instruction.a_elements = decoding.source_elements(1, type, true);
  if (instruction.a_elements.size() != instruction.vector)
    decoding.unsupported("registers do not fit the vector");
  instruction.execute = &st;
}

LaneMask nothing(Machine&, const Instruction&, LaneMask lanes) { return lanes; }

// prefetch{.space}.level [a]; prefetchu.L1 [a]
void decode_prefetch(Decoding& decoding) {
  decoding.expect_operands(1, 1);
  decoding.space();
  decoding.require_one({"L1", "L2", "L2::evict_normal", "L2::evict_last"});
  decoding.address(0);
  decoding.instruction.execute = &nothing;
}

// applypriority{.global}.L2::evict_normal [a], size
void decode_priority(Decoding& decoding) {
  decoding.expect_operands(2, 2);
  decoding.space();
  decoding.require("L2::evict_normal");
  decoding.address(0);
  decoding.immediate(1);
  decoding.instruction.execute = &nothing;
}

}  // namespace

std::vector<Opcode> memory_opcodes() {
  return {{"ld", decode_ld},
          {"ldu", decode_ld},
          {"st", decode_st},
          {"prefetch", decode_prefetch},
          {"prefetchu", decode_prefetch},
          {"applypriority", decode_priority}};
}

}  // namespace ptx
