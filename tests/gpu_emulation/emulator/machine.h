// Runs a grid: one block after the other, its warps in turns, the lanes of a warp in lock-step. Lanes that
// diverge meet again because those with the lowest program counter go first.
#pragma once
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "counters.h"
#include "memory.h"
#include "program.h"

namespace ptx {

// A cp.async that was issued and not yet waited for.
struct AsyncCopy {
  uint64_t shared_address;
  uint64_t global_address;
  int bytes;
  int source_bytes;  // the rest becomes zero
};

// The cp.async groups of one thread, oldest first (PTX ISA 9.0, section 9.7.9.25).
struct AsyncGroups {
  std::vector<AsyncCopy> copies;  // of all groups and then of the open one
  std::vector<uint32_t> sizes;    // of the committed groups
  uint32_t open = 0;              // copies not committed yet

  bool empty() const { return copies.empty(); }
};

// Distinct member masks of lanes that run a collective together.
class LaneGroups {
 public:
  void push_back(LaneMask mask) { masks_[count_++] = mask; }
  const LaneMask* begin() const { return masks_; }
  const LaneMask* end() const { return masks_ + count_; }

 private:
  LaneMask masks_[kWarpSize];
  int count_ = 0;
};

struct alignas(64) Row {
  uint32_t lanes[kWarpSize];
};

struct Warp {
  uint32_t index = 0;             // in the block
  LaneMask exists = 0;            // the last warp of a block may have fewer lanes
  LaneMask alive = 0;             // not exited
  LaneMask running = 0;           // alive, and waiting for nobody
  LaneMask at_barrier = 0;        // of the block
  LaneMask at_collective = 0;     // waiting for lanes of the member mask
  uint8_t barrier_of[kWarpSize];  // the barrier a lane waits at
  bool converged = true;          // all running lanes are at `pc`
  uint32_t pc = 0;
  uint32_t lane_pc[kWarpSize];  // where not converged
  uint32_t clock = 0;           // barriers passed, see races.h
  uint32_t epoch = 0;           // bar.warp.sync passed
  uint32_t seen[kMaxWarps];
  std::vector<Row> rows;
  std::vector<LaneMask> predicates;
  AsyncGroups async[kWarpSize];

  // Register rows are read and written as whatever the instruction makes of them (-fno-strict-aliasing).
  template <class T>
  T* lanes(const Operand& operand) {
    return reinterpret_cast<T*>(rows[operand.index].lanes);
  }

  LaneMask predicate(const Operand& operand) const {
    const LaneMask value = predicates[operand.index];
    return operand.negated ? ~value : value;
  }

  void set_predicate(const Operand& operand, LaneMask lanes, LaneMask value) {
    if (operand.kind != Operand::kPredicate) return;
    LaneMask& predicate = predicates[operand.index];
    predicate = (predicate & ~lanes) | (value & lanes);
  }

  // One lane's value of a register of either width.
  uint64_t value(const Operand& operand, int lane) {
    return operand.wide ? lanes<uint64_t>(operand)[lane] : lanes<uint32_t>(operand)[lane];
  }

  void set_value(const Operand& operand, int lane, uint64_t value) {
    if (operand.kind == Operand::kSink) return;
    if (operand.wide) {
      lanes<uint64_t>(operand)[lane] = value;
    } else {
      lanes<uint32_t>(operand)[lane] = static_cast<uint32_t>(value);
    }
  }

  void set_pc(LaneMask lanes, uint32_t target);
  void diverge();
};

class Machine {
 public:
  explicit Machine(const Program& program) : program_(program) {}

  void launch(const Kernel& kernel, const PtxLaunchShape& shape, void** arguments, const PtxRegion* regions,
              size_t region_count, const PtxOptions& options);

  const Counters& counters() const { return counters_; }
  std::vector<std::string> warnings();

  // ---- For the instructions.

  Warp& warp() { return *warp_; }
  Memory& memory() { return memory_; }
  Counters& count() { return counters_; }
  uint64_t clock() const { return counters_.instructions; }
  uint32_t pc() const { return pc_; }

  // The addresses of a memory operand.
  void addresses(const Address& address, LaneMask lanes, uint64_t* result);

  // One lane's access to memory; remembers the lane for messages.
  uint8_t* access(Space space, uint64_t address, int bytes, AccessKind kind, int lane,
                  const uint8_t* new_bytes = nullptr) {
    lane_ = lane;
    return memory_.access(space, address, bytes, kind, thread(lane), new_bytes);
  }
  uint32_t thread(int lane) const { return warp_->index * kWarpSize + lane; }
  void set_lane(int lane) { lane_ = lane; }

  // A collective of the lanes in `members` (bar.warp.sync, shfl.sync ...): those that have arrived, or 0
  // while some are missing; the lanes then wait. Throws where the rest can never come.
  LaneMask gather(LaneMask lanes, LaneMask members);

  // As gather, where lanes may name different masks (tiles of a warp). `groups` receives the distinct masks.
  LaneMask gather_groups(LaneMask lanes, const Operand& members, LaneGroups& groups);

  // Orders the memory accesses of the lanes of this warp.
  void sync_warp();

  // bar.sync and bar.arrive (PTX ISA 9.0, section 9.7.13.1).
  void arrive_at_barrier(LaneMask lanes, uint32_t barrier, uint32_t threads, bool wait, bool aligned);

  void exit_lanes(LaneMask lanes);

 private:
  static constexpr int kBarriers = 16;

  struct Barrier {
    uint32_t arrived = 0;
    uint32_t expected = 0;
    LaneMask warps = 0;             // that arrived, waiting or not
    uint32_t seen[kMaxWarps] = {};  // joined clocks of those
  };

  void prepare_warps(uint32_t threads);
  void begin_block(uint32_t block);
  void run_block();
  void run_warp(Warp& warp, uint64_t instructions);
  void step(Warp& warp);
  void fill_rows(Warp& warp);
  uint32_t special_value(Special special, const Warp& warp, int lane) const;
  void release(uint32_t barrier);
  uint32_t alive_threads() const;
  std::string place() const;
  [[noreturn]] void fail_deadlock() const;

  const Program& program_;
  const Kernel* kernel_ = nullptr;
  Memory memory_;
  Counters counters_;
  PtxOptions options_ = {};
  std::mt19937 random_;
  std::vector<Warp> warps_;
  Barrier barriers_[kBarriers];
  uint32_t grid_[3] = {};
  uint32_t block_shape_[3] = {};
  uint32_t block_index_[3] = {};
  uint32_t threads_ = 0;
  uint32_t block_clock_ = 0;  // clocks of this block start here, above all of the blocks before

  // Where execution is, for the instructions and for messages.
  Warp* warp_ = nullptr;
  const Instruction* instruction_ = nullptr;
  uint32_t pc_ = 0;
  int lane_ = 0;
};

}  // namespace ptx
