// Logic and shift instructions (PTX ISA 9.0, section 9.7.8): and, or, xor, not, cnot, lop3, shf, shl, shr.
// Bit instructions of the integer section (9.7.1): popc, clz, bfind, brev, bfe, bfi, bmsk. Bytes: prmt
// (9.7.9.7).
#include <algorithm>
#include <bit>

#include "handlers.h"

namespace ptx {
namespace {

struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};

struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};

struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};

struct Not {
  template <class T>
  T operator()(T a) const {
    return ~a;
  }
};

struct LogicalNot {
  template <class T>
  T operator()(T a) const {
    return a == 0;
  }
};

// Shifts by the width or more give 0, or the sign.
struct ShiftLeft {
  template <class T>
  T operator()(T a, uint32_t shift) const {
    return shift < 8 * sizeof(T) ? static_cast<T>(a << shift) : 0;
  }
};

struct ShiftRight {
  template <class T>
  T operator()(T a, uint32_t shift) const {
    if (shift < 8 * sizeof(T)) return static_cast<T>(a >> shift);
    return a < 0 ? static_cast<T>(-1) : 0;
  }
};

// The 64 bits b:a shifted; .l returns the upper word, .r the lower.
template <bool kLeft, bool kWrap>
struct FunnelShift {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t amount) const {
    const uint32_t shift = kWrap ? amount & 31 : std::min(amount, 32u);
    const uint64_t both = uint64_t{b} << 32 | a;
    return static_cast<uint32_t>(kLeft ? (both << shift) >> 32 : both >> shift);
  }
};

struct PopulationCount {
  template <class T>
  uint32_t operator()(T a) const {
    return std::popcount(a);
  }
};

struct LeadingZeros {
  template <class T>
  uint32_t operator()(T a) const {
    return std::countl_zero(a);
  }
};

// Position of the most significant bit that is not the sign, from bit 0, or with kShift from the top.
template <bool kShift>
struct FindBit {
  template <class T>
  uint32_t operator()(T a) const {
    using Bits = std::make_unsigned_t<T>;
    const auto bits = static_cast<Bits>(a < 0 ? ~a : a);
    if (!bits) return ~0u;
    const int zeros = std::countl_zero(bits);
    return kShift ? zeros : static_cast<uint32_t>(8 * sizeof(T) - 1 - zeros);
  }
};

struct ReverseBits {
  template <class T>
  T operator()(T a) const {
    T result = 0;
    for (size_t i = 0; i < 8 * sizeof(T); ++i) result |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
    return result;
  }
};

template <class T>
T low_bits(uint32_t count) {
  return count >= 8 * sizeof(T) ? ~T{0} : (T{1} << count) - 1;
}

// `length` bits of a from `start`; bits beyond the field, or beyond a, are the field's last bit for signed
// types.
struct ExtractField {
  template <class T>
  T operator()(T a, uint32_t start, uint32_t length) const {
    using Bits = std::make_unsigned_t<T>;
    constexpr uint32_t kBits = 8 * sizeof(T);
    start &= 255;
    length &= 255;
    if (length == 0) return 0;
    const auto bits = static_cast<Bits>(a);
    Bits field = start < kBits ? bits >> start : 0;
    const uint32_t last = std::min(start + length - 1, kBits - 1);
    const bool negative = std::is_signed_v<T> && (bits >> last & 1);
    const Bits inside = low_bits<Bits>(std::min(length, start < kBits ? kBits - start : 0));
    field &= inside;
    return static_cast<T>(negative ? field | ~inside : field);
  }
};

// bfi d, field, into, start, length
template <class T>
LaneMask insert_field(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  Warp& warp = machine.warp();
  const T* field = warp.lanes<T>(instruction.a);
  const T* into = warp.lanes<T>(instruction.b);
  const uint32_t* starts = warp.lanes<uint32_t>(instruction.c);
  const uint32_t* lengths = warp.lanes<uint32_t>(instruction.members);
  T* d = warp.lanes<T>(instruction.d);
  for_each_lane(lanes, [=](int lane) {
    const uint32_t start = starts[lane] & 255;
    const uint32_t length = lengths[lane] & 255;
    const T mask = start < kBits ? low_bits<T>(length) << start : 0;
    const T moved = start < kBits ? field[lane] << start : 0;
    d[lane] = (into[lane] & ~mask) | (moved & mask);
  });
  return lanes;
}

template <bool kWrap>
struct BitMask {
  uint32_t operator()(uint32_t start, uint32_t length) const {
    if (kWrap) {
      start &= 31;
      length &= 31;
    }
    return start < 32 ? low_bits<uint32_t>(length) << start : 0;
  }
};

// Each byte of d is the byte of b:a that a nibble of c selects; the nibble's top bit asks for the byte's
// sign.
struct Permute {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t selector) const {
    const uint64_t both = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t nibble = selector >> (4 * i);
      uint32_t byte = both >> (8 * (nibble & 7)) & 0xff;
      if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
      result |= byte << (8 * i);
    }
    return result;
  }
};

LaneMask lop3(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const uint32_t* a = warp.lanes<uint32_t>(instruction.a);
  const uint32_t* b = warp.lanes<uint32_t>(instruction.b);
  const uint32_t* c = warp.lanes<uint32_t>(instruction.c);
  uint32_t* d = warp.lanes<uint32_t>(instruction.d);
  // One all-ones or all-zeros word for each row of the truth table.
  uint32_t row[8];
  for (int i = 0; i < 8; ++i) row[i] = instruction.immediate >> i & 1 ? ~0u : 0;
  for_each_lane(lanes, [=](int lane) {
    const uint32_t x = a[lane], y = b[lane], z = c[lane];
    const uint32_t without_a = (~y & ((~z & row[0]) | (z & row[1]))) | (y & ((~z & row[2]) | (z & row[3])));
    const uint32_t with_a = (~y & ((~z & row[4]) | (z & row[5]))) | (y & ((~z & row[6]) | (z & row[7])));
    d[lane] = (~x & without_a) | (x & with_a);
  });
  return lanes;
}

// Predicates are masks of lanes.
template <class Op>
LaneMask logic_of_predicates(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const LaneMask a = warp.predicate(instruction.a);
  if constexpr (std::is_invocable_v<Op, LaneMask, LaneMask>) {
    warp.set_predicate(instruction.d, lanes, Op()(a, warp.predicate(instruction.b)));
  } else {
    warp.set_predicate(instruction.d, lanes, Op()(a));
  }
  return lanes;
}

// ---- Decoding.

template <class Op>
Execute bits_handler(Decoding& decoding, Type type) {
  switch (size_of(type)) {
    case 2: return lane_handler<Op, uint16_t>();
    case 4: return lane_handler<Op, uint32_t>();
    case 8: return lane_handler<Op, uint64_t>();
    default: decoding.unsupported("type is not implemented");
  }
}

template <class Op>
void decode_logic(Decoding& decoding) {
  constexpr int kSources = std::is_invocable_v<Op, uint32_t, uint32_t> ? 2 : 1;
  const Type type = decoding.type({Type::kPred, Type::kB16, Type::kB32, Type::kB64});
  Instruction& instruction = decoding.instruction;
  if (type == Type::kPred) {
    decoding.expect_operands(kSources + 1, kSources + 1);
    instruction.d = decoding.predicate_destination(0);
    instruction.a = decoding.predicate_source(1);
    if (kSources > 1) instruction.b = decoding.predicate_source(2);
    instruction.execute = &logic_of_predicates<Op>;
  } else {
    take_operands(decoding, type, kSources);
    instruction.execute = bits_handler<Op>(decoding, type);
  }
}

template <class Op>
void decode_shift(Decoding& decoding) {
  const Type type = decoding.type({Type::kB16, Type::kB32, Type::kB64, Type::kU16, Type::kU32, Type::kU64,
                                   Type::kS16, Type::kS32, Type::kS64});
  decoding.expect_operands(3, 3);
  Instruction& instruction = decoding.instruction;
  instruction.d = decoding.destination(0, type);
  instruction.a = decoding.source(1, type);
  instruction.b = decoding.source(2, Type::kU32);
  const bool arithmetic = is_signed(type);
  switch (size_of(type)) {
    case 2:
      instruction.execute = arithmetic ? &binary<Op, int16_t, uint32_t> : &binary<Op, uint16_t, uint32_t>;
      break;
    case 4:
      instruction.execute = arithmetic ? &binary<Op, int32_t, uint32_t> : &binary<Op, uint32_t, uint32_t>;
      break;
    case 8:
      instruction.execute = arithmetic ? &binary<Op, int64_t, uint32_t> : &binary<Op, uint64_t, uint32_t>;
      break;
    default: decoding.unsupported("type is not implemented");
  }
}

void decode_funnel_shift(Decoding& decoding) {
  const bool left = decoding.require_one({"l", "r"}) == 0;
  const bool wrap = decoding.require_one({"clamp", "wrap"}) == 1;
  take_operands(decoding, decoding.type({Type::kB32}), 3);
  Execute& execute = decoding.instruction.execute;
  if (left) {
    execute =
        wrap ? &ternary<FunnelShift<true, true>, uint32_t> : &ternary<FunnelShift<true, false>, uint32_t>;
  } else {
    execute =
        wrap ? &ternary<FunnelShift<false, true>, uint32_t> : &ternary<FunnelShift<false, false>, uint32_t>;
  }
}

void decode_lop3(Decoding& decoding) {
  decoding.expect_operands(5, 5);
  const Type type = decoding.type({Type::kB32});
  Instruction& instruction = decoding.instruction;
  instruction.d = decoding.destination(0, type);
  instruction.a = decoding.source(1, type);
  instruction.b = decoding.source(2, type);
  instruction.c = decoding.source(3, type);
  instruction.immediate = decoding.immediate(4);
  instruction.execute = &lop3;
}

template <class Op>
void decode_count(Decoding& decoding) {
  const Type type = decoding.type({Type::kB32, Type::kB64});
  decoding.expect_operands(2, 2);
  decoding.instruction.d = decoding.destination(0, Type::kU32);
  decoding.instruction.a = decoding.source(1, type);
  decoding.instruction.execute = is_wide(type) ? &unary<Op, uint64_t> : &unary<Op, uint32_t>;
}

void decode_find_bit(Decoding& decoding) {
  const bool shift = decoding.accept("shiftamt");
  const Type type = decoding.type();
  decoding.expect_operands(2, 2);
  Instruction& instruction = decoding.instruction;
  instruction.d = decoding.destination(0, Type::kU32);
  instruction.a = decoding.source(1, type);
  switch (type) {
    case Type::kU32:
      instruction.execute = shift ? &unary<FindBit<true>, uint32_t> : &unary<FindBit<false>, uint32_t>;
      break;
    case Type::kS32:
      instruction.execute = shift ? &unary<FindBit<true>, int32_t> : &unary<FindBit<false>, int32_t>;
      break;
    case Type::kU64:
      instruction.execute = shift ? &unary<FindBit<true>, uint64_t> : &unary<FindBit<false>, uint64_t>;
      break;
    case Type::kS64:
      instruction.execute = shift ? &unary<FindBit<true>, int64_t> : &unary<FindBit<false>, int64_t>;
      break;
    default: decoding.unsupported("type is not implemented");
  }
}

void decode_extract_field(Decoding& decoding) {
  const Type type = decoding.type();
  decoding.expect_operands(4, 4);
  Instruction& instruction = decoding.instruction;
  instruction.d = decoding.destination(0, type);
  instruction.a = decoding.source(1, type);
  instruction.b = decoding.source(2, Type::kU32);
  instruction.c = decoding.source(3, Type::kU32);
  switch (type) {
    case Type::kU32: instruction.execute = &ternary<ExtractField, uint32_t, uint32_t, uint32_t>; break;
    case Type::kS32: instruction.execute = &ternary<ExtractField, int32_t, uint32_t, uint32_t>; break;
    case Type::kU64: instruction.execute = &ternary<ExtractField, uint64_t, uint32_t, uint32_t>; break;
    case Type::kS64: instruction.execute = &ternary<ExtractField, int64_t, uint32_t, uint32_t>; break;
    default: decoding.unsupported("type is not implemented");
  }
}

void decode_insert_field(Decoding& decoding) {
  const Type type = decoding.type({Type::kB32, Type::kB64});
  decoding.expect_operands(5, 5);
  Instruction& instruction = decoding.instruction;
  instruction.d = decoding.destination(0, type);
  instruction.a = decoding.source(1, type);
  instruction.b = decoding.source(2, type);
  instruction.c = decoding.source(3, Type::kU32);
  instruction.members = decoding.source(4, Type::kU32);
  instruction.execute = is_wide(type) ? &insert_field<uint64_t> : &insert_field<uint32_t>;
}

void decode_reverse(Decoding& decoding) {
  const Type type = decoding.type({Type::kB32, Type::kB64});
  take_operands(decoding, type, 1);
  decoding.instruction.execute =
      is_wide(type) ? &unary<ReverseBits, uint64_t> : &unary<ReverseBits, uint32_t>;
}

void decode_bit_mask(Decoding& decoding) {
  const bool wrap = decoding.require_one({"clamp", "wrap"}) == 1;
  take_operands(decoding, decoding.type({Type::kB32}), 2);
  decoding.instruction.execute = wrap ? &binary<BitMask<true>, uint32_t> : &binary<BitMask<false>, uint32_t>;
}

void decode_permute(Decoding& decoding) {
  take_operands(decoding, decoding.type({Type::kB32}), 3);
  decoding.instruction.execute = &ternary<Permute, uint32_t>;
}

}  // namespace

std::vector<Opcode> bit_opcodes() {
  return {
      {"and", decode_logic<And>},
      {"or", decode_logic<Or>},
      {"xor", decode_logic<Xor>},
      {"not", decode_logic<Not>},
      {"cnot",
       [](Decoding& decoding) {
         const Type type = decoding.type({Type::kB16, Type::kB32, Type::kB64});
         take_operands(decoding, type, 1);
         decoding.instruction.execute = bits_handler<LogicalNot>(decoding, type);
       }},
      {"shl", decode_shift<ShiftLeft>},
      {"shr", decode_shift<ShiftRight>},
      {"shf", decode_funnel_shift},
      {"lop3", decode_lop3},
      {"popc", decode_count<PopulationCount>},
      {"clz", decode_count<LeadingZeros>},
      {"bfind", decode_find_bit},
      {"bfe", decode_extract_field},
      {"bfi", decode_insert_field},
      {"brev", decode_reverse},
      {"bmsk", decode_bit_mask},
      {"prmt", decode_permute},
  };
}

}  // namespace ptx
