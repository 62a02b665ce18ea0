// Communication between the lanes of a warp: shfl.sync (PTX ISA 9.0, section 9.7.9.6), vote.sync (9.7.13.9),
// match.sync (9.7.13.10), activemask (9.7.13.11), redux.sync (9.7.13.12), elect.sync (9.7.13.14).
#include <algorithm>
#include <cmath>

#include "handlers.h"

namespace ptx {
namespace {

enum class Shuffle { kUp, kDown, kButterfly, kIndex };

// The lane that `lane` reads from, and whether it lies in range; c packs the clamp and the segment mask.
struct Source {
  int lane;
  bool in_range;
};

Source shuffle_source(Shuffle mode, int lane, uint32_t b, uint32_t c) {
  const int offset = static_cast<int>(b & 31);
  const int segment = static_cast<int>(c >> 8 & 31);
  const int clamp = static_cast<int>(c & 31);
  const int most = (lane & segment) | (clamp & ~segment);
  const int least = lane & segment;
  switch (mode) {
    case Shuffle::kUp: return {lane - offset, lane - offset >= most};
    case Shuffle::kDown: return {lane + offset, lane + offset <= most};
    case Shuffle::kButterfly: return {lane ^ offset, (lane ^ offset) <= most};
    default: {
      const int source = least | (offset & ~segment);
      return {source, source <= most};
    }
  }
}

// shfl.sync.mode.b32 d|p, a, b, c, membermask
LaneMask shfl(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  LaneGroups groups;
  lanes = machine.gather_groups(lanes, instruction.members, groups);
  if (!lanes) return 0;
  Warp& warp = machine.warp();
  uint32_t a[kWarpSize];
  std::copy_n(warp.lanes<uint32_t>(instruction.a), kWarpSize, a);
  const uint32_t* b = warp.lanes<uint32_t>(instruction.b);
  const uint32_t* c = warp.lanes<uint32_t>(instruction.c);
  const uint32_t* members = warp.lanes<uint32_t>(instruction.members);
  uint32_t* d = instruction.d.kind == Operand::kSink ? nullptr : warp.lanes<uint32_t>(instruction.d);
  const auto mode = static_cast<Shuffle>(instruction.immediate);
  LaneMask in_range = 0;
  uint32_t result[kWarpSize];
  for (LaneMask rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const Source source = shuffle_source(mode, lane, b[lane], c[lane]);
    const int from = source.in_range ? source.lane : lane;
    if (!(members[lane] >> from & 1)) {
      machine.set_lane(lane);
      throw Error("shfl.sync reads from lane " + std::to_string(from) + ", which is not in the member mask");
    }
    result[lane] = a[from];
    in_range |= static_cast<LaneMask>(source.in_range) << lane;
  }
  if (d) for_each_lane(lanes, [&](int lane) { d[lane] = result[lane]; });
  if (instruction.p) warp.set_predicate(instruction.p, lanes, in_range);
  return lanes;
}

enum class Vote { kAll, kAny, kUniform, kBallot };

LaneMask vote(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  LaneGroups groups;
  lanes = machine.gather_groups(lanes, instruction.members, groups);
  Warp& warp = machine.warp();
  for (LaneMask group : groups) {
    const LaneMask yes =
        (instruction.flag ? static_cast<LaneMask>(instruction.target) : warp.predicate(instruction.a)) &
        group;
    switch (static_cast<Vote>(instruction.immediate)) {
      case Vote::kAll: warp.set_predicate(instruction.d, group, yes == group ? kAllLanes : 0); break;
      case Vote::kAny: warp.set_predicate(instruction.d, group, yes ? kAllLanes : 0); break;
      case Vote::kUniform:
        warp.set_predicate(instruction.d, group, yes == group || !yes ? kAllLanes : 0);
        break;
      case Vote::kBallot:
        for_each_lane(group, [&](int lane) { warp.set_value(instruction.d, lane, yes); });
        break;
    }
  }
  return lanes;
}

struct Minimum {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};

struct Maximum {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};

struct Sum {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a + b; }
};

struct BitAnd {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a & b; }
};

struct BitOr {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};

struct BitXor {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a ^ b; }
};

template <class Op, class T>
LaneMask redux(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  LaneGroups groups;
  lanes = machine.gather_groups(lanes, instruction.members, groups);
  Warp& warp = machine.warp();
  const uint32_t* a = warp.lanes<uint32_t>(instruction.a);
  for (LaneMask group : groups) {
    T total = value_of<T>(a[std::countr_zero(group)]);
    for (LaneMask rest = group & (group - 1); rest; rest &= rest - 1) {
      total = Op()(total, value_of<T>(a[std::countr_zero(rest)]));
    }
    for_each_lane(group, [&](int lane) { warp.set_value(instruction.d, lane, slot_of<T>(total)); });
  }
  return lanes;
}

// match.any: the lanes with the same value. match.all: the mask if all have it, else 0; p says which.
template <class T, bool kAll>
LaneMask match(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  LaneGroups groups;
  lanes = machine.gather_groups(lanes, instruction.members, groups);
  Warp& warp = machine.warp();
  T a[kWarpSize];
  std::copy_n(warp.lanes<T>(instruction.a), kWarpSize, a);
  for (LaneMask group : groups) {
    for (LaneMask rest = group; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      const LaneMask same = lanes_where(group, [&](int other) { return a[other] == a[lane]; });
      const LaneMask result = kAll && same != group ? 0 : same;
      warp.set_value(instruction.d, lane, result);
      if (instruction.p) warp.set_predicate(instruction.p, 1u << lane, result ? kAllLanes : 0);
    }
  }
  return lanes;
}

LaneMask activemask(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  for_each_lane(lanes, [&](int lane) { machine.warp().set_value(instruction.d, lane, lanes); });
  return lanes;
}

// elect.sync d|p, membermask: the lowest lane leads.
LaneMask elect(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  LaneGroups groups;
  lanes = machine.gather_groups(lanes, instruction.members, groups);
  Warp& warp = machine.warp();
  for (LaneMask group : groups) {
    const int leader = std::countr_zero(group);
    for_each_lane(group, [&](int lane) { warp.set_value(instruction.d, lane, leader); });
    if (instruction.p) warp.set_predicate(instruction.p, group, 1u << leader);
  }
  return lanes;
}

// ---- Decoding.

void decode_shfl(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  decoding.require("sync");
  decoding.expect_operands(5, 5);
  instruction.immediate = decoding.require_one({"up", "down", "bfly", "idx"});
  const Type type = decoding.type({Type::kB32});
  instruction.d = decoding.destination(0, type);
  instruction.p = decoding.second_predicate(0);
  instruction.a = decoding.source(1, type);
  instruction.b = decoding.source(2, Type::kB32);
  instruction.c = decoding.source(3, Type::kB32);
  instruction.members = decoding.source(4, Type::kB32);
  instruction.execute = &shfl;
}

void decode_vote(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  decoding.require("sync");
  decoding.expect_operands(3, 3);
  instruction.immediate = decoding.require_one({"all", "any", "uni", "ballot"});
  const bool ballot = static_cast<Vote>(instruction.immediate) == Vote::kBallot;
  const Type type = decoding.type({ballot ? Type::kB32 : Type::kPred});
  instruction.d = ballot ? decoding.destination(0, type) : decoding.predicate_destination(0);
  if (decoding.is_immediate(1)) {
    instruction.flag = true;  // a constant predicate, in `target`
    instruction.target = decoding.immediate(1) ? kAllLanes : 0;
  } else {
    instruction.a = decoding.predicate_source(1);
  }
  instruction.members = decoding.source(2, Type::kB32);
  instruction.execute = &vote;
}

void decode_redux(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  decoding.require("sync");
  decoding.expect_operands(3, 3);
  const int operation = decoding.require_one({"add", "min", "max", "and", "or", "xor"});
  const Type type =
      operation < 3 ? decoding.type({Type::kU32, Type::kS32}) : decoding.type({Type::kB32});
  instruction.d = decoding.destination(0, type);
  instruction.a = decoding.source(1, type);
  instruction.members = decoding.source(2, Type::kB32);
  const bool negative = is_signed(type);
  switch (operation) {
    case 0: instruction.execute = &redux<Sum, uint32_t>; break;
    case 1: instruction.execute = negative ? &redux<Minimum, int32_t> : &redux<Minimum, uint32_t>; break;
    case 2: instruction.execute = negative ? &redux<Maximum, int32_t> : &redux<Maximum, uint32_t>; break;
    case 3: instruction.execute = &redux<BitAnd, uint32_t>; break;
    case 4: instruction.execute = &redux<BitOr, uint32_t>; break;
    default: instruction.execute = &redux<BitXor, uint32_t>; break;
  }
}

void decode_match(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  const bool all = decoding.require_one({"any", "all"}) == 1;
  decoding.require("sync");
  decoding.expect_operands(3, 3);
  const Type type = decoding.type({Type::kB32, Type::kB64});
  instruction.d = decoding.destination(0, Type::kB32);
  if (all) instruction.p = decoding.second_predicate(0);
  instruction.a = decoding.source(1, type);
  instruction.members = decoding.source(2, Type::kB32);
  if (is_wide(type)) {
    instruction.execute = all ? &match<uint64_t, true> : &match<uint64_t, false>;
  } else {
    instruction.execute = all ? &match<uint32_t, true> : &match<uint32_t, false>;
  }
}

void decode_activemask(Decoding& decoding) {
  decoding.expect_operands(1, 1);
  decoding.instruction.d = decoding.destination(0, decoding.type({Type::kB32}));
  decoding.instruction.execute = &activemask;
}

void decode_elect(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  decoding.require("sync");
  decoding.expect_operands(2, 2);
  instruction.d = decoding.destination(0, Type::kB32);
  instruction.p = decoding.second_predicate(0);
  instruction.members = decoding.source(1, Type::kB32);
  instruction.execute = &elect;
}

}  // namespace

std::vector<Opcode> warp_opcodes() {
  return {{"shfl", decode_shfl},
          {"vote", decode_vote},
          {"redux", decode_redux},
          {"match", decode_match},
          {"activemask", decode_activemask},
          {"elect", decode_elect}};
}

}  // namespace ptx
