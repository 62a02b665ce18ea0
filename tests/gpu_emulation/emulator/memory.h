// State spaces (PTX ISA 9.0, section 5.1) with their checks: bounds, alignment, initialisation, races.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "program.h"
#include "ptx.h"
#include "races.h"

namespace ptx {

// Generic addresses of shared and local memory; all others are global, and addresses of the host.
constexpr uint64_t kSharedWindow = 0x7100000000000000ull;
constexpr uint64_t kLocalWindow = 0x7200000000000000ull;
constexpr uint64_t kWindowSize = 1ull << 32;

inline bool in_window(uint64_t address, uint64_t window) { return address - window < kWindowSize; }

class Memory {
 public:
  void begin_launch(const Kernel& kernel, const Program& program, const PtxRegion* regions, size_t count,
                    const PtxOptions& options, uint64_t dynamic_shared, void** arguments, uint32_t threads);
  void begin_block();

  // The bytes behind an access of one thread, after all checks. Throws Error with what is wrong.
  // `thread` is the thread's index in its block; `new_bytes`, where known, what a write is going to store.
  uint8_t* access(Space space, uint64_t address, int bytes, AccessKind kind, uint32_t thread,
                  const uint8_t* new_bytes = nullptr);

  // Marks shared bytes as the destination of a cp.async that has not been waited for.
  void start_async_copy(uint64_t shared_address, int bytes, uint32_t thread);
  // The write that becomes visible at the wait.
  uint8_t* finish_async_copy(uint64_t shared_address, int bytes, uint32_t thread);

  uint64_t shared_bytes() const { return shared_.size(); }
  uint64_t dynamic_shared() const { return dynamic_shared_; }

  // Set by the machine before the accesses of a warp: its clock and what it has seen. `thread` of it is
  // unused.
  Accessor accessor = {};
  uint32_t block = 0;  // number of the block, for races between blocks

  std::vector<std::string> warnings();

 private:
  struct Region {
    uint64_t begin;
    uint64_t end;
    std::string name;
    bool read_only;
    std::unique_ptr<AccessHistory> history;
  };

  enum ByteState : uint8_t { kUnwritten, kWritten, kInFlight };

  uint8_t* shared(uint64_t address, int bytes, AccessKind kind, uint32_t thread, const uint8_t* new_bytes);
  uint8_t* global(uint64_t address, int bytes, AccessKind kind, uint32_t thread, const uint8_t* new_bytes);
  void check_initialised(uint64_t offset, int bytes, AccessKind kind) const;
  void check_race(AccessHistory& history, const char* what, uint64_t offset, int bytes, AccessKind kind,
                  uint32_t thread, const uint8_t* old_bytes, const uint8_t* new_bytes);
  [[noreturn]] void fail_out_of_bounds(uint64_t address, AccessKind kind) const;

  PtxOptions options_ = {};
  RaceOptions race_options_ = {};
  std::vector<Region> regions_;
  Region* last_region_ = nullptr;
  std::vector<uint8_t> shared_;
  std::vector<uint8_t> shared_state_;  // ByteState of each byte
  std::unique_ptr<AccessHistory> shared_history_;
  uint64_t dynamic_shared_ = 0;
  std::vector<uint8_t> local_;
  uint64_t local_bytes_ = 0;  // a thread
  std::vector<uint8_t> parameters_;
};

}  // namespace ptx
