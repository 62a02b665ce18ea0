// Memory of the kernels that is used again from call to call, and the budget of what they keep from forward
// to backward. malloc would give large blocks back to the system and fetch them again page by page: 1400
// pages, a fifth of the step, for 1024 pairs of NT-Xent.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Storage.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace ssl_kernels::cpu {

// Bytes that all losses of the process together keep from forward to backward.
constexpr size_t kKeptBudget = 116 << 20;

// What a tensor of kept logits shows of them (kept_for_backward).
constexpr int64_t kKeptHeader = 16;

// Keeps blocks that nobody uses until the process ends or asks for them. These and what is kept for backward
// are at most kHeld bytes together.
class Pool final : public c10::Allocator {
 public:
  // Never destroyed: tensors may outlive everything static.
  static Pool& instance() {
    static Pool* pool = new Pool;
    return *pool;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kWorthwhile) return c10::GetCPUAllocator()->allocate(bytes);
    return hand_out(take(bytes + kHeader, bytes + kHeader + (bytes + kHeader) / 4), bytes + kHeader, false);
  }

  // At least `least` bytes, and beyond these `wanted` if the budget has as many left, or else as many times
  // `unit` as it has. They count until they are freed. `granted` gets the bytes beyond `least`.
  c10::DataPtr allocate_kept(size_t least, size_t wanted, size_t unit, size_t& granted) {
    std::vector<Block> surplus;
    Block block;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const size_t left = kKeptBudget - std::min(kKeptBudget, kept_bytes_);
      const size_t fixed = kHeader + least;
      granted = fixed + wanted <= left ? wanted : left < fixed + unit ? 0 : (left - fixed) / unit * unit;
      const size_t bytes = fixed + granted;
      if (bytes >= kWorthwhile) block = take_locked(bytes, std::min(bytes + bytes / 4, left));
      if (!block.start) block.bytes = bytes;
      kept_bytes_ += block.bytes;
      surplus = surplus_locked();
    }
    free_all(surplus);
    return hand_out(block, block.bytes, true);
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  // Gives back what nobody uses.
  void empty() {
    std::vector<Block> idle;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      idle.swap(idle_);
      idle_bytes_ = 0;
    }
    free_all(idle);
#ifdef __GLIBC__
    malloc_trim(0);  // which would otherwise hold on to most of it
#endif
  }

  struct Bytes {
    size_t kept, idle;
  };
  Bytes held() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {kept_bytes_, idle_bytes_};
  }

 private:
  static constexpr size_t kWorthwhile = 64 << 10, kHeld = 128 << 20;
  static constexpr size_t kHeader = 64;  // holds a block's size and keeps the rest aligned

  struct Block {
    char* start = nullptr;
    size_t bytes = 0;
  };
  struct Header {
    size_t bytes;
    bool is_kept;
  };

  Pool() {
#if defined(__unix__) || defined(__APPLE__)
    // A child of fork has one thread: what another one had locked would stay locked.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
#endif
  }

  // `block`, or a new one of `bytes` where it is none.
  c10::DataPtr hand_out(Block block, size_t bytes, bool is_kept) {
    if (!block.start) {
      try {
        block = {static_cast<char*>(c10::alloc_cpu(bytes)), bytes};
      } catch (...) {
        if (is_kept) {
          const std::lock_guard<std::mutex> lock(mutex_);
          kept_bytes_ -= bytes;
        }
        throw;
      }
    }
    *reinterpret_cast<Header*>(block.start) = {block.bytes, is_kept};
    // What a profiler shows is what is in use.
    c10::profiledCPUMemoryReporter().New(block.start, block.bytes);
    return {block.start + kHeader, block.start, &give_back, c10::Device(c10::kCPU)};
  }

  Block take(size_t bytes, size_t most) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return take_locked(bytes, most);
  }

  // The smallest idle block that is large enough and not larger than `most`, if there is one; of equal ones
  // the last used, which may lie in a cache.
  Block take_locked(size_t bytes, size_t most) {
    auto best = idle_.end();
    for (auto block = idle_.begin(); block != idle_.end(); ++block)
      if (block->bytes >= bytes && block->bytes <= most &&
          (best == idle_.end() || block->bytes <= best->bytes))
        best = block;
    if (best == idle_.end()) return {};
    const Block block = *best;
    idle_.erase(best);
    idle_bytes_ -= block.bytes;
    return block;
  }

  // Takes out what is over kHeld, the longest unused first.
  std::vector<Block> surplus_locked() {
    const size_t most = kHeld - std::min(kHeld, kept_bytes_);
    auto first = idle_.begin();
    for (; idle_bytes_ > most; ++first) idle_bytes_ -= first->bytes;
    std::vector<Block> surplus(idle_.begin(), first);
    idle_.erase(idle_.begin(), first);
    return surplus;
  }

  static void free_all(const std::vector<Block>& blocks) {
    for (const Block& each : blocks) c10::free_cpu(each.start);
  }

  static void give_back(void* start) {
    const Header header = *static_cast<Header*>(start);
    c10::profiledCPUMemoryReporter().Delete(start);
    Pool& pool = instance();
    std::vector<Block> surplus;
    {
      const std::lock_guard<std::mutex> lock(pool.mutex_);
      if (header.is_kept) pool.kept_bytes_ -= header.bytes;
      if (header.bytes < kWorthwhile) {
        surplus.push_back({static_cast<char*>(start), header.bytes});
      } else {
        pool.idle_.push_back({static_cast<char*>(start), header.bytes});
        pool.idle_bytes_ += header.bytes;
        surplus = pool.surplus_locked();
      }
    }
    free_all(surplus);
  }

  std::mutex mutex_;
  std::vector<Block> idle_;
  size_t idle_bytes_ = 0, kept_bytes_ = 0;
};

// Whether torch fills what is empty, to show who reads it.
inline bool fills_empty() {
  const at::Context& torch = at::globalContext();
  return torch.deterministicAlgorithms() && torch.deterministicFillUninitializedMemory();
}

// As at::empty, on the CPU, past the dispatcher.
inline at::Tensor pooled(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (fills_empty()) return at::empty(sizes, options);
  return at::detail::empty_generic(sizes, &Pool::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

// A 0-d tensor of T, without the dispatcher's part in making and filling one.
template <class T>
at::Tensor number(double value) {
  const at::Tensor result = pooled({}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  *result.mutable_data_ptr<T>() = static_cast<T>(value);
  return result;
}

// The same in float64 or float32.
inline at::Tensor number(double value, at::ScalarType dtype) {
  return dtype == at::kDouble ? number<double>(value) : number<float>(value);
}

// A tensor of `shown` zeros at the beginning of a storage with room for more: `wanted` more elements, or as
// many times `unit` as the budget of the process has left. Its shape says nothing of that room, so that it
// does not depend on what other losses keep; a copy of the tensor has none.
template <class T>
at::Tensor kept_for_backward(int64_t shown, int64_t wanted, int64_t unit, const at::TensorOptions& options) {
  size_t granted = 0;
  const size_t least = shown * sizeof(T);
  c10::DataPtr data = Pool::instance().allocate_kept(least, wanted * sizeof(T), unit * sizeof(T), granted);
  T* begin = static_cast<T*>(data.get());
  std::fill_n(begin, shown, T(0));
  if (fills_empty()) std::fill_n(begin + shown, granted / sizeof(T), std::numeric_limits<T>::quiet_NaN());
  c10::Storage storage(c10::Storage::use_byte_size_t(), least + granted, std::move(data),
                       /*allocator=*/nullptr,
                       /*resizable=*/false);
  at::Tensor kept = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), options.dtype());
  kept.unsafeGetTensorImpl()->set_sizes_contiguous({shown});
  return kept;
}

// Elements behind those that `kept` shows.
template <class T>
int64_t room_of(const at::Tensor& kept) {
  return static_cast<int64_t>(kept.storage().nbytes() / sizeof(T)) - kept.storage_offset() - kept.numel();
}

}  // namespace ssl_kernels::cpu
