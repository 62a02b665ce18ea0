// cp.async, cp.async.commit_group, cp.async.wait_group, cp.async.wait_all (PTX ISA 9.0, section 9.7.9.25.3).
// The bytes arrive at the wait. Until then the destination is poison, and reading or writing it is an error.
#include <algorithm>
#include <cstring>

#include "../decoder.h"
#include "access.h"

namespace ptx {
namespace {

// cp.async [a], [source], size{, source_size or ignore}: `immediate` is the size, `b` the source size, `c`
// the predicate that asks for zeros, `flag` says that the addresses of the source lie in `source`.
struct Source {
  Address address;
};

LaneMask copy(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const int bytes = static_cast<int>(instruction.immediate);
  uint64_t to[kWarpSize];
  uint64_t from[kWarpSize];
  machine.addresses(instruction.address, lanes, to);
  machine.addresses(static_cast<const Source*>(instruction.extra.get())->address, lanes, from);
  const LaneMask ignored = instruction.c ? warp.predicate(instruction.c) : 0;
  LaneMask reading = 0;
  for (LaneMask rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    int source_bytes = ignored >> lane & 1 ? 0 : bytes;
    if (instruction.b)
      source_bytes = static_cast<int>(std::min<uint64_t>(bytes, warp.value(instruction.b, lane)));
    machine.set_lane(lane);
    if (from[lane] % bytes) throw Error("misaligned source of cp.async");
    if (source_bytes > 0) {
      reading |= 1u << lane;
      // Only these bytes are read: the rest may lie outside the buffer.
      for (int offset = 0; offset < source_bytes;) {
        const int part = std::bit_floor(static_cast<unsigned>(source_bytes - offset));
        machine.access(Space::kGlobal, from[lane] + offset, part, AccessKind::kRead, lane);
        offset += part;
      }
    }
    machine.memory().start_async_copy(to[lane], bytes, machine.thread(lane));
    warp.async[lane].copies.push_back({to[lane], from[lane], bytes, source_bytes});
    ++warp.async[lane].open;
  }
  if (reading) count_global_load(machine.count(), from, reading, bytes);
  count_shared(machine.count(), to, lanes, bytes);
  ++machine.count().async_copies;
  return lanes;
}

LaneMask commit_group(Machine& machine, const Instruction&, LaneMask lanes) {
  for_each_lane(lanes, [&](int lane) {
    AsyncGroups& groups = machine.warp().async[lane];
    groups.sizes.push_back(groups.open);
    groups.open = 0;
  });
  return lanes;
}

void finish(Machine& machine, int lane, uint32_t copies) {
  AsyncGroups& groups = machine.warp().async[lane];
  machine.set_lane(lane);
  for (uint32_t i = 0; i < copies; ++i) {
    const AsyncCopy& copy = groups.copies[i];
    uint8_t* to = machine.memory().finish_async_copy(copy.shared_address, copy.bytes, machine.thread(lane));
    std::memset(to, 0, copy.bytes);
    std::memcpy(to, reinterpret_cast<const void*>(copy.global_address), copy.source_bytes);
  }
  groups.copies.erase(groups.copies.begin(), groups.copies.begin() + copies);
}

// Waits until at most `immediate` of the thread's newest groups are in flight.
LaneMask wait_group(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  for (LaneMask rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    AsyncGroups& groups = machine.warp().async[lane];
    if (groups.sizes.size() <= instruction.immediate) continue;
    const size_t done = groups.sizes.size() - instruction.immediate;
    uint32_t copies = 0;
    for (size_t i = 0; i < done; ++i) copies += groups.sizes[i];
    groups.sizes.erase(groups.sizes.begin(), groups.sizes.begin() + done);
    finish(machine, lane, copies);
  }
  return lanes;
}

LaneMask wait_all(Machine& machine, const Instruction&, LaneMask lanes) {
  for (LaneMask rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    AsyncGroups& groups = machine.warp().async[lane];
    groups.sizes.clear();
    groups.open = 0;
    finish(machine, lane, static_cast<uint32_t>(groups.copies.size()));
  }
  return lanes;
}

void decode_cp(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  decoding.require("async");
  if (decoding.accept("commit_group")) {
    instruction.execute = &commit_group;
    return;
  }
  if (decoding.accept("wait_group")) {
    instruction.immediate = decoding.immediate(0);
    instruction.execute = &wait_group;
    return;
  }
  if (decoding.accept("wait_all")) {
    instruction.execute = &wait_all;
    return;
  }
  const bool bypass_l1 = decoding.require_one({"ca", "cg"}) == 1;
  decoding.accept_one({"L2::64B", "L2::128B", "L2::256B"});
  const bool policy = decoding.accept("L2::cache_hint");
  if (!decoding.accept("shared") && !decoding.accept("shared::cta"))
    decoding.unsupported("destination is not shared");
  decoding.require("global");
  decoding.expect_operands(3, 4 + policy);
  if (policy) decoding.ignore(decoding.operands() - 1);
  instruction.address = decoding.address(0);
  instruction.extra = std::make_shared<Source>(Source{decoding.address(1)});
  instruction.immediate = decoding.immediate(2);
  const bool valid_size = instruction.immediate == 16 ||
                          (!bypass_l1 && (instruction.immediate == 4 || instruction.immediate == 8));
  if (!valid_size) decoding.unsupported("copy of " + std::to_string(instruction.immediate) + " bytes");
  if (decoding.operands() - policy > 3) {
    if (decoding.is_predicate(3)) {
      instruction.c = decoding.predicate_source(3);
    } else {
      instruction.b = decoding.source(3, Type::kU32);
    }
  }
  instruction.execute = &copy;
}

}  // namespace

std::vector<Opcode> async_copy_opcodes() { return {{"cp", decode_cp}}; }

}  // namespace ptx
