// Fundamental types of PTX (PTX ISA 9.0, section 5.2) and the numbers behind them.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace ptx {

enum class Type : uint8_t {
  kNone,
  kPred,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kB8,
  kB16,
  kB32,
  kB64,
  kF16,
  kF16x2,
  kBf16,
  kBf16x2,
  kTf32,
  kF32,
  kF64,
};

// The type a modifier or directive names, without its dot.
std::optional<Type> type_named(std::string_view name);

int size_of(Type type);  // bytes
bool is_signed(Type type);
bool is_float(Type type);
inline bool is_wide(Type type) { return size_of(type) == 8; }

// What stops a module from being read or a kernel from being run.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Small floats as they lie in registers.
struct Half {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

inline float to_float(Half x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }
inline float to_float(Bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(float x) { return x; }

// Rounding to nearest even; NaN becomes the canonical NaN of the type.
inline Half to_half(float x) {
  if (x != x) return {0x7fff};
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

inline Bfloat16 to_bfloat16(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// The nearest float, or, between two, the one whose last bit is odd: rounding again to fewer bits is then as
// if there had been no first rounding (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums",
// 2008).
inline float to_float_odd(double x) {
  const float nearest = static_cast<float>(x);
  if (static_cast<double>(nearest) == x || x != x || std::isinf(nearest)) return nearest;
  if (std::bit_cast<uint32_t>(nearest) & 1) return nearest;
  return std::nextafter(nearest, x > nearest ? INFINITY : -INFINITY);
}

// The sum rounded to odd in double.
inline double add_odd(double a, double b) {
  const double sum = a + b;
  const double b_part = sum - a;
  const double error = (a - (sum - b_part)) + (b - b_part);
  if (error == 0 || error != error || (std::bit_cast<uint64_t>(sum) & 1)) return sum;
  return std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}

template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, Half>) {
    return to_half(x);
  } else if constexpr (std::is_same_v<T, Bfloat16>) {
    return to_bfloat16(x);
  } else {
    return x;
  }
}

// tf32 keeps the upper 19 bits of a float; the tensor cores ignore the rest.
inline float tf32_value(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

}  // namespace ptx
