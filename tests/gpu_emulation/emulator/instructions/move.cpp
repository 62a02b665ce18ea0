// mov, cvta, isspacep and createpolicy (PTX ISA 9.0, sections 9.7.9.3 to 9.7.9.20).
#include "handlers.h"

namespace ptx {
namespace {

template <class T>
LaneMask mov(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  const T* a = machine.warp().lanes<T>(instruction.a);
  T* d = machine.warp().lanes<T>(instruction.d);
  for_each_lane(lanes, [=](int lane) { d[lane] = a[lane]; });
  return lanes;
}

LaneMask mov_predicate(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const LaneMask value =
      instruction.a ? warp.predicate(instruction.a) : static_cast<LaneMask>(instruction.immediate);
  warp.set_predicate(instruction.d, lanes, value);
  return lanes;
}

// %clock and its kin tell the number of instructions executed so far.
LaneMask mov_clock(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  for_each_lane(lanes, [&](int lane) { machine.warp().set_value(instruction.d, lane, machine.clock()); });
  return lanes;
}

// mov.b64 d, {a, b}: the first element becomes the low bits.
LaneMask pack(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const int bits = 8 * instruction.element;
  const uint64_t mask = bits == 64 ? ~0ull : (1ull << bits) - 1;
  for_each_lane(lanes, [&](int lane) {
    uint64_t value = 0;
    for (size_t i = 0; i < instruction.a_elements.size(); ++i) {
      value |= (warp.value(instruction.a_elements[i], lane) & mask) << (bits * i);
    }
    warp.set_value(instruction.d, lane, value);
  });
  return lanes;
}

LaneMask unpack(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const int bits = 8 * instruction.element;
  const uint64_t mask = bits == 64 ? ~0ull : (1ull << bits) - 1;
  for_each_lane(lanes, [&](int lane) {
    const uint64_t value = warp.value(instruction.a, lane);
    for (size_t i = 0; i < instruction.d_elements.size(); ++i) {
      warp.set_value(instruction.d_elements[i], lane, value >> (bits * i) & mask);
    }
  });
  return lanes;
}

Type bits_type(Decoding& decoding, int bytes) {
  switch (bytes) {
    case 1: return Type::kB8;
    case 2: return Type::kB16;
    case 4: return Type::kB32;
    case 8: return Type::kB64;
    default: decoding.unsupported("vector of this size");
  }
}

void decode_mov(Decoding& decoding) {
  decoding.expect_operands(2, 2);
  Instruction& instruction = decoding.instruction;
  const Type type = decoding.type();
  if (type == Type::kPred) {
    instruction.d = decoding.predicate_destination(0);
    if (decoding.is_immediate(1)) {
      instruction.immediate = decoding.immediate(1) ? kAllLanes : 0;
    } else {
      instruction.a = decoding.predicate_source(1);
    }
    instruction.execute = &mov_predicate;
  } else if (decoding.is_vector(1)) {
    const Type half = bits_type(decoding, size_of(type) / 2);
    instruction.a_elements = decoding.source_elements(1, half, true);
    instruction.element = size_of(type) / instruction.a_elements.size();
    instruction.d = decoding.destination(0, type);
    instruction.execute = &pack;
  } else if (decoding.is_vector(0)) {
    const Type half = bits_type(decoding, size_of(type) / 2);
    instruction.d_elements = decoding.destination_elements(0, half, true);
    instruction.element = size_of(type) / instruction.d_elements.size();
    instruction.a = decoding.source(1, type);
    instruction.execute = &unpack;
  } else {
    instruction.d = decoding.destination(0, type);
    const std::string_view name = decoding.name(1);
    if (name == "%clock" || name == "%clock64" || name == "%globaltimer" || name == "%globaltimer_lo") {
      instruction.execute = &mov_clock;
      return;
    }
    instruction.a = decoding.source(1, type);
    instruction.execute = is_wide(type) ? &mov<uint64_t> : &mov<uint32_t>;
  }
}

uint64_t window_of(Space space) {
  switch (space) {
    case Space::kShared: return kSharedWindow;
    case Space::kLocal: return kLocalWindow;
    default: return 0;
  }
}

LaneMask cvta(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  const uint64_t* a = machine.warp().lanes<uint64_t>(instruction.a);
  uint64_t* d = machine.warp().lanes<uint64_t>(instruction.d);
  const uint64_t shift = instruction.immediate;
  for_each_lane(lanes, [=](int lane) { d[lane] = a[lane] + shift; });
  return lanes;
}

// cvta.space.u64 makes a generic address of one in a space, cvta.to.space.u64 the opposite.
void decode_cvta(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  const bool to = decoding.accept("to");
  const Space space = decoding.space();
  if (space == Space::kGeneric || space == Space::kParam)
    decoding.unsupported("state space is not implemented");
  if (decoding.type() != Type::kU64) decoding.unsupported("only 64-bit addresses are implemented");
  take_operands(decoding, Type::kU64, 1);
  instruction.immediate = to ? -window_of(space) : window_of(space);
  instruction.execute = &cvta;
}

LaneMask isspacep(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  const uint64_t* a = machine.warp().lanes<uint64_t>(instruction.a);
  const Space space = instruction.space;
  const LaneMask inside = lanes_where(lanes, [=](int lane) {
    const bool shared = in_window(a[lane], kSharedWindow);
    const bool local = in_window(a[lane], kLocalWindow);
    return space == Space::kShared ? shared : space == Space::kLocal ? local : !shared && !local;
  });
  machine.warp().set_predicate(instruction.d, lanes, inside);
  return lanes;
}

void decode_isspacep(Decoding& decoding) {
  decoding.expect_operands(2, 2);
  Instruction& instruction = decoding.instruction;
  if (decoding.accept("const")) decoding.unsupported("state space is not implemented");
  instruction.space = decoding.space();
  if (instruction.space == Space::kGeneric || instruction.space == Space::kParam) {
    decoding.unsupported("state space is not implemented");
  }
  instruction.d = decoding.predicate_destination(0);
  instruction.a = decoding.source(1, Type::kU64);
  instruction.execute = &isspacep;
}

LaneMask zero(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  for_each_lane(lanes, [&](int lane) { machine.warp().set_value(instruction.d, lane, 0); });
  return lanes;
}

// A cache policy is a hint: any value will do.
void decode_createpolicy(Decoding& decoding) {
  decoding.require("fractional");
  decoding.require_one({"L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"});
  decoding.accept_one({"L2::evict_first", "L2::evict_unchanged"});
  decoding.expect_operands(1, 2);
  decoding.instruction.d = decoding.destination(0, decoding.type({Type::kB64}));
  if (decoding.operands() == 2) decoding.ignore(1);
  decoding.instruction.execute = &zero;
}

}  // namespace

std::vector<Opcode> move_opcodes() {
  return {{"mov", decode_mov},
          {"cvta", decode_cvta},
          {"isspacep", decode_isspacep},
          {"createpolicy", decode_createpolicy}};
}

}  // namespace ptx
