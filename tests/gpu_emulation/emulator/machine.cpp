#include "machine.h"

#include <algorithm>
#include <bit>
#include <numeric>

namespace ptx {
namespace {

constexpr uint32_t kRegisterPoison = 0xdeadbeef;
constexpr uint64_t kMaxThreads = 1024;
// A thread's number in the launch has 22 bits for its block.
constexpr uint64_t kMaxBlocks = (1ull << 22) - 1;
// Random schedules change the warp after at most this many instructions.
constexpr uint32_t kLongestTurn = 40;

}  // namespace

void Warp::diverge() {
  if (!converged) return;
  std::fill(std::begin(lane_pc), std::end(lane_pc), pc);
  converged = false;
}

void Warp::set_pc(LaneMask lanes, uint32_t target) {
  if (!lanes) return;
  if (converged) {
    if (lanes == running) {
      pc = target;
      return;
    }
    diverge();
  }
  for_each_lane(lanes, [&](int lane) { lane_pc[lane] = target; });
}

// ---- Launch.

void Machine::launch(const Kernel& kernel, const PtxLaunchShape& shape, void** arguments,
                     const PtxRegion* regions, size_t region_count, const PtxOptions& options) {
  if (!kernel.unsupported.empty()) {
    std::string list;
    for (const std::string& name : kernel.unsupported) list += "\n  " + name;
    throw Error(kernel.name + " has PTX that the emulator does not implement:" + list);
  }
  const uint64_t threads = uint64_t{shape.block[0]} * shape.block[1] * shape.block[2];
  const uint64_t blocks = uint64_t{shape.grid[0]} * shape.grid[1] * shape.grid[2];
  if (threads < 1 || threads > kMaxThreads) throw Error("a block of " + std::to_string(threads) + " threads");
  if (kernel.most_threads && threads > kernel.most_threads) {
    throw Error("a block of " + std::to_string(threads) + " threads, .maxntid allows " +
                std::to_string(kernel.most_threads));
  }
  for (size_t i = 0; i < kernel.required_block.size(); ++i) {
    if (shape.block[i] != kernel.required_block[i])
      throw Error("a block of another shape than .reqntid asks for");
  }
  if (blocks > kMaxBlocks)
    throw Error("a grid of " + std::to_string(blocks) + " blocks is too large to emulate");

  kernel_ = &kernel;
  options_ = options;
  threads_ = static_cast<uint32_t>(threads);
  std::copy_n(shape.grid, 3, grid_);
  std::copy_n(shape.block, 3, block_shape_);
  counters_ = {};
  random_.seed(options.seed);
  block_clock_ = 0;
  memory_.begin_launch(kernel, program_, regions, region_count, options, shape.dynamic_shared, arguments,
                       threads_);
  prepare_warps(threads_);

  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (options.seed) std::shuffle(order.begin(), order.end(), random_);
  for (uint32_t block : order) {
    begin_block(block);
    try {
      run_block();
    } catch (const Error& error) {
      throw Error(error.what() + place());
    }
  }
}

std::string Machine::place() const {
  std::string text = " [block (" + std::to_string(block_index_[0]) + ", " + std::to_string(block_index_[1]) +
                     ", " + std::to_string(block_index_[2]) + ")";
  if (warp_ && instruction_) {
    text += ", warp " + std::to_string(warp_->index) + ", lane " + std::to_string(lane_) + ", PTX line " +
            std::to_string(instruction_->line) + ": " + instruction_->text;
  }
  return text + "]";
}

std::vector<std::string> Machine::warnings() { return memory_.warnings(); }

void Machine::prepare_warps(uint32_t threads) {
  const uint32_t count = (threads + kWarpSize - 1) / kWarpSize;
  warps_.resize(count);
  for (uint32_t i = 0; i < count; ++i) {
    Warp& warp = warps_[i];
    warp.index = i;
    const uint32_t lanes = std::min<uint32_t>(kWarpSize, threads - i * kWarpSize);
    warp.exists = lanes == kWarpSize ? kAllLanes : (1u << lanes) - 1;
    warp.rows.resize(kernel_->rows);
  }
}

void Machine::fill_rows(Warp& warp) {
  warp.predicates.assign(kernel_->predicates, 0);
  for (Row& row : warp.rows) std::fill(std::begin(row.lanes), std::end(row.lanes), kRegisterPoison);
  for (const ConstantRow& constant : kernel_->constants) {
    Operand operand;
    operand.index = constant.row;
    if (constant.wide) {
      std::fill_n(warp.lanes<uint64_t>(operand), kWarpSize, constant.bits);
    } else {
      std::fill_n(warp.lanes<uint32_t>(operand), kWarpSize, static_cast<uint32_t>(constant.bits));
    }
  }
  for (const SpecialRow& special : kernel_->specials) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      warp.rows[special.row].lanes[lane] = special_value(special.special, warp, lane);
    }
  }
}

void Machine::begin_block(uint32_t block) {
  block_index_[0] = block % grid_[0];
  block_index_[1] = block / grid_[0] % grid_[1];
  block_index_[2] = block / grid_[0] / grid_[1];
  memory_.begin_block();
  memory_.block = block;
  for (Barrier& barrier : barriers_) barrier = {};
  for (const Warp& warp : warps_) block_clock_ = std::max(block_clock_, warp.clock);
  ++block_clock_;
  for (Warp& warp : warps_) {
    warp.alive = warp.running = warp.exists;
    warp.at_barrier = warp.at_collective = 0;
    warp.converged = true;
    warp.pc = 0;
    warp.clock = block_clock_;
    warp.epoch = 0;
    std::fill(std::begin(warp.seen), std::end(warp.seen), block_clock_);
    for (AsyncGroups& groups : warp.async) groups = {};
    fill_rows(warp);
  }
  warp_ = nullptr;
  instruction_ = nullptr;
}

uint32_t Machine::special_value(Special special, const Warp& warp, int lane) const {
  const uint32_t thread = warp.index * kWarpSize + lane;
  const uint32_t bit = 1u << lane;
  switch (special) {
    case Special::kCtaidX: return block_index_[0];
    case Special::kCtaidY: return block_index_[1];
    case Special::kCtaidZ: return block_index_[2];
    case Special::kTidX: return thread % block_shape_[0];
    case Special::kTidY: return thread / block_shape_[0] % block_shape_[1];
    case Special::kTidZ: return thread / (block_shape_[0] * block_shape_[1]);
    case Special::kNtidX: return block_shape_[0];
    case Special::kNtidY: return block_shape_[1];
    case Special::kNtidZ: return block_shape_[2];
    case Special::kNctaidX: return grid_[0];
    case Special::kNctaidY: return grid_[1];
    case Special::kNctaidZ: return grid_[2];
    case Special::kLaneid: return lane;
    case Special::kWarpid: return warp.index;
    case Special::kNwarpid: return static_cast<uint32_t>(warps_.size());
    case Special::kSmid: return 0;
    case Special::kNsmid: return 1;
    case Special::kGridid: return 0;
    case Special::kLanemaskEq: return bit;
    case Special::kLanemaskLt: return bit - 1;
    case Special::kLanemaskLe: return bit | (bit - 1);
    case Special::kLanemaskGt: return ~(bit | (bit - 1));
    case Special::kLanemaskGe: return ~(bit - 1);
    case Special::kDynamicSmemSize: return static_cast<uint32_t>(memory_.dynamic_shared());
    case Special::kTotalSmemSize: return static_cast<uint32_t>(memory_.shared_bytes());
    case Special::kClusterCtaid: return 0;
    case Special::kClusterNctaid: return 1;
  }
  return 0;
}

// ---- Schedule.

void Machine::run_block() {
  const auto can_run = [](const Warp& warp) { return warp.running != 0; };
  while (std::any_of(warps_.begin(), warps_.end(), can_run)) {
    if (!options_.seed) {
      for (Warp& warp : warps_) run_warp(warp, ~0ull);
      continue;
    }
    uint32_t ready = static_cast<uint32_t>(std::count_if(warps_.begin(), warps_.end(), can_run));
    uint32_t chosen = random_() % ready;
    const uint32_t turn = 1 + random_() % kLongestTurn;
    for (Warp& warp : warps_) {
      if (!can_run(warp) || chosen-- > 0) continue;
      run_warp(warp, turn);
      break;
    }
  }
  if (std::any_of(warps_.begin(), warps_.end(), [](const Warp& warp) { return warp.alive != 0; }))
    fail_deadlock();
}

void Machine::fail_deadlock() const {
  std::string text = "deadlock:";
  for (const Warp& warp : warps_) {
    if (!warp.alive) continue;
    text += " warp " + std::to_string(warp.index);
    if (warp.at_barrier)
      text += " waits at a barrier (" + std::to_string(std::popcount(warp.at_barrier)) + " lanes)";
    if (warp.at_collective) {
      text += " waits for lanes that never arrive at its collective (" +
              std::to_string(std::popcount(warp.at_collective)) + " lanes)";
    }
    text += ",";
  }
  throw Error(text + " other threads have exited or wait elsewhere");
}

void Machine::run_warp(Warp& warp, uint64_t instructions) {
  warp_ = &warp;
  memory_.accessor = {0, warp.clock, warp.epoch, warp.seen};
  for (; warp.running && instructions; --instructions) step(warp);
}

void Machine::step(Warp& warp) {
  LaneMask here = warp.running;
  uint32_t pc = warp.pc;
  if (!warp.converged) {
    pc = ~0u;
    for_each_lane(warp.running, [&](int lane) { pc = std::min(pc, warp.lane_pc[lane]); });
    here = 0;
    for (LaneMask rest = warp.running; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      if (warp.lane_pc[lane] == pc) here |= 1u << lane;
    }
    if (here == warp.alive) {
      warp.converged = true;
      warp.pc = pc;
    } else {
      ++counters_.divergent_instructions;
    }
  }
  const Instruction& instruction = kernel_->code[pc];
  instruction_ = &instruction;
  pc_ = pc;
  LaneMask lanes = here;
  if (instruction.guard >= 0) {
    const LaneMask guard = warp.predicates[instruction.guard];
    lanes &= instruction.guard_negated ? ~guard : guard;
  }
  lane_ = std::countr_zero(lanes ? lanes : here);
  ++counters_.instructions;
  counters_.thread_instructions += std::popcount(lanes);
  if (counters_.instructions > options_.instruction_limit)
    throw Error("instruction limit reached: an endless loop?");

  const LaneMask done = lanes ? instruction.execute(*this, instruction, lanes) : 0;
  warp.set_pc((here & ~lanes) | done, pc + 1);
}

// ---- Waiting.

LaneMask Machine::gather(LaneMask lanes, LaneMask members) {
  Warp& warp = *warp_;
  members &= warp.exists;
  if (lanes == members) return lanes;
  if (members & ~warp.alive) throw Error("the member mask names lanes that have exited");
  if (lanes & ~members) throw Error("a lane that executes this is not in its member mask");
  LaneMask here = lanes;
  for (LaneMask rest = warp.at_collective; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (warp.lane_pc[lane] == pc_) here |= 1u << lane;
  }
  warp.diverge();
  if ((here & members) == members) {
    warp.at_collective &= ~members;
    warp.running |= members;
    return members;
  }
  warp.at_collective |= lanes;
  warp.running &= ~lanes;
  return 0;
}

LaneMask Machine::gather_groups(LaneMask lanes, const Operand& members, LaneGroups& groups) {
  Warp& warp = *warp_;
  const uint32_t* masks = warp.lanes<uint32_t>(members);
  const LaneMask first = masks[std::countr_zero(lanes)] & warp.exists;
  const auto is_first = [&](int lane) { return (masks[lane] & warp.exists) == first; };
  if (members.constant || lanes_where(lanes, is_first) == lanes) {
    const LaneMask gathered = gather(lanes, first);
    if (gathered) groups.push_back(gathered);
    return gathered;
  }
  // Lanes of different tiles arrive together, as compilers emit them.
  LaneMask left = lanes;
  while (left) {
    const int lane = std::countr_zero(left);
    lane_ = lane;
    const LaneMask group = masks[lane] & warp.exists;
    if (!(group >> lane & 1)) throw Error("a lane that executes this is not in its member mask");
    if ((group & left) != group) throw Error("lanes of a member mask are not here, or in two masks");
    for (LaneMask rest = group; rest; rest &= rest - 1) {
      if ((masks[std::countr_zero(rest)] & warp.exists) != group)
        throw Error("member masks of a tile differ");
    }
    groups.push_back(group);
    left &= ~group;
  }
  return lanes;
}

void Machine::sync_warp() {
  ++warp_->epoch;
  memory_.accessor.warp_epoch = warp_->epoch;
}

uint32_t Machine::alive_threads() const {
  uint32_t alive = 0;
  for (const Warp& warp : warps_) alive += std::popcount(warp.alive);
  return alive;
}

void Machine::arrive_at_barrier(LaneMask lanes, uint32_t number, uint32_t threads, bool wait, bool aligned) {
  Warp& warp = *warp_;
  if (number >= kBarriers) throw Error("barrier " + std::to_string(number) + " of 16");
  // Lanes of one warp may come one after the other if they all come to a barrier.
  const bool complete = lanes == warp.alive || (lanes | warp.at_barrier) == warp.alive;
  if (aligned && !complete) {
    throw Error("divergent barrier: executed by " + std::to_string(std::popcount(lanes)) + " of " +
                std::to_string(std::popcount(warp.alive)) + " lanes");
  }
  const uint32_t alive = alive_threads();
  if (!threads && alive != threads_) throw Error("a barrier of all threads after some have exited");
  Barrier& barrier = barriers_[number];
  const uint32_t expected = threads ? threads : alive;
  if (threads && barrier.arrived && barrier.expected != expected)
    throw Error("threads of a barrier disagree on its count");
  barrier.expected = expected;
  barrier.arrived += std::popcount(lanes);
  barrier.warps |= 1u << warp.index;
  for (size_t other = 0; other < warps_.size(); ++other) {
    barrier.seen[other] = std::max(barrier.seen[other], warp.seen[other]);
  }
  // What this warp did so far lies before whatever follows the barrier.
  barrier.seen[warp.index] = std::max(barrier.seen[warp.index], warp.clock + 1);
  ++warp.clock;
  memory_.accessor.clock = warp.clock;
  ++counters_.barriers;

  warp.set_pc(lanes, pc_ + 1);
  if (wait) {
    warp.at_barrier |= lanes;
    warp.running &= ~lanes;
    for_each_lane(lanes, [&](int lane) { warp.barrier_of[lane] = static_cast<uint8_t>(number); });
  }
  if (barrier.arrived > barrier.expected) throw Error("more threads at the barrier than it waits for");
  if (barrier.arrived == barrier.expected) release(number);
}

void Machine::release(uint32_t number) {
  Barrier& barrier = barriers_[number];
  for (Warp& warp : warps_) {
    LaneMask released = 0;
    for (LaneMask rest = warp.at_barrier; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      if (warp.barrier_of[lane] == number) released |= 1u << lane;
    }
    if (!released) continue;
    warp.at_barrier &= ~released;
    warp.running |= released;
    for (size_t other = 0; other < warps_.size(); ++other) {
      warp.seen[other] = std::max(warp.seen[other], barrier.seen[other]);
    }
  }
  barrier = {};
}

void Machine::exit_lanes(LaneMask lanes) {
  Warp& warp = *warp_;
  for (LaneMask rest = lanes; rest; rest &= rest - 1) {
    lane_ = std::countr_zero(rest);
    if (!warp.async[lane_].empty()) throw Error("a thread exits with cp.async still in flight");
  }
  warp.alive &= ~lanes;
  warp.running &= ~lanes;
}

void Machine::addresses(const Address& address, LaneMask lanes, uint64_t* result) {
  if (!address.base) {
    std::fill(result, result + kWarpSize, static_cast<uint64_t>(address.offset));
  } else if (address.base.wide) {
    const uint64_t* base = warp_->lanes<uint64_t>(address.base);
    for_each_lane(lanes, [=](int lane) { result[lane] = base[lane] + address.offset; });
  } else {
    const uint32_t* base = warp_->lanes<uint32_t>(address.base);
    for_each_lane(lanes, [=](int lane) { result[lane] = base[lane] + address.offset; });
  }
}

}  // namespace ptx
