// cvt (PTX ISA 9.0, section 9.7.9.21): between integers, between floats, and from one to the other.
#include <algorithm>
#include <cmath>
#include <limits>

#include "handlers.h"

namespace ptx {
namespace {

enum class Integral { kNearest, kZero, kDown, kUp };  // .rni, .rzi, .rmi, .rpi

template <Integral kMode, class T>
T to_integral(T x) {
  switch (kMode) {
    case Integral::kNearest: return std::nearbyint(x);
    case Integral::kZero: return std::trunc(x);
    case Integral::kDown: return std::floor(x);
    default: return std::ceil(x);
  }
}

// ---- Integers. Without .sat the upper bits are dropped; a register wider than the result is sign- or
// zero-extended.

template <class D>
using Register =
    std::conditional_t<(sizeof(D) < 4), std::conditional_t<std::is_signed_v<D>, int32_t, uint32_t>, D>;

template <class D>
struct Truncate {
  template <class S>
  Register<D> operator()(S x) const {
    return static_cast<D>(x);
  }
};

template <class D>
struct Clamp {
  template <class S>
  Register<D> operator()(S x) const {
    const __int128 least = std::numeric_limits<D>::min();
    const __int128 most = std::numeric_limits<D>::max();
    return static_cast<D>(std::clamp<__int128>(x, least, most));
  }
};

// ---- Float to integer: clamped to the range; NaN is 0, from double or for 64-bit results the highest bit
// alone.

template <class D, Integral kMode, bool kFtz>
struct FloatToInteger {
  template <class S>
  Register<D> operator()(S value) const {
    auto x = widen(value);
    if constexpr (kFtz) x = flush(x);
    constexpr bool kHighestBit = sizeof(D) == 8 || std::is_same_v<S, double>;
    if (x != x) return kHighestBit ? static_cast<D>(1ull << (8 * sizeof(D) - 1)) : 0;
    x = to_integral<kMode>(x);
    // 2^bits is exact in any floating type, the largest integer is not.
    const auto limit = std::ldexp(decltype(x){1}, std::numeric_limits<D>::digits);
    if (x >= limit) return std::numeric_limits<D>::max();
    if (std::is_signed_v<D> ? x < -limit : x < 0) return std::numeric_limits<D>::min();
    return static_cast<D>(x);
  }

  template <class S>
  static auto widen(S x) {
    if constexpr (std::is_floating_point_v<S>)
      return x;
    else
      return to_float(x);
  }
};

// ---- Integer to float.

template <class D>
struct IntegerToFloat {
  template <class S>
  D operator()(S x) const {
    if constexpr (std::is_floating_point_v<D>)
      return static_cast<D>(x);
    else
      return from_float<D>(to_float_odd(static_cast<double>(x)));
  }
};

// ---- Float to float.

// To 16 bits, rounding toward zero.
inline Half to_half_toward_zero(float x) {
  Half half = to_half(x);
  if (std::isfinite(x) && std::fabs(to_float(half)) > std::fabs(x)) --half.bits;
  return half;
}

inline Bfloat16 to_bfloat16_toward_zero(float x) {
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16)};
}

template <class D, bool kTowardZero>
D narrow(float x) {
  if constexpr (std::is_same_v<D, Half>)
    return kTowardZero ? to_half_toward_zero(x) : to_half(x);
  else
    return kTowardZero ? to_bfloat16_toward_zero(x) : to_bfloat16(x);
}

template <class D, bool kTowardZero>
struct Narrow {
  template <class S>
  D operator()(S x) const {
    if constexpr (std::is_same_v<S, double>)
      return narrow<D, kTowardZero>(to_float_odd(x));
    else
      return narrow<D, kTowardZero>(to_float(x));
  }
};

template <class D>
struct Widen {
  template <class S>
  D operator()(S x) const {
    if constexpr (std::is_floating_point_v<S>)
      return static_cast<D>(x);
    else
      return static_cast<D>(to_float(x));
  }
};

template <Integral kMode>
struct RoundToIntegral {
  template <class T>
  T operator()(T x) const {
    if constexpr (std::is_floating_point_v<T>)
      return to_integral<kMode>(x);
    else
      return from_float<T>(to_integral<kMode>(to_float(x)));
  }
};

template <class Op, class T>
struct SaturatedNarrow {
  template <class S>
  T operator()(S x) const {
    const T result = Op()(x);
    const float value = to_float(result);
    return from_float<T>(value > 0 ? std::min(value, 1.0f) : 0.0f);
  }
};

// cvt.f16x2.f32 d, a, b: a becomes the upper half.
template <class D, bool kTowardZero, bool kRelu>
struct NarrowPair {
  Pair<D> operator()(float high, float low) const {
    if (kRelu) {
      high = high < 0 ? 0 : high;
      low = low < 0 ? 0 : low;
    }
    return {narrow<D, kTowardZero>(low), narrow<D, kTowardZero>(high)};
  }
};

// tf32 keeps 10 bits of the fraction: .rna rounds ties away from zero, .rn to even.
template <bool kTiesAway>
struct ToTf32 {
  uint32_t operator()(uint32_t bits) const {
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffffff;
    const uint32_t half = kTiesAway ? 0x1000 : 0xfff + (bits >> 13 & 1);
    return (bits + half) & 0xffffe000u;
  }
};

// ---- Decoding.

// The low bits of a source register wider than the type (section 9.4.1).
template <class Op, class S>
struct LowBits {
  auto operator()(uint64_t x) const { return Op()(static_cast<S>(x)); }
};

template <class Op>
Execute from_integer(Decoding& decoding, Type source) {
  if (decoding.instruction.a.wide && !is_wide(source)) {
    switch (source) {
      case Type::kU32:
      case Type::kB32: return &unary<LowBits<Op, uint32_t>, uint64_t>;
      case Type::kS32: return &unary<LowBits<Op, int32_t>, uint64_t>;
      default: decoding.unsupported("64-bit register for a narrow type");
    }
  }
  switch (source) {
    case Type::kU8:
    case Type::kB8: return &unary<Op, uint8_t>;
    case Type::kU16:
    case Type::kB16: return &unary<Op, uint16_t>;
    case Type::kU32:
    case Type::kB32: return &unary<Op, uint32_t>;
    case Type::kU64:
    case Type::kB64: return &unary<Op, uint64_t>;
    case Type::kS8: return &unary<Op, int8_t>;
    case Type::kS16: return &unary<Op, int16_t>;
    case Type::kS32: return &unary<Op, int32_t>;
    case Type::kS64: return &unary<Op, int64_t>;
    default: decoding.unsupported("type is not implemented");
  }
}

template <template <class> class Op>
Execute to_integer(Decoding& decoding, Type result, Type source) {
  switch (result) {
    case Type::kU8:
    case Type::kB8: return from_integer<Op<uint8_t>>(decoding, source);
    case Type::kU16:
    case Type::kB16: return from_integer<Op<uint16_t>>(decoding, source);
    case Type::kU32:
    case Type::kB32: return from_integer<Op<uint32_t>>(decoding, source);
    case Type::kU64:
    case Type::kB64: return from_integer<Op<uint64_t>>(decoding, source);
    case Type::kS8: return from_integer<Op<int8_t>>(decoding, source);
    case Type::kS16: return from_integer<Op<int16_t>>(decoding, source);
    case Type::kS32: return from_integer<Op<int32_t>>(decoding, source);
    case Type::kS64: return from_integer<Op<int64_t>>(decoding, source);
    default: decoding.unsupported("type is not implemented");
  }
}

template <class Op>
Execute from_float_type(Decoding& decoding, Type source) {
  switch (source) {
    case Type::kF16: return &unary<Op, Half>;
    case Type::kBf16: return &unary<Op, Bfloat16>;
    case Type::kF32: return &unary<Op, float>;
    case Type::kF64: return &unary<Op, double>;
    default: decoding.unsupported("type is not implemented");
  }
}

// .ftz concerns float alone.
template <class Op, bool kFtz>
Execute from_float_or_flushed(Decoding& decoding, Type source) {
  if constexpr (kFtz) {
    return &unary<Op, float>;
  } else {
    return from_float_type<Op>(decoding, source);
  }
}

template <Integral kMode, bool kFtz>
Execute float_to_integer(Decoding& decoding, Type result, Type source) {
  switch (result) {
    case Type::kU8:
      return from_float_or_flushed<FloatToInteger<uint8_t, kMode, kFtz>, kFtz>(decoding, source);
    case Type::kU16:
      return from_float_or_flushed<FloatToInteger<uint16_t, kMode, kFtz>, kFtz>(decoding, source);
    case Type::kU32:
      return from_float_or_flushed<FloatToInteger<uint32_t, kMode, kFtz>, kFtz>(decoding, source);
    case Type::kU64:
      return from_float_or_flushed<FloatToInteger<uint64_t, kMode, kFtz>, kFtz>(decoding, source);
    case Type::kS8: return from_float_or_flushed<FloatToInteger<int8_t, kMode, kFtz>, kFtz>(decoding, source);
    case Type::kS16:
      return from_float_or_flushed<FloatToInteger<int16_t, kMode, kFtz>, kFtz>(decoding, source);
    case Type::kS32:
      return from_float_or_flushed<FloatToInteger<int32_t, kMode, kFtz>, kFtz>(decoding, source);
    case Type::kS64:
      return from_float_or_flushed<FloatToInteger<int64_t, kMode, kFtz>, kFtz>(decoding, source);
    default: decoding.unsupported("type is not implemented");
  }
}

template <Integral kMode>
Execute float_to_integer(Decoding& decoding, Type result, Type source) {
  if (source == Type::kF32 && decoding.accept("ftz"))
    return float_to_integer<kMode, true>(decoding, result, source);
  return float_to_integer<kMode, false>(decoding, result, source);
}

void decode_float_to_integer(Decoding& decoding, Type result, Type source) {
  Execute& execute = decoding.instruction.execute;
  decoding.accept("sat");  // the result is clamped in any case
  switch (decoding.require_one({"rni", "rzi", "rmi", "rpi"})) {
    case 0: execute = float_to_integer<Integral::kNearest>(decoding, result, source); break;
    case 1: execute = float_to_integer<Integral::kZero>(decoding, result, source); break;
    case 2: execute = float_to_integer<Integral::kDown>(decoding, result, source); break;
    default: execute = float_to_integer<Integral::kUp>(decoding, result, source); break;
  }
}

void decode_integer_to_float(Decoding& decoding, Type result, Type source) {
  Execute& execute = decoding.instruction.execute;
  switch (result) {
    case Type::kF16: execute = from_integer<IntegerToFloat<Half>>(decoding, source); break;
    case Type::kBf16: execute = from_integer<IntegerToFloat<Bfloat16>>(decoding, source); break;
    case Type::kF32: execute = from_integer<IntegerToFloat<float>>(decoding, source); break;
    case Type::kF64: execute = from_integer<IntegerToFloat<double>>(decoding, source); break;
    default: decoding.unsupported("type is not implemented");
  }
  apply_rounding(decoding, result);
}

template <class D>
Execute narrowing(Decoding& decoding, Type source) {
  const bool toward_zero = decoding.accept("rz");
  if (!toward_zero) decoding.accept("rn");
  if (decoding.accept("sat")) {
    return toward_zero ? from_float_type<SaturatedNarrow<Narrow<D, true>, D>>(decoding, source)
                       : from_float_type<SaturatedNarrow<Narrow<D, false>, D>>(decoding, source);
  }
  return toward_zero ? from_float_type<Narrow<D, true>>(decoding, source)
                     : from_float_type<Narrow<D, false>>(decoding, source);
}

template <class D>
Execute widening(Decoding& decoding, Type source) {
  // Values of 16-bit floats are normal ones of D.
  const bool ftz = source != Type::kF64 && decoding.accept("ftz") && source == Type::kF32;
  if (decoding.accept("sat")) {
    return ftz ? &unary<Saturated<Flushed<Widen<D>>>, float>
               : from_float_type<Saturated<Widen<D>>>(decoding, source);
  }
  return ftz ? &unary<Flushed<Widen<D>>, float> : from_float_type<Widen<D>>(decoding, source);
}

void decode_float_to_float(Decoding& decoding, Type result, Type source) {
  Execute& execute = decoding.instruction.execute;
  const int integral = decoding.accept_one({"rni", "rzi", "rmi", "rpi"});
  if (integral >= 0) {
    if (result != source) decoding.unsupported("rounding to an integer with a change of type");
    const bool ftz = source == Type::kF32 && decoding.accept("ftz");
    if (ftz) {
      switch (integral) {
        case 0: execute = &unary<Flushed<RoundToIntegral<Integral::kNearest>>, float>; return;
        case 1: execute = &unary<Flushed<RoundToIntegral<Integral::kZero>>, float>; return;
        case 2: execute = &unary<Flushed<RoundToIntegral<Integral::kDown>>, float>; return;
        default: execute = &unary<Flushed<RoundToIntegral<Integral::kUp>>, float>; return;
      }
    }
    switch (integral) {
      case 0: execute = from_float_type<RoundToIntegral<Integral::kNearest>>(decoding, source); break;
      case 1: execute = from_float_type<RoundToIntegral<Integral::kZero>>(decoding, source); break;
      case 2: execute = from_float_type<RoundToIntegral<Integral::kDown>>(decoding, source); break;
      default: execute = from_float_type<RoundToIntegral<Integral::kUp>>(decoding, source); break;
    }
    return;
  }
  switch (result) {
    case Type::kF16: execute = narrowing<Half>(decoding, source); break;
    case Type::kBf16: execute = narrowing<Bfloat16>(decoding, source); break;
    case Type::kF32: execute = widening<float>(decoding, source); break;
    case Type::kF64: execute = widening<double>(decoding, source); break;
    default: decoding.unsupported("type is not implemented");
  }
  apply_rounding(decoding, result);
}

template <class D>
Execute pair_narrowing(Decoding& decoding) {
  const bool toward_zero = decoding.require_one({"rn", "rz"}) == 1;
  const bool relu = decoding.accept("relu");
  if (toward_zero)
    return relu ? &binary<NarrowPair<D, true, true>, float> : &binary<NarrowPair<D, true, false>, float>;
  return relu ? &binary<NarrowPair<D, false, true>, float> : &binary<NarrowPair<D, false, false>, float>;
}

// cvt{.rounding}{.ftz}{.sat}.dtype.atype d, a
void decode_cvt(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  const Type result = decoding.type();
  const Type source = decoding.type();
  if (result == Type::kF16x2 || result == Type::kBf16x2) {
    if (source != Type::kF32) decoding.unsupported("type is not implemented");
    take_operands(decoding, Type::kF32, 2);
    instruction.execute =
        result == Type::kF16x2 ? pair_narrowing<Half>(decoding) : pair_narrowing<Bfloat16>(decoding);
    return;
  }
  decoding.expect_operands(2, 2);
  instruction.d = decoding.destination(0, result);
  instruction.a = is_float(source) ? decoding.source(1, source) : decoding.relaxed_source(1, source);
  if (result == Type::kTf32) {
    if (source != Type::kF32) decoding.unsupported("type is not implemented");
    const bool ties_away = decoding.require_one({"rna", "rn"}) == 0;
    instruction.execute = ties_away ? &unary<ToTf32<true>, uint32_t> : &unary<ToTf32<false>, uint32_t>;
  } else if (!is_float(result) && !is_float(source)) {
    instruction.execute = decoding.accept("sat") ? to_integer<Clamp>(decoding, result, source)
                                                 : to_integer<Truncate>(decoding, result, source);
  } else if (!is_float(result)) {
    decode_float_to_integer(decoding, result, source);
  } else if (!is_float(source)) {
    decode_integer_to_float(decoding, result, source);
  } else {
    decode_float_to_float(decoding, result, source);
  }
}

}  // namespace

std::vector<Opcode> conversion_opcodes() { return {{"cvt", decode_cvt}}; }

}  // namespace ptx
