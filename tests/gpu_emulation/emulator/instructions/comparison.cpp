// Comparison and selection (PTX ISA 9.0, sections 9.7.6 and 9.7.7): setp, set, selp, slct.
#include "handlers.h"

namespace ptx {
namespace {

enum class Relation { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

// The ordered relations are false where an operand is NaN (except ne, below), those ending in u are true.
template <Relation kRelation, class T>
bool holds(T a, T b) {
  switch (kRelation) {
    case Relation::kEq: return a == b;
    case Relation::kNe: return a < b || a > b;
    case Relation::kLt: return a < b;
    case Relation::kLe: return a <= b;
    case Relation::kGt: return a > b;
    case Relation::kGe: return a >= b;
    case Relation::kEqu: return !(a < b || a > b);
    case Relation::kNeu: return a != b;
    case Relation::kLtu: return !(a >= b);
    case Relation::kLeu: return !(a > b);
    case Relation::kGtu: return !(a <= b);
    case Relation::kGeu: return !(a < b);
    case Relation::kNum: return a == a && b == b;
    case Relation::kNan: return a != a || b != b;
  }
}

template <class T>
auto comparable(T x) {
  if constexpr (std::is_arithmetic_v<T>)
    return x;
  else
    return to_float(x);
}

// A comparison of two registers: the lanes in which it holds.
using Compare = LaneMask (*)(Warp&, const Instruction&, LaneMask);

template <class T, Relation kRelation, bool kFtz>
LaneMask compare(Warp& warp, const Instruction& instruction, LaneMask lanes) {
  const auto* a = warp.lanes<Slot<T>>(instruction.a);
  const auto* b = warp.lanes<Slot<T>>(instruction.b);
  return lanes_where(lanes, [=](int lane) {
    auto x = comparable(value_of<T>(a[lane]));
    auto y = comparable(value_of<T>(b[lane]));
    if constexpr (kFtz) {
      x = flush(x);
      y = flush(y);
    }
    return holds<kRelation>(x, y);
  });
}

template <class T, bool kFtz = false>
Compare compare_with(Relation relation) {
  switch (relation) {
    case Relation::kEq: return &compare<T, Relation::kEq, kFtz>;
    case Relation::kNe: return &compare<T, Relation::kNe, kFtz>;
    case Relation::kLt: return &compare<T, Relation::kLt, kFtz>;
    case Relation::kLe: return &compare<T, Relation::kLe, kFtz>;
    case Relation::kGt: return &compare<T, Relation::kGt, kFtz>;
    case Relation::kGe: return &compare<T, Relation::kGe, kFtz>;
    case Relation::kEqu: return &compare<T, Relation::kEqu, kFtz>;
    case Relation::kNeu: return &compare<T, Relation::kNeu, kFtz>;
    case Relation::kLtu: return &compare<T, Relation::kLtu, kFtz>;
    case Relation::kLeu: return &compare<T, Relation::kLeu, kFtz>;
    case Relation::kGtu: return &compare<T, Relation::kGtu, kFtz>;
    case Relation::kGeu: return &compare<T, Relation::kGeu, kFtz>;
    case Relation::kNum: return &compare<T, Relation::kNum, kFtz>;
    case Relation::kNan: return &compare<T, Relation::kNan, kFtz>;
  }
  return nullptr;
}

enum class Combine { kAnd, kOr, kXor, kNothing };

// What setp and set keep beside the operands.
struct Comparison {
  Compare compare;
  Combine combine;
  bool floating_result;  // set: 1.0 instead of all ones
};

const Comparison& comparison_of(const Instruction& instruction) {
  return *static_cast<const Comparison*>(instruction.extra.get());
}

LaneMask combine(Combine how, LaneMask result, LaneMask c) {
  switch (how) {
    case Combine::kAnd: return result & c;
    case Combine::kOr: return result | c;
    case Combine::kXor: return result ^ c;
    default: return result;
  }
}

LaneMask setp(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const Comparison& comparison = comparison_of(instruction);
  const LaneMask result = comparison.compare(warp, instruction, lanes);
  const LaneMask c = instruction.c ? warp.predicate(instruction.c) : 0;
  warp.set_predicate(instruction.d, lanes, combine(comparison.combine, result, c));
  if (instruction.p) warp.set_predicate(instruction.p, lanes, combine(comparison.combine, ~result, c));
  return lanes;
}

LaneMask set(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const Comparison& comparison = comparison_of(instruction);
  LaneMask result = comparison.compare(warp, instruction, lanes);
  if (instruction.c) result = combine(comparison.combine, result, warp.predicate(instruction.c));
  const uint32_t yes = comparison.floating_result ? std::bit_cast<uint32_t>(1.0f) : ~0u;
  uint32_t* d = warp.lanes<uint32_t>(instruction.d);
  for_each_lane(lanes, [=](int lane) { d[lane] = result >> lane & 1 ? yes : 0; });
  return lanes;
}

// setp.f16x2 p|q: one predicate for each half.
template <class T, Relation kRelation>
LaneMask setp_pairs(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const uint32_t* a = warp.lanes<uint32_t>(instruction.a);
  const uint32_t* b = warp.lanes<uint32_t>(instruction.b);
  const auto half_holds = [=](int lane, int shift) {
    const T x = {static_cast<uint16_t>(a[lane] >> shift)};
    const T y = {static_cast<uint16_t>(b[lane] >> shift)};
    return holds<kRelation>(to_float(x), to_float(y));
  };
  warp.set_predicate(instruction.d, lanes, lanes_where(lanes, [=](int lane) { return half_holds(lane, 0); }));
  if (instruction.p) {
    warp.set_predicate(instruction.p, lanes,
                       lanes_where(lanes, [=](int lane) { return half_holds(lane, 16); }));
  }
  return lanes;
}

// set of pairs: all ones or 1.0 in each half.
template <class T, Relation kRelation>
struct SetPairs {
  template <uint16_t kYes>
  struct Yielding {
    Pair<T> operator()(Pair<T> a, Pair<T> b) const {
      const auto half = [](T x, T y) -> T {
        return {holds<kRelation>(to_float(x), to_float(y)) ? kYes : uint16_t{0}};
      };
      return {half(a.low, b.low), half(a.high, b.high)};
    }
  };
};

Relation take_relation(Decoding& decoding, Type type) {
  // lo, ls, hi, hs are lt, le, gt, ge of unsigned integers.
  const int unsigned_name = decoding.accept_one({"lo", "ls", "hi", "hs"});
  if (unsigned_name >= 0) {
    if (is_float(type) || is_signed(type)) decoding.unsupported("unsigned comparison of this type");
    return static_cast<Relation>(static_cast<int>(Relation::kLt) + unsigned_name);
  }
  const int index = decoding.require_one(
      {"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"});
  if (!is_float(type) && index > static_cast<int>(Relation::kGe))
    decoding.unsupported("comparison of integers");
  return static_cast<Relation>(index);
}

Compare take_compare(Decoding& decoding, Type type) {
  const Relation relation = take_relation(decoding, type);
  switch (type) {
    case Type::kU16:
    case Type::kB16: return compare_with<uint16_t>(relation);
    case Type::kU32:
    case Type::kB32: return compare_with<uint32_t>(relation);
    case Type::kU64:
    case Type::kB64: return compare_with<uint64_t>(relation);
    case Type::kS16: return compare_with<int16_t>(relation);
    case Type::kS32: return compare_with<int32_t>(relation);
    case Type::kS64: return compare_with<int64_t>(relation);
    case Type::kF16: return compare_with<Half>(relation);
    case Type::kBf16: return compare_with<Bfloat16>(relation);
    case Type::kF32:
      return decoding.accept("ftz") ? compare_with<float, true>(relation) : compare_with<float>(relation);
    case Type::kF64: return compare_with<double>(relation);
    default: decoding.unsupported("type is not implemented");
  }
}

// The relations that compilers use on pairs.
template <template <class, Relation> class Handler, class T>
Execute pair_handler(Decoding& decoding, Type type) {
  switch (take_relation(decoding, type)) {
    case Relation::kEq: return Handler<T, Relation::kEq>::value;
    case Relation::kNe: return Handler<T, Relation::kNe>::value;
    case Relation::kLt: return Handler<T, Relation::kLt>::value;
    case Relation::kLe: return Handler<T, Relation::kLe>::value;
    case Relation::kGt: return Handler<T, Relation::kGt>::value;
    case Relation::kGe: return Handler<T, Relation::kGe>::value;
    case Relation::kNeu: return Handler<T, Relation::kNeu>::value;
    case Relation::kLtu: return Handler<T, Relation::kLtu>::value;
    case Relation::kLeu: return Handler<T, Relation::kLeu>::value;
    case Relation::kGtu: return Handler<T, Relation::kGtu>::value;
    case Relation::kGeu: return Handler<T, Relation::kGeu>::value;
    case Relation::kNan: return Handler<T, Relation::kNan>::value;
    default: decoding.unsupported("relation is not implemented for pairs");
  }
}

template <class T, Relation kRelation>
struct SetpPairsHandler {
  static constexpr Execute value = &setp_pairs<T, kRelation>;
};

template <class T, Relation kRelation>
struct SetOnesHandler {
  static constexpr Execute value =
      &binary<typename SetPairs<T, kRelation>::template Yielding<0xffff>, Pair<T>>;
};

template <class T, Relation kRelation>
struct SetFloatHandler {
  static constexpr Execute value =
      &binary<typename SetPairs<T, kRelation>::template Yielding<std::is_same_v<T, Half> ? 0x3c00 : 0x3f80>,
              Pair<T>>;
};

// setp.CmpOp{.BoolOp}{.ftz}.type p{|q}, a, b{, {!}c}
void decode_setp(Decoding& decoding) {
  decoding.expect_operands(3, 4);
  Instruction& instruction = decoding.instruction;
  const Type type = decoding.type();
  instruction.d = decoding.predicate_destination(0);
  instruction.p = decoding.second_predicate(0);
  instruction.a = decoding.source(1, type);
  instruction.b = decoding.source(2, type);
  if (type == Type::kF16x2) {
    instruction.execute = pair_handler<SetpPairsHandler, Half>(decoding, type);
    return;
  }
  if (type == Type::kBf16x2) {
    instruction.execute = pair_handler<SetpPairsHandler, Bfloat16>(decoding, type);
    return;
  }
  const int how = decoding.accept_one({"and", "or", "xor"});
  if ((how >= 0) != (decoding.operands() == 4)) decoding.unsupported("operands do not fit the modifiers");
  if (how >= 0) instruction.c = decoding.predicate_source(3);
  const Combine combine = how < 0 ? Combine::kNothing : static_cast<Combine>(how);
  instruction.extra = std::make_shared<Comparison>(Comparison{take_compare(decoding, type), combine, false});
  instruction.execute = &setp;
}

// set.CmpOp{.BoolOp}{.ftz}.dtype.stype d, a, b{, {!}c}
void decode_set(Decoding& decoding) {
  decoding.expect_operands(3, 4);
  Instruction& instruction = decoding.instruction;
  const Type result = decoding.type();
  const Type type = decoding.type();
  instruction.d = decoding.destination(0, result);
  instruction.a = decoding.source(1, type);
  instruction.b = decoding.source(2, type);
  if (type == Type::kF16x2 || type == Type::kBf16x2) {
    if (type == Type::kF16x2) {
      instruction.execute = result == type ? pair_handler<SetFloatHandler, Half>(decoding, type)
                                           : pair_handler<SetOnesHandler, Half>(decoding, type);
    } else {
      instruction.execute = result == type ? pair_handler<SetFloatHandler, Bfloat16>(decoding, type)
                                           : pair_handler<SetOnesHandler, Bfloat16>(decoding, type);
    }
    return;
  }
  if (size_of(result) != 4) decoding.unsupported("type of the result is not implemented");
  const int how = decoding.accept_one({"and", "or", "xor"});
  if ((how >= 0) != (decoding.operands() == 4)) decoding.unsupported("operands do not fit the modifiers");
  if (how >= 0) instruction.c = decoding.predicate_source(3);
  const Combine combine = how < 0 ? Combine::kNothing : static_cast<Combine>(how);
  instruction.extra =
      std::make_shared<Comparison>(Comparison{take_compare(decoding, type), combine, result == Type::kF32});
  instruction.execute = &set;
}

template <class T>
LaneMask selp(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const T* a = warp.lanes<T>(instruction.a);
  const T* b = warp.lanes<T>(instruction.b);
  T* d = warp.lanes<T>(instruction.d);
  const LaneMask chosen = warp.predicate(instruction.c);
  for_each_lane(lanes, [=](int lane) { d[lane] = chosen >> lane & 1 ? a[lane] : b[lane]; });
  return lanes;
}

// selp.type d, a, b, c: c ? a : b
void decode_selp(Decoding& decoding) {
  decoding.expect_operands(4, 4);
  Instruction& instruction = decoding.instruction;
  const Type type = decoding.type();
  instruction.d = decoding.destination(0, type);
  instruction.a = decoding.source(1, type);
  instruction.b = decoding.source(2, type);
  instruction.c = decoding.predicate_source(3);
  instruction.execute = is_wide(type) ? &selp<uint64_t> : &selp<uint32_t>;
}

struct ChooseBySign {
  template <class T, class C>
  T operator()(T a, T b, C c) const {
    return c >= 0 ? a : b;
  }
};

// slct.dtype.{s32,f32} d, a, b, c: c >= 0 ? a : b
void decode_slct(Decoding& decoding) {
  decoding.expect_operands(4, 4);
  Instruction& instruction = decoding.instruction;
  const Type type = decoding.type();
  const Type sign = decoding.type();
  instruction.d = decoding.destination(0, type);
  instruction.a = decoding.source(1, type);
  instruction.b = decoding.source(2, type);
  instruction.c = decoding.source(3, sign);
  if (sign == Type::kS32) {
    instruction.execute = is_wide(type) ? &ternary<ChooseBySign, uint64_t, uint64_t, int32_t>
                                        : &ternary<ChooseBySign, uint32_t, uint32_t, int32_t>;
  } else if (sign == Type::kF32) {
    instruction.execute = is_wide(type) ? &ternary<ChooseBySign, uint64_t, uint64_t, float>
                                        : &ternary<ChooseBySign, uint32_t, uint32_t, float>;
  } else {
    decoding.unsupported("type is not implemented");
  }
}

}  // namespace

std::vector<Opcode> comparison_opcodes() {
  return {{"setp", decode_setp}, {"set", decode_set}, {"selp", decode_selp}, {"slct", decode_slct}};
}

}  // namespace ptx
