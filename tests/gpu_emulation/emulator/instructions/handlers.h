// Handlers for instructions that compute each lane by itself: d = op(a), op(a, b) or op(a, b, c).
#pragma once
#include <cfenv>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "../decoder.h"
#include "../lanes.h"
#include "../machine.h"

namespace ptx {

// Result type of an operation on values of type T.
template <class Op, class T>
LaneMask unary(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  using Result = std::invoke_result_t<Op, T>;
  Warp& warp = machine.warp();
  const auto* a = warp.lanes<Slot<T>>(instruction.a);
  auto* d = warp.lanes<Slot<Result>>(instruction.d);
  for_each_lane(lanes, [=](int lane) { d[lane] = slot_of<Result>(Op()(value_of<T>(a[lane]))); });
  return lanes;
}

template <class Op, class T, class B = T>
LaneMask binary(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  using Result = std::invoke_result_t<Op, T, B>;
  Warp& warp = machine.warp();
  const auto* a = warp.lanes<Slot<T>>(instruction.a);
  const auto* b = warp.lanes<Slot<B>>(instruction.b);
  auto* d = warp.lanes<Slot<Result>>(instruction.d);
  for_each_lane(
      lanes, [=](int lane) { d[lane] = slot_of<Result>(Op()(value_of<T>(a[lane]), value_of<B>(b[lane]))); });
  return lanes;
}

template <class Op, class T, class B = T, class C = T>
LaneMask ternary(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  using Result = std::invoke_result_t<Op, T, B, C>;
  Warp& warp = machine.warp();
  const auto* a = warp.lanes<Slot<T>>(instruction.a);
  const auto* b = warp.lanes<Slot<B>>(instruction.b);
  const auto* c = warp.lanes<Slot<C>>(instruction.c);
  auto* d = warp.lanes<Slot<Result>>(instruction.d);
  for_each_lane(lanes, [=](int lane) {
    d[lane] = slot_of<Result>(Op()(value_of<T>(a[lane]), value_of<B>(b[lane]), value_of<C>(c[lane])));
  });
  return lanes;
}

// The handler with as many operands of type T as Op takes.
template <class Op, class T>
constexpr Execute lane_handler() {
  if constexpr (std::is_invocable_v<Op, T, T, T>) {
    return &ternary<Op, T>;
  } else if constexpr (std::is_invocable_v<Op, T, T>) {
    return &binary<Op, T>;
  } else {
    return &unary<Op, T>;
  }
}

// Two 16-bit floats of one register.
template <class T>
struct Pair {
  T low;
  T high;
};

// ---- Wrappers of operations on floats.

inline float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

// .ftz: subnormal inputs and results become zero.
template <class Op>
struct Flushed {
  template <class... T>
  auto operator()(T... x) const -> std::invoke_result_t<Op, T...> {
    return flush(Op()(flush(x)...));
  }
};

// .sat: the result is clamped to [0, 1], NaN becomes 0.
template <class Op>
struct Saturated {
  template <class... T>
  auto operator()(T... x) const -> std::invoke_result_t<Op, T...> {
    const auto result = Op()(x...);
    return result > 0 ? (result < 1 ? result : 1) : 0;
  }
};

// .relu: negative results become 0, NaN stays NaN.
template <class Op>
struct Relu {
  template <class... T>
  auto operator()(T... x) const -> std::invoke_result_t<Op, T...> {
    const auto result = Op()(x...);
    return result < 0 ? 0 : result;
  }
};

// An operation on float applied to a 16-bit type. One operation in float and one rounding to 11 bits or fewer
// rounds as if once, since float has more than twice the bits.
template <class Op, class T>
struct InFloat {
  template <class... U>
    requires(std::is_same_v<U, T> && ...) && (std::is_invocable_v<Op, std::conditional_t<true, float, U>...>)
  T operator()(U... x) const {
    return from_float<T>(Op()(to_float(x)...));
  }
};

template <class Op, class T>
struct OnPairs {
  template <class... U>
    requires(std::is_same_v<U, Pair<T>> && ...) &&
            (std::is_invocable_v<Op, std::conditional_t<true, T, U>...>)
  Pair<T> operator()(U... x) const {
    return {Op()(x.low...), Op()(x.high...)};
  }
};

// ---- Rounding.

// Executes `inner` in the rounding mode that `immediate` holds. The call through a pointer keeps the compiler
// from moving arithmetic across the change of mode.
inline LaneMask execute_rounded(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  std::fesetround(static_cast<int>(instruction.immediate));
  const LaneMask done = instruction.inner(machine, instruction, lanes);
  std::fesetround(FE_TONEAREST);
  return done;
}

// Takes .rn, .rz, .rm, .rp (section 9.7.3); `execute` must be set already. 16-bit types have .rn alone.
inline void apply_rounding(Decoding& decoding, Type type) {
  static constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  if (decoding.accept("rn") || (type != Type::kF32 && type != Type::kF64)) return;
  const int mode = decoding.accept_one({"rn", "rz", "rm", "rp"});
  if (mode < 0) return;
  Instruction& instruction = decoding.instruction;
  instruction.inner = instruction.execute;
  instruction.execute = &execute_rounded;
  instruction.immediate = static_cast<uint64_t>(kModes[mode]);
}

// Sets d and the sources a, b, c that the statement has, all of one type.
inline void take_operands(Decoding& decoding, Type type, int sources) {
  decoding.expect_operands(sources + 1, sources + 1);
  Instruction& instruction = decoding.instruction;
  instruction.d = decoding.destination(0, type);
  instruction.a = decoding.source(1, type);
  if (sources > 1) instruction.b = decoding.source(2, type);
  if (sources > 2) instruction.c = decoding.source(3, type);
}

}  // namespace ptx
