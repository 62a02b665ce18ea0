// Control flow (PTX ISA 9.0, section 9.7.12): bra, ret, exit. Barriers and fences (9.7.13): bar, barrier,
// membar, fence, griddepcontrol. Miscellaneous (9.7.19): trap, brkpt, nanosleep, pmevent, setmaxnreg.
#include "../decoder.h"
#include "../machine.h"

namespace ptx {
namespace {

LaneMask bra(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  machine.warp().set_pc(lanes, instruction.target);
  return 0;
}

LaneMask exit(Machine& machine, const Instruction&, LaneMask lanes) {
  machine.exit_lanes(lanes);
  return 0;
}

LaneMask trap(Machine&, const Instruction&, LaneMask) {
  throw Error("trap: an assertion failed, or the code trapped");
}

LaneMask nothing(Machine&, const Instruction&, LaneMask lanes) { return lanes; }

// bar.warp.sync membermask
LaneMask bar_warp(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  LaneGroups groups;
  const LaneMask gathered = machine.gather_groups(lanes, instruction.members, groups);
  if (gathered) machine.sync_warp();
  return gathered;
}

// bar.sync a{, b}; bar.arrive a, b. `immediate` has bit 0 where the threads wait, bit 1 where the warp must
// be whole.
LaneMask bar(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  Warp& warp = machine.warp();
  const int lane = std::countr_zero(lanes);
  const auto number = static_cast<uint32_t>(warp.value(instruction.a, lane));
  const auto threads = instruction.b ? static_cast<uint32_t>(warp.value(instruction.b, lane)) : 0;
  machine.arrive_at_barrier(lanes, number, threads, instruction.immediate & 1, instruction.immediate & 2);
  return 0;
}

void decode_bra(Decoding& decoding) {
  decoding.accept("uni");
  decoding.expect_operands(1, 1);
  decoding.instruction.target = decoding.label(0);
  decoding.instruction.execute = &bra;
}

void decode_exit(Decoding& decoding) {
  decoding.accept("uni");
  decoding.instruction.execute = &exit;
}

void decode_barrier(Decoding& decoding, bool aligned) {
  Instruction& instruction = decoding.instruction;
  if (decoding.accept("warp")) {
    decoding.require("sync");
    decoding.expect_operands(1, 1);
    instruction.members = decoding.source(0, Type::kB32);
    instruction.execute = &bar_warp;
    return;
  }
  decoding.accept("cta");
  aligned |= decoding.accept("aligned");
  const bool wait = decoding.require_one({"sync", "arrive"}) == 0;
  decoding.expect_operands(wait ? 1 : 2, 2);
  instruction.a = decoding.source(0, Type::kU32);
  if (decoding.operands() > 1) instruction.b = decoding.source(1, Type::kU32);
  instruction.immediate = (wait ? 1 : 0) | (aligned ? 2 : 0);
  instruction.execute = &bar;
}

// One memory, in program order: fences have nothing to do.
void decode_fence(Decoding& decoding) {
  decoding.accept_one({"sc", "acq_rel", "acquire", "release", "proxy"});
  decoding.accept_one({"cta", "cluster", "gpu", "sys", "gl"});
  decoding.accept_one({"alias", "async", "async.global", "async.shared"});
  decoding.accept_one({"global", "shared::cta", "shared::cluster"});
  decoding.instruction.execute = &nothing;
}

void decode_nanosleep(Decoding& decoding) {
  decoding.accept_type();
  for (int i = 0; i < decoding.operands(); ++i) decoding.ignore(i);  // none in a call of vprintf
  decoding.instruction.execute = &nothing;
}

void decode_pmevent(Decoding& decoding) {
  decoding.accept("mask");
  decoding.immediate(0);
  decoding.instruction.execute = &nothing;
}

void decode_griddepcontrol(Decoding& decoding) {
  decoding.require_one({"launch_dependents", "wait"});
  decoding.instruction.execute = &nothing;
}

void decode_setmaxnreg(Decoding& decoding) {
  decoding.require_one({"inc", "dec"});
  decoding.require("sync");
  decoding.require("aligned");
  decoding.require("u32");
  decoding.immediate(0);
  decoding.instruction.execute = &nothing;
}

}  // namespace

Execute branch_handler() { return &bra; }

std::vector<Opcode> control_opcodes() {
  return {
      {"bra", decode_bra},
      {"ret", decode_exit},
      {"exit", decode_exit},
      {"bar", [](Decoding& decoding) { decode_barrier(decoding, true); }},
      {"barrier", [](Decoding& decoding) { decode_barrier(decoding, false); }},
      {"membar", decode_fence},
      {"fence", decode_fence},
      {"griddepcontrol", decode_griddepcontrol},
      {"trap", [](Decoding& decoding) { decoding.instruction.execute = &trap; }},
      {"brkpt", [](Decoding& decoding) { decoding.instruction.execute = &trap; }},
      {"nanosleep", decode_nanosleep},
      {"pmevent", decode_pmevent},
      {"setmaxnreg", decode_setmaxnreg},
  };
}

}  // namespace ptx
