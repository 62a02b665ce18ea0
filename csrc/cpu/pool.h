// Memory of the kernels that is used again from call to call. malloc would give large blocks back to the system and fetch
// them again page by page: 1400 pages, a fifth of the step, for 1024 pairs of NT-Xent.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstddef>
#include <mutex>
#include <vector>

namespace ssl_kernels::cpu {

// Keeps blocks that nobody uses, at most kIdle bytes of them, until the process ends.
class Pool final : public c10::Allocator {
 public:
  // Never destroyed: tensors may outlive everything static.
  static Pool& instance() {
    static Pool* pool = new Pool;
    return *pool;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kWorthwhile) return c10::GetCPUAllocator()->allocate(bytes);
    Block block = take(bytes + kHeader);
    if (!block.start) block = {static_cast<char*>(c10::alloc_cpu(bytes + kHeader)), bytes + kHeader};
    *reinterpret_cast<size_t*>(block.start) = block.bytes;
    c10::profiledCPUMemoryReporter().New(block.start, block.bytes);  // what a profiler shows is what is in use
    return {block.start + kHeader, block.start, &give_back, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static constexpr size_t kWorthwhile = 64 << 10, kIdle = 128 << 20;
  static constexpr size_t kHeader = 64;  // holds a block's size and keeps the rest aligned

  struct Block {
    char* start = nullptr;
    size_t bytes = 0;
  };

  // The smallest idle block that is large enough and at most a quarter too large, if there is one; of equal ones the last used,
  // which may lie in a cache.
  Block take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = idle_.end();
    for (auto block = idle_.begin(); block != idle_.end(); ++block)
      if (block->bytes >= bytes && block->bytes - bytes <= bytes / 4 && (best == idle_.end() || block->bytes <= best->bytes))
        best = block;
    if (best == idle_.end()) return {};
    const Block block = *best;
    idle_.erase(best);
    idle_bytes_ -= block.bytes;
    return block;
  }

  static void give_back(void* start) {
    const Block block{static_cast<char*>(start), *static_cast<size_t*>(start)};
    c10::profiledCPUMemoryReporter().Delete(start);
    Pool& pool = instance();
    std::vector<Block> surplus;
    {
      const std::lock_guard<std::mutex> lock(pool.mutex_);
      pool.idle_.push_back(block);
      pool.idle_bytes_ += block.bytes;
      auto first = pool.idle_.begin();  // the longest unused first
      for (; pool.idle_bytes_ > kIdle; ++first) pool.idle_bytes_ -= first->bytes;
      surplus.assign(pool.idle_.begin(), first);
      pool.idle_.erase(pool.idle_.begin(), first);
    }
    for (const Block& each : surplus) c10::free_cpu(each.start);
  }

  std::mutex mutex_;
  std::vector<Block> idle_;
  size_t idle_bytes_ = 0;
};

// As at::empty.
inline at::Tensor pooled(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const at::Context& torch = at::globalContext();
  // Where torch fills what is empty, to show who reads it.
  if (torch.deterministicAlgorithms() && torch.deterministicFillUninitializedMemory()) return at::empty(sizes, options);
  return at::detail::empty_generic(sizes, &Pool::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

}  // namespace ssl_kernels::cpu
