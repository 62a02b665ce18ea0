// Integer arithmetic (PTX ISA 9.0, section 9.7.1): add, sub, mul, mul24, mad, sad, div, rem, abs, neg, min,
// max, dp4a. Floating-point arithmetic (sections 9.7.3 and 9.7.4): add, sub, mul, fma, mad, div, abs, neg,
// min, max.
#include <algorithm>
#include <bit>
#include <limits>

#include "handlers.h"

namespace ptx {
namespace {

using std::numeric_limits;

// ---- Operations. Integers wrap around: they are computed unsigned.

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// At least 32 bits, so that products of 16-bit values do not become int.
template <class T>
using Wrapping = std::conditional_t<(sizeof(T) < 4), uint32_t, Unsigned<T>>;

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return a + b;
    else
      return static_cast<T>(Wrapping<T>(a) + Wrapping<T>(b));
  }
};

struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return a - b;
    else
      return static_cast<T>(Wrapping<T>(a) - Wrapping<T>(b));
  }
};

struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return a * b;
    else
      return static_cast<T>(Wrapping<T>(a) * Wrapping<T>(b));
  }
};

template <class T>
using Twice = std::conditional_t<
    sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>>;

template <class T>
Twice<T> full_product(T a, T b) {
  return static_cast<Twice<T>>(a) * static_cast<Twice<T>>(b);
}

struct MulHigh {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(full_product(a, b) >> (8 * sizeof(T)));
  }
};

struct MulWide {
  template <class T>
  Twice<T> operator()(T a, T b) const {
    return full_product(a, b);
  }
};

struct MadLow {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add()(Mul()(a, b), c);
  }
};

struct MadHigh {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add()(MulHigh()(a, b), c);
  }
};

struct MadWide {
  template <class T>
  Twice<T> operator()(T a, T b, Twice<T> c) const {
    return Add()(full_product(a, b), c);
  }
};

struct Mul24 {
  template <class T>
  T operator()(T a, T b) const {
    return Mul()(low24(a), low24(b));
  }

  template <class T>
  static T low24(T x) {
    return static_cast<T>(x << 8) >> 8;
  }
};

struct Sad {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add()(c, a < b ? Sub()(b, a) : Sub()(a, b));
  }
};

// Division by zero is left open by the ISA; all bits set is what the hardware's sequence yields.
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>) {
      return a / b;
    } else {
      if (b == 0) return static_cast<T>(-1);
      if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Sub()(T(0), a);
      return a / b;
    }
  }
};

struct Rem {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return a % b;
  }
};

struct Abs {
  template <class T>
  T operator()(T a) const {
    if constexpr (std::is_floating_point_v<T>)
      return std::fabs(a);
    else
      return a < 0 ? Sub()(T(0), a) : a;
  }
};

struct Neg {
  template <class T>
  T operator()(T a) const {
    if constexpr (std::is_floating_point_v<T>)
      return -a;
    else
      return Sub()(T(0), a);
  }
};

// Of a number and NaN the number is returned, and -0 is less than +0.
template <bool kMax>
struct MinMax {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a) return b;
      if (b != b) return a;
      if (a == b) return std::signbit(a) != kMax ? a : b;
    }
    return (a < b) != kMax ? a : b;
  }
};

// .NaN: of a number and NaN, NaN is returned.
template <bool kMax>
struct MinMaxNan {
  template <class T>
  T operator()(T a, T b) const {
    return a != a || b != b ? numeric_limits<T>::quiet_NaN() : MinMax<kMax>()(a, b);
  }
};

template <class Op>
struct SaturatedInt {
  int32_t operator()(int32_t a, int32_t b) const {
    const int64_t exact = Op()(int64_t{a}, int64_t{b});
    return static_cast<int32_t>(
        std::clamp<int64_t>(exact, numeric_limits<int32_t>::min(), numeric_limits<int32_t>::max()));
  }
};

struct Fma {
  template <class T>
  T operator()(T a, T b, T c) const {
    if constexpr (std::is_floating_point_v<T>) {
      return std::fma(a, b, c);
    } else {
      // The product is exact in double; rounding the sum to odd twice leaves the last rounding as the only
      // one.
      const double product = static_cast<double>(to_float(a)) * to_float(b);
      return from_float<T>(to_float_odd(add_odd(product, to_float(c))));
    }
  }
};

// Counts the operation of fma.f32 and fma.f64.
template <class Op, class T>
LaneMask counted_fma(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  machine.count().fma_flops += 2 * std::popcount(lanes);
  return ternary<Op, T>(machine, instruction, lanes);
}

template <bool kSignedA, bool kSignedB>
struct Dp4a {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    for (int shift = 0; shift < 32; shift += 8) {
      const auto x = static_cast<uint8_t>(a >> shift);
      const auto y = static_cast<uint8_t>(b >> shift);
      const int32_t left = kSignedA ? static_cast<int8_t>(x) : x;
      const int32_t right = kSignedB ? static_cast<int8_t>(y) : y;
      c += static_cast<uint32_t>(left * right);
    }
    return c;
  }
};

// ---- Decoding.

// Op on integers of the type; null where the type is none.
template <class Op>
Execute integer_handler(Type type) {
  switch (type) {
    case Type::kU16: return lane_handler<Op, uint16_t>();
    case Type::kU32: return lane_handler<Op, uint32_t>();
    case Type::kU64: return lane_handler<Op, uint64_t>();
    case Type::kS16: return lane_handler<Op, int16_t>();
    case Type::kS32: return lane_handler<Op, int32_t>();
    case Type::kS64: return lane_handler<Op, int64_t>();
    default: return nullptr;
  }
}

// Op on floats of the type, with the modifiers .ftz, .sat and .relu where they are present.
template <class Op>
Execute float_handler(Decoding& decoding, Type type) {
  if (type == Type::kF64) return lane_handler<Op, double>();
  const bool relu = decoding.accept("relu");
  switch (type) {
    case Type::kF16:
      return relu ? lane_handler<InFloat<Relu<Op>, Half>, Half>() : lane_handler<InFloat<Op, Half>, Half>();
    case Type::kBf16:
      return relu ? lane_handler<InFloat<Relu<Op>, Bfloat16>, Bfloat16>()
                  : lane_handler<InFloat<Op, Bfloat16>, Bfloat16>();
    case Type::kF16x2:
      return relu ? lane_handler<OnPairs<InFloat<Relu<Op>, Half>, Half>, Pair<Half>>()
                  : lane_handler<OnPairs<InFloat<Op, Half>, Half>, Pair<Half>>();
    case Type::kBf16x2:
      return relu ? lane_handler<OnPairs<InFloat<Relu<Op>, Bfloat16>, Bfloat16>, Pair<Bfloat16>>()
                  : lane_handler<OnPairs<InFloat<Op, Bfloat16>, Bfloat16>, Pair<Bfloat16>>();
    case Type::kF32: break;
    default: decoding.unsupported("type is not implemented");
  }
  if (relu) decoding.unsupported("modifier .relu is not implemented for .f32");
  const bool ftz = decoding.accept("ftz");
  if (decoding.accept("sat")) {
    return ftz ? lane_handler<Saturated<Flushed<Op>>, float>() : lane_handler<Saturated<Op>, float>();
  }
  return ftz ? lane_handler<Flushed<Op>, float>() : lane_handler<Op, float>();
}

template <class Op>
void decode_add_or_sub(Decoding& decoding) {
  const Type type = decoding.type();
  take_operands(decoding, type, 2);
  Execute& execute = decoding.instruction.execute;
  if (type == Type::kS32 && decoding.accept("sat")) {
    execute = &binary<SaturatedInt<Op>, int32_t>;
  } else if (!is_float(type)) {
    execute = integer_handler<Op>(type);
    if (!execute) decoding.unsupported("type is not implemented");
  } else {
    execute = float_handler<Op>(decoding, type);
    apply_rounding(decoding, type);
  }
}

template <class Op>
void set_widening_handler(Decoding& decoding, Type type) {
  Execute& execute = decoding.instruction.execute;
  constexpr bool kTernary = std::is_same_v<Op, MadWide>;
  if constexpr (kTernary) {
    switch (type) {
      case Type::kU16: execute = &ternary<Op, uint16_t, uint16_t, uint32_t>; break;
      case Type::kS16: execute = &ternary<Op, int16_t, int16_t, int32_t>; break;
      case Type::kU32: execute = &ternary<Op, uint32_t, uint32_t, uint64_t>; break;
      case Type::kS32: execute = &ternary<Op, int32_t, int32_t, int64_t>; break;
      default: decoding.unsupported("type is not implemented");
    }
  } else {
    switch (type) {
      case Type::kU16: execute = &binary<Op, uint16_t>; break;
      case Type::kS16: execute = &binary<Op, int16_t>; break;
      case Type::kU32: execute = &binary<Op, uint32_t>; break;
      case Type::kS32: execute = &binary<Op, int32_t>; break;
      default: decoding.unsupported("type is not implemented");
    }
  }
}

Type twice_as_wide(Type type) { return size_of(type) == 2 ? Type::kU32 : Type::kU64; }

void decode_mul(Decoding& decoding) {
  const Type type = decoding.type();
  Instruction& instruction = decoding.instruction;
  if (is_float(type)) {
    take_operands(decoding, type, 2);
    instruction.execute = float_handler<Mul>(decoding, type);
    apply_rounding(decoding, type);
    return;
  }
  switch (decoding.require_one({"lo", "hi", "wide"})) {
    case 0:
      take_operands(decoding, type, 2);
      instruction.execute = integer_handler<Mul>(type);
      break;
    case 1:
      take_operands(decoding, type, 2);
      instruction.execute = integer_handler<MulHigh>(type);
      break;
    default:
      decoding.expect_operands(3, 3);
      instruction.d = decoding.destination(0, twice_as_wide(type));
      instruction.a = decoding.source(1, type);
      instruction.b = decoding.source(2, type);
      set_widening_handler<MulWide>(decoding, type);
  }
  if (!instruction.execute) decoding.unsupported("type is not implemented");
}

void decode_fma(Decoding& decoding) {
  const Type type = decoding.type();
  take_operands(decoding, type, 3);
  Execute& execute = decoding.instruction.execute;
  const bool relu = decoding.accept("relu");
  if (relu && (type == Type::kF32 || type == Type::kF64))
    decoding.unsupported("modifier .relu is not implemented");
  switch (type) {
    case Type::kF16: execute = &ternary<Fma, Half>; break;
    case Type::kBf16: execute = &ternary<Fma, Bfloat16>; break;
    case Type::kF16x2: execute = &ternary<OnPairs<Fma, Half>, Pair<Half>>; break;
    case Type::kBf16x2: execute = &ternary<OnPairs<Fma, Bfloat16>, Pair<Bfloat16>>; break;
    case Type::kF64: execute = &counted_fma<Fma, double>; break;
    case Type::kF32: {
      const bool ftz = decoding.accept("ftz");
      if (decoding.accept("sat")) {
        execute = ftz ? &counted_fma<Saturated<Flushed<Fma>>, float> : &counted_fma<Saturated<Fma>, float>;
      } else {
        execute = ftz ? &counted_fma<Flushed<Fma>, float> : &counted_fma<Fma, float>;
      }
      break;
    }
    default: decoding.unsupported("type is not implemented");
  }
  if (relu) decoding.unsupported("modifier .relu is not implemented");
  apply_rounding(decoding, type);
}

void decode_mad(Decoding& decoding) {
  const int part = decoding.accept_one({"lo", "hi", "wide"});
  if (part < 0) {
    decode_fma(decoding);  // mad.f32 and mad.f64 are fma (section 9.7.3.7)
    return;
  }
  const Type type = decoding.type();
  Instruction& instruction = decoding.instruction;
  if (part < 2) {
    take_operands(decoding, type, 3);
    instruction.execute = part == 0 ? integer_handler<MadLow>(type) : integer_handler<MadHigh>(type);
  } else {
    decoding.expect_operands(4, 4);
    instruction.d = decoding.destination(0, twice_as_wide(type));
    instruction.a = decoding.source(1, type);
    instruction.b = decoding.source(2, type);
    instruction.c = decoding.source(3, twice_as_wide(type));
    set_widening_handler<MadWide>(decoding, type);
  }
  if (!instruction.execute) decoding.unsupported("type is not implemented");
}

void decode_mul24(Decoding& decoding) {
  decoding.require("lo");
  const Type type = decoding.type();
  take_operands(decoding, type, 2);
  if (type != Type::kU32 && type != Type::kS32) decoding.unsupported("type is not implemented");
  decoding.instruction.execute = type == Type::kU32 ? &binary<Mul24, uint32_t> : &binary<Mul24, int32_t>;
}

template <class Op>
void decode_integer(Decoding& decoding, int sources) {
  const Type type = decoding.type();
  take_operands(decoding, type, sources);
  decoding.instruction.execute = integer_handler<Op>(type);
  if (!decoding.instruction.execute) decoding.unsupported("type is not implemented");
}

// div.approx and div.full of float, which a special-function unit begins.
template <class Op>
LaneMask special_division(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  machine.count().special_functions += std::popcount(lanes);
  return binary<Op, float>(machine, instruction, lanes);
}

// div.approx and div.full may be off by two units in the last place; here they are rounded correctly.
void decode_div(Decoding& decoding) {
  const Type type = decoding.type();
  take_operands(decoding, type, 2);
  Execute& execute = decoding.instruction.execute;
  if (is_float(type)) {
    if (type != Type::kF32 && type != Type::kF64) decoding.unsupported("type is not implemented");
    const bool approximate = decoding.accept("approx") || decoding.accept("full");
    execute = float_handler<Div>(decoding, type);
    if (approximate && execute == lane_handler<Div, float>()) execute = &special_division<Div>;
    if (approximate && execute == lane_handler<Flushed<Div>, float>()) execute = &special_division<Flushed<Div>>;
    apply_rounding(decoding, type);
  } else {
    execute = integer_handler<Div>(type);
    if (!execute) decoding.unsupported("type is not implemented");
  }
}

template <class Op>
void decode_sign(Decoding& decoding) {
  const Type type = decoding.type();
  take_operands(decoding, type, 1);
  Execute& execute = decoding.instruction.execute;
  execute = is_float(type) ? float_handler<Op>(decoding, type) : integer_handler<Op>(type);
  if (!execute) decoding.unsupported("type is not implemented");
}

template <bool kMax>
void decode_min_or_max(Decoding& decoding) {
  const Type type = decoding.type();
  take_operands(decoding, type, 2);
  Execute& execute = decoding.instruction.execute;
  if (!is_float(type)) {
    execute = integer_handler<MinMax<kMax>>(type);
    if (!execute) decoding.unsupported("type is not implemented");
  } else if (decoding.accept("NaN")) {
    execute = float_handler<MinMaxNan<kMax>>(decoding, type);
  } else {
    execute = float_handler<MinMax<kMax>>(decoding, type);
  }
}

void decode_dp4a(Decoding& decoding) {
  const Type a = decoding.type({Type::kU32, Type::kS32});
  const Type b = decoding.type({Type::kU32, Type::kS32});
  take_operands(decoding, Type::kU32, 3);
  Execute& execute = decoding.instruction.execute;
  if (is_signed(a)) {
    execute = is_signed(b) ? &ternary<Dp4a<true, true>, uint32_t> : &ternary<Dp4a<true, false>, uint32_t>;
  } else {
    execute = is_signed(b) ? &ternary<Dp4a<false, true>, uint32_t> : &ternary<Dp4a<false, false>, uint32_t>;
  }
}

}  // namespace

std::vector<Opcode> arithmetic_opcodes() {
  return {
      {"add", decode_add_or_sub<Add>},
      {"sub", decode_add_or_sub<Sub>},
      {"mul", decode_mul},
      {"mul24", decode_mul24},
      {"mad", decode_mad},
      {"fma", decode_fma},
      {"sad", [](Decoding& decoding) { decode_integer<Sad>(decoding, 3); }},
      {"div", decode_div},
      {"rem", [](Decoding& decoding) { decode_integer<Rem>(decoding, 2); }},
      {"abs", decode_sign<Abs>},
      {"neg", decode_sign<Neg>},
      {"min", decode_min_or_max<false>},
      {"max", decode_min_or_max<true>},
      {"dp4a", decode_dp4a},
  };
}

}  // namespace ptx
