// Floating-point functions (PTX ISA 9.0, sections 9.7.3 and 9.7.4): rcp, sqrt, rsqrt, sin, cos, lg2, ex2,
// tanh, copysign, testp. The .approx forms are computed to the last bit or two here; a card's are as far off
// as their sections allow.
#include <bit>
#include <cmath>

#include "handlers.h"

namespace ptx {
namespace {

struct Reciprocal {
  template <class T>
  T operator()(T x) const {
    return 1 / x;
  }
};

struct SquareRoot {
  template <class T>
  T operator()(T x) const {
    return std::sqrt(x);
  }
};

struct ReciprocalSquareRoot {
  template <class T>
  T operator()(T x) const {
    return 1 / std::sqrt(x);
  }
};

struct Sine {
  float operator()(float x) const { return std::sin(x); }
};

struct Cosine {
  float operator()(float x) const { return std::cos(x); }
};

struct Log2 {
  float operator()(float x) const { return std::log2(x); }
};

struct Exp2 {
  float operator()(float x) const { return std::exp2(x); }
};

struct Tanh {
  float operator()(float x) const { return std::tanh(x); }
};

// rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 use and return the upper 32 bits.
template <class Op>
struct UpperHalf {
  double operator()(double x) const { return upper(Op()(upper(x))); }

  static double upper(double x) {
    return std::bit_cast<double>(std::bit_cast<uint64_t>(x) & 0xffffffff00000000ull);
  }
};

struct CopySign {
  template <class T>
  T operator()(T sign, T magnitude) const {
    return std::copysign(magnitude, sign);
  }
};

// What a special-function unit does, counted.
template <class Op>
LaneMask special(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  machine.count().special_functions += std::popcount(lanes);
  return unary<Op, float>(machine, instruction, lanes);
}

template <class Op>
void decode_root(Decoding& decoding) {
  const Type type = decoding.type();
  take_operands(decoding, type, 1);
  const bool approximate = decoding.accept("approx");
  const bool ftz = decoding.accept("ftz");
  Execute& execute = decoding.instruction.execute;
  if (type == Type::kF32) {
    execute = ftz ? lane_handler<Flushed<Op>, float>() : lane_handler<Op, float>();
    if (approximate) execute = ftz ? &special<Flushed<Op>> : &special<Op>;
  } else if (type == Type::kF64) {
    constexpr bool kUpperHalf = !std::is_same_v<Op, SquareRoot>;
    if (approximate != ftz || (approximate && !kUpperHalf))
      decoding.unsupported("only implemented with .approx.ftz or .rn");
    execute = approximate ? lane_handler<UpperHalf<Op>, double>() : lane_handler<Op, double>();
  } else {
    decoding.unsupported("type is not implemented");
  }
  if (!approximate) apply_rounding(decoding, type);
}

// sin, cos, lg2 of float with or without .ftz; ex2 also of the 16-bit types, bfloat16 with .ftz; tanh of the
// same types without it.
template <class Op>
void decode_approximation(Decoding& decoding) {
  constexpr bool kTanh = std::is_same_v<Op, Tanh>;
  constexpr bool kNarrow = kTanh || std::is_same_v<Op, Exp2>;
  decoding.require("approx");
  const Type type = decoding.type();
  if (!kNarrow && type != Type::kF32) decoding.unsupported("type is not implemented");
  take_operands(decoding, type, 1);
  const bool ftz = !kTanh && decoding.accept("ftz");
  Execute& execute = decoding.instruction.execute;
  switch (type) {
    case Type::kF32: execute = ftz ? &special<Flushed<Op>> : &special<Op>; break;
    case Type::kF16: execute = lane_handler<InFloat<Op, Half>, Half>(); break;
    case Type::kF16x2: execute = lane_handler<OnPairs<InFloat<Op, Half>, Half>, Pair<Half>>(); break;
    case Type::kBf16:
      execute = ftz ? lane_handler<InFloat<Flushed<Op>, Bfloat16>, Bfloat16>()
                    : lane_handler<InFloat<Op, Bfloat16>, Bfloat16>();
      break;
    case Type::kBf16x2:
      execute = ftz ? lane_handler<OnPairs<InFloat<Flushed<Op>, Bfloat16>, Bfloat16>, Pair<Bfloat16>>()
                    : lane_handler<OnPairs<InFloat<Op, Bfloat16>, Bfloat16>, Pair<Bfloat16>>();
      break;
    default: decoding.unsupported("type is not implemented");
  }
  if (ftz && (type == Type::kF16 || type == Type::kF16x2))
    decoding.unsupported("modifier .ftz is not implemented");
  if (!kTanh && !ftz && (type == Type::kBf16 || type == Type::kBf16x2))
    decoding.unsupported("only implemented with .ftz");
}

void decode_copysign(Decoding& decoding) {
  const Type type = decoding.type();
  take_operands(decoding, type, 2);
  if (type != Type::kF32 && type != Type::kF64) decoding.unsupported("type is not implemented");
  decoding.instruction.execute = type == Type::kF32 ? &binary<CopySign, float> : &binary<CopySign, double>;
}

enum class Property { kFinite, kInfinite, kNumber, kNotANumber, kNormal, kSubnormal };

template <class T>
bool has_property(T x, Property property) {
  switch (property) {
    case Property::kFinite: return std::isfinite(x);
    case Property::kInfinite: return std::isinf(x);
    case Property::kNumber: return x == x;
    case Property::kNotANumber: return x != x;
    case Property::kNormal: return std::isnormal(x) || x == 0;
    default: return std::fpclassify(x) == FP_SUBNORMAL;
  }
}

template <class T>
LaneMask testp(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  const auto* a = machine.warp().lanes<Slot<T>>(instruction.a);
  const auto property = static_cast<Property>(instruction.immediate);
  const LaneMask holds =
      lanes_where(lanes, [=](int lane) { return has_property(value_of<T>(a[lane]), property); });
  machine.warp().set_predicate(instruction.d, lanes, holds);
  return lanes;
}

void decode_testp(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  decoding.expect_operands(2, 2);
  instruction.immediate =
      decoding.require_one({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  const Type type = decoding.type();
  if (type != Type::kF32 && type != Type::kF64) decoding.unsupported("type is not implemented");
  instruction.d = decoding.predicate_destination(0);
  instruction.a = decoding.source(1, type);
  instruction.execute = type == Type::kF32 ? &testp<float> : &testp<double>;
}

}  // namespace

std::vector<Opcode> math_opcodes() {
  return {
      {"rcp", decode_root<Reciprocal>},
      {"sqrt", decode_root<SquareRoot>},
      {"rsqrt", decode_root<ReciprocalSquareRoot>},
      {"sin", decode_approximation<Sine>},
      {"cos", decode_approximation<Cosine>},
      {"lg2", decode_approximation<Log2>},
      {"ex2", decode_approximation<Exp2>},
      {"tanh", decode_approximation<Tanh>},
      {"copysign", decode_copysign},
      {"testp", decode_testp},
  };
}

}  // namespace ptx
