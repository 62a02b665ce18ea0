#include "memory.h"

#include <algorithm>
#include <cstring>

namespace ptx {
namespace {

constexpr uint8_t kSharedPoison = 0xff;  // NaN in every floating type
constexpr uint8_t kLocalPoison = 0xcc;
constexpr uint64_t kMaxShared = 232448;  // 227 KB, compute capability 9.0

template <class T>
bool all_bytes_are(const uint8_t* bytes, uint8_t value) {
  T word;
  std::memcpy(&word, bytes, sizeof word);
  return word == static_cast<T>(0x0101010101010101ull * value);
}

const char* verb(AccessKind kind) { return kind == AccessKind::kRead ? "read" : "write"; }

}  // namespace

void Memory::begin_launch(const Kernel& kernel, const Program& program, const PtxRegion* regions,
                          size_t count, const PtxOptions& options, uint64_t dynamic_shared, void** arguments,
                          uint32_t threads) {
  options_ = options;
  race_options_ = {options.grid_races != 0, options.warp_races != 0};
  regions_.clear();
  last_region_ = nullptr;
  for (size_t i = 0; i < count; ++i) {
    regions_.push_back({regions[i].address, regions[i].address + regions[i].size, regions[i].name,
                        regions[i].read_only != 0, nullptr});
  }
  for (const auto& [name, variable] : program.globals) {
    regions_.push_back({variable->address, variable->address + variable->size, name, false, nullptr});
  }

  dynamic_shared_ = dynamic_shared;
  const uint64_t total = dynamic_shared ? kernel.dynamic_shared_offset + dynamic_shared : kernel.shared_bytes;
  if (total > kMaxShared)
    throw Error("shared memory of " + std::to_string(total) + " bytes, a block can have 232448");
  shared_.assign(total, kSharedPoison);
  shared_state_.assign(total, kUnwritten);
  shared_history_ = options.races ? std::make_unique<AccessHistory>(total, true) : nullptr;

  local_bytes_ = (kernel.local_bytes + 15) / 16 * 16;
  local_.assign(local_bytes_ * threads, kLocalPoison);

  parameters_.assign(kernel.parameter_bytes, 0);
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    std::memcpy(parameters_.data() + kernel.parameter_offsets[i], arguments[i], kernel.parameters[i].size);
  }
}

void Memory::begin_block() {
  std::fill(shared_.begin(), shared_.end(), kSharedPoison);
  std::fill(shared_state_.begin(), shared_state_.end(), kUnwritten);
  std::fill(local_.begin(), local_.end(), kLocalPoison);
}

uint8_t* Memory::access(Space space, uint64_t address, int bytes, AccessKind kind, uint32_t thread,
                        const uint8_t* new_bytes) {
  if (space == Space::kGeneric) {
    if (in_window(address, kSharedWindow)) {
      space = Space::kShared;
      address -= kSharedWindow;
    } else if (in_window(address, kLocalWindow)) {
      space = Space::kLocal;
      address -= kLocalWindow;
    } else {
      space = Space::kGlobal;
    }
  }
  if (address & (bytes - 1)) throw Error("misaligned " + std::to_string(bytes) + "-byte access");
  switch (space) {
    case Space::kShared: return shared(address, bytes, kind, thread, new_bytes);
    case Space::kGlobal: return global(address, bytes, kind, thread, new_bytes);
    case Space::kLocal:
      if (address + bytes > local_bytes_) throw Error("local memory access out of bounds");
      return local_.data() + thread * local_bytes_ + address;
    default:
      if (kind != AccessKind::kRead) throw Error("write to a kernel parameter");
      if (address + bytes > parameters_.size()) throw Error("kernel parameter access out of bounds");
      return parameters_.data() + address;
  }
}

uint8_t* Memory::shared(uint64_t address, int bytes, AccessKind kind, uint32_t thread,
                        const uint8_t* new_bytes) {
  const uint64_t offset = static_cast<uint32_t>(address);
  if (offset + bytes > shared_.size()) {
    throw Error("shared memory access out of bounds: offset " + std::to_string(offset) + " of " +
                std::to_string(shared_.size()));
  }
  check_initialised(offset, bytes, kind);
  if (kind != AccessKind::kRead) std::memset(shared_state_.data() + offset, kWritten, bytes);
  uint8_t* data = shared_.data() + offset;
  if (shared_history_) check_race(*shared_history_, "shared", offset, bytes, kind, thread, data, new_bytes);
  return data;
}

void Memory::check_initialised(uint64_t offset, int bytes, AccessKind kind) const {
  if (!options_.uninitialized) return;
  const uint8_t* state = shared_state_.data() + offset;
  bool written;
  switch (bytes) {
    case 4: written = all_bytes_are<uint32_t>(state, kWritten); break;
    case 8: written = all_bytes_are<uint64_t>(state, kWritten); break;
    case 16:
      written = all_bytes_are<uint64_t>(state, kWritten) && all_bytes_are<uint64_t>(state + 8, kWritten);
      break;
    default: written = std::all_of(state, state + bytes, [](uint8_t s) { return s == kWritten; }); break;
  }
  if (written) return;
  for (int i = 0; i < bytes; ++i) {
    const std::string at = ", offset " + std::to_string(offset + i);
    if (state[i] == kInFlight) {
      throw Error(std::string(verb(kind)) + " of shared memory with a cp.async still in flight" + at);
    }
    if (state[i] == kUnwritten && kind != AccessKind::kWrite)
      throw Error("read of uninitialised shared memory" + at);
  }
}

uint8_t* Memory::global(uint64_t address, int bytes, AccessKind kind, uint32_t thread,
                        const uint8_t* new_bytes) {
  auto* data = reinterpret_cast<uint8_t*>(address);
  if (!options_.bounds) return data;
  Region* region = last_region_;
  if (!region || address < region->begin || address + bytes > region->end) {
    const auto found = std::find_if(regions_.begin(), regions_.end(), [&](const Region& candidate) {
      return address >= candidate.begin && address + bytes <= candidate.end;
    });
    if (found == regions_.end()) fail_out_of_bounds(address, kind);
    region = last_region_ = &*found;
  }
  if (kind != AccessKind::kRead && region->read_only)
    throw Error("write to read-only buffer " + region->name);
  if (options_.races && !region->read_only) {
    // Words of the history are words of memory also where the region starts within one.
    const uint64_t start = region->begin & ~3ull;
    if (!region->history) region->history = std::make_unique<AccessHistory>(region->end - start, false);
    check_race(*region->history, region->name.c_str(), address - start, bytes, kind, thread, data, new_bytes);
  }
  return data;
}

void Memory::check_race(AccessHistory& history, const char* what, uint64_t offset, int bytes, AccessKind kind,
                        uint32_t thread, const uint8_t* old_bytes, const uint8_t* new_bytes) {
  accessor.thread = thread_number(block, thread);
  const char* race = history.record(offset, bytes, kind, accessor, race_options_, old_bytes, new_bytes);
  if (!race) return;
  const uint32_t other = history.other_thread() - 1;
  throw Error(std::string("data race on ") + what + " memory at offset " + std::to_string(offset) + ": " +
              race + " (thread " + std::to_string(other & 1023) + " of block " + std::to_string(other >> 10) +
              ")");
}

void Memory::fail_out_of_bounds(uint64_t address, AccessKind kind) const {
  std::string nearest = "there is no buffer";
  uint64_t least = ~0ull;
  for (const Region& region : regions_) {
    const bool before = address < region.begin;
    const uint64_t distance = before                  ? region.begin - address
                              : address >= region.end ? address - region.end
                                                      : 0;
    if (distance >= least) continue;
    least = distance;
    nearest = "nearest is " + region.name + (before ? " - " : " + ") +
              std::to_string(before ? region.begin - address : address - region.begin) + " of " +
              std::to_string(region.end - region.begin) + " bytes";
  }
  throw Error(std::string("global memory ") + verb(kind) + " out of bounds: " + nearest);
}

void Memory::start_async_copy(uint64_t shared_address, int bytes, uint32_t thread) {
  uint8_t* data = access(Space::kShared, shared_address, bytes, AccessKind::kWrite, thread);
  std::memset(data, kSharedPoison, bytes);
  std::memset(shared_state_.data() + (data - shared_.data()), kInFlight, bytes);
}

uint8_t* Memory::finish_async_copy(uint64_t shared_address, int bytes, uint32_t thread) {
  const uint64_t offset = static_cast<uint32_t>(shared_address);
  std::memset(shared_state_.data() + offset, kWritten, bytes);
  return access(Space::kShared, shared_address, bytes, AccessKind::kWrite, thread);
}

std::vector<std::string> Memory::warnings() {
  std::vector<std::string> all;
  for (const Region& region : regions_) {
    if (region.history && region.history->reads_of_atomics()) {
      all.push_back("plain reads of " + region.name + " while other threads update it atomically: " +
                    std::to_string(region.history->reads_of_atomics()));
    }
  }
  return all;
}

}  // namespace ptx
