// Stand-in for libcudart, linked statically into a library whose kernels nvcc compiled to PTX: its launchers
// run unchanged, and the PTX in its fat binary is executed by the emulator. Device memory is host memory. A
// runtime call that is not here leaves the link with an undefined symbol, by name. One file, although a long
// one: the stand-in is one library's interface, whose calls share its state.
//
// Signatures: CUDA Runtime API (cuda_runtime_api.h, included below, checks them) and, for __cuda*, the
// registration and launch stubs that nvcc writes (crt/host_runtime.h).
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ptx.h"

#define EXPORT __attribute__((visibility("default")))

namespace {

struct FatBinary {
  std::string ptx;
  PtxModule* module = nullptr;
  std::map<std::string, size_t> static_shared;
};

struct KernelHandle {
  FatBinary* binary;
  std::string name;
  std::map<int, size_t> dynamic_shared_limits;  // by device, where one was set

  size_t dynamic_shared_limit(int device) const {
    const auto found = dynamic_shared_limits.find(device);
    return found == dynamic_shared_limits.end() ? 48 * 1024 : found->second;
  }
};

struct PendingLaunch {
  dim3 grid;
  dim3 block;
  size_t shared;
  void* stream;
};

struct Allocation {
  size_t size;
  std::unique_ptr<char[]> storage;
};

// Mirrors of the ctypes structures in cuda_runtime.py.
struct Device {
  int32_t compute_capability;
  int32_t multiprocessors;
  int32_t shared_per_block;
  int32_t shared_per_multiprocessor;
  int32_t l2_bytes;
  int32_t capturing;
  int32_t ordinal;
  int32_t executes;  // 0: launches are checked and recorded, and their kernels do not run
};

// A call that set a kernel's most dynamic shared memory.
struct AttributeRecord {
  const char* kernel;
  int32_t device;
  int32_t value;
};

struct LaunchRecord {
  const char* kernel;
  PtxLaunchShape shape;
  uint64_t stream;
  const uint64_t* counters;
  const char* warnings;
};

struct FinishedLaunch {
  LaunchRecord record;
  std::vector<uint64_t> counters;
  std::string warnings;
};

struct Runtime {
  std::map<const void*, KernelHandle> kernels;  // by the address of the host stub
  std::vector<PendingLaunch> pending;           // between kernel<<<...>>>'s push and pop
  std::map<void*, Allocation> allocations;
  Device device = {80, 108, 166912, 167936, 41943040, 0, 0, 1};
  PtxOptions options = {1, 1, 1, 0, 1, 0, 2000000000};
  std::vector<std::string> region_names;
  std::vector<PtxRegion> regions;
  std::vector<std::unique_ptr<FinishedLaunch>> launches;
  std::vector<AttributeRecord> attributes;
  cudaError_t last_error = cudaSuccess;
  std::string fault;  // what the emulator noticed, or a request that the stand-in refuses
};

// Kernels register themselves from static constructors, so the state is made on first use.
Runtime& runtime() {
  static Runtime instance;
  return instance;
}

cudaError_t fail(cudaError_t error) {
  runtime().last_error = error;
  return error;
}

cudaError_t refuse(const std::string& what) {
  if (runtime().fault.empty()) runtime().fault = what;
  return fail(cudaErrorNotSupported);
}

size_t counter_count() {
  static const size_t count = [] {
    size_t words = 1;
    for (const char* c = ptx_counter_names(); *c; ++c) words += *c == ' ';
    return words;
  }();
  return count;
}

cudaError_t load(FatBinary& binary) {
  if (binary.module) return cudaSuccess;
  char error[4000];
  binary.module = ptx_load(binary.ptx.c_str(), error, sizeof error);
  if (!binary.module) return refuse(error);
  std::string lines = ptx_kernels(binary.module);
  for (size_t start = 0; start < lines.size();) {
    const size_t end = lines.find('\n', start);
    const std::string line = lines.substr(start, end - start);
    const size_t name_end = line.find('\t');
    const size_t parameters_end = line.find('\t', name_end + 1);
    binary.static_shared[line.substr(0, name_end)] = std::stoull(line.substr(parameters_end + 1));
    start = end + 1;
  }
  return cudaSuccess;
}

KernelHandle* find_kernel(const void* function) {
  auto found = runtime().kernels.find(function);
  return found == runtime().kernels.end() ? nullptr : &found->second;
}

// Calls that wait for the device, or allocate, break a stream capture.
cudaError_t check_not_capturing() {
  return runtime().device.capturing ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

bool in_device_memory(const void* address, size_t size) {
  const auto begin = reinterpret_cast<uint64_t>(address);
  for (const PtxRegion& region : runtime().regions) {
    if (begin >= region.address && begin + size <= region.address + region.size && !region.read_only)
      return true;
  }
  for (const auto& [start, allocation] : runtime().allocations) {
    const auto first = reinterpret_cast<uint64_t>(start);
    if (begin >= first && begin + size <= first + allocation.size) return true;
  }
  return false;
}

bool valid_shape(dim3 grid, dim3 block) {
  // CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) return false;
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return false;
  return block.x <= 1024 && block.y <= 1024 && block.z <= 64 && block.x * block.y * block.z <= 1024;
}

}  // namespace

// ---- What the Python side calls.

extern "C" {

EXPORT void emulated_begin(const Device* device, const PtxOptions* options, const PtxRegion* regions,
                           size_t count) {
  Runtime& state = runtime();
  state.device = *device;
  state.options = *options;
  state.region_names.clear();
  for (size_t i = 0; i < count; ++i) state.region_names.push_back(regions[i].name);
  state.regions.assign(regions, regions + count);
  for (size_t i = 0; i < count; ++i) state.regions[i].name = state.region_names[i].c_str();
  state.launches.clear();
  state.attributes.clear();
  state.pending.clear();
  state.last_error = cudaSuccess;
  state.fault.clear();
}

EXPORT const char* emulated_fault() { return runtime().fault.c_str(); }

EXPORT const char* emulated_error_string(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

EXPORT int emulated_launch_count() { return static_cast<int>(runtime().launches.size()); }

EXPORT const LaunchRecord* emulated_launch(size_t i) { return &runtime().launches[i]->record; }

EXPORT int emulated_attribute_count() { return static_cast<int>(runtime().attributes.size()); }

EXPORT const AttributeRecord* emulated_attribute(size_t i) { return &runtime().attributes[i]; }

// ---- Registration, called by constructors in the code nvcc writes.

void** __cudaRegisterFatBinary(void* wrapper) {
  // fatBinaryCtl.h: {magic, version, data, filename}. The data is a header {magic u32, version u16, header
  // size u16, payload size u64} and entries {kind u16, version u16, header size u32, size u64, compressed
  // size u32, ...}.
  struct Wrapper {
    int magic;
    int version;
    const char* data;
    void* filename;
  };
  const uint16_t kPtxEntry = 1;
  const char* data = static_cast<Wrapper*>(wrapper)->data;
  uint16_t header_size;
  uint64_t payload_size;
  memcpy(&header_size, data + 6, sizeof header_size);
  memcpy(&payload_size, data + 8, sizeof payload_size);
  auto* binary = new FatBinary;
  const char* entry = data + header_size;
  const char* end = entry + payload_size;
  while (entry < end) {
    uint16_t kind;
    uint32_t entry_header;
    uint64_t size;
    uint32_t compressed;
    memcpy(&kind, entry, sizeof kind);
    memcpy(&entry_header, entry + 4, sizeof entry_header);
    memcpy(&size, entry + 8, sizeof size);
    memcpy(&compressed, entry + 16, sizeof compressed);
    if (kind == kPtxEntry) {
      // Compressed text parses as nothing, so a launch reports its kernel missing.
      if (compressed) {
        fprintf(stderr, "emulated cudart: the PTX is compressed, compile with --compress-mode=none\n");
      } else {
        binary->ptx.assign(entry + entry_header, strnlen(entry + entry_header, size));
      }
    }
    entry += entry_header + size;
  }
  return reinterpret_cast<void**>(binary);
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void** handle) {
  auto* binary = reinterpret_cast<FatBinary*>(handle);
  if (binary->module) ptx_free(binary->module);
  delete binary;
}

char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** handle, const char* stub, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  runtime().kernels[stub] = {reinterpret_cast<FatBinary*>(handle), name, {}};
}

// Device variables work inside kernels; no host call here reaches one.
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

// ---- Launch.

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  runtime().pending.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void** stream) {
  const PendingLaunch launch = runtime().pending.back();
  runtime().pending.pop_back();
  *grid = launch.grid;
  *block = launch.block;
  *shared = launch.shared;
  *stream = launch.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(const void** kernel, const void* stub) {
  *kernel = stub;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  Runtime& state = runtime();
  KernelHandle* kernel = find_kernel(function);
  if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
  if (!valid_shape(grid, block)) return fail(cudaErrorInvalidConfiguration);
  if (shared > kernel->dynamic_shared_limit(state.device.ordinal)) return fail(cudaErrorInvalidValue);
  if (load(*kernel->binary) != cudaSuccess) return state.last_error;
  if (kernel->binary->static_shared[kernel->name] + shared >
      static_cast<size_t>(state.device.shared_per_block)) {
    return fail(cudaErrorInvalidValue);
  }

  std::vector<PtxRegion> regions = state.regions;
  for (const auto& [address, allocation] : state.allocations) {
    regions.push_back({reinterpret_cast<uint64_t>(address), allocation.size, "cudaMalloc", 0});
  }
  auto launch = std::make_unique<FinishedLaunch>();
  launch->counters.resize(counter_count());
  const PtxLaunchShape shape = {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared};
  std::vector<char> message(16000);
  if (state.device.executes &&
      ptx_launch(kernel->binary->module, kernel->name.c_str(), &shape, arguments, regions.data(),
                 regions.size(), &state.options, launch->counters.data(), message.data(), message.size())) {
    if (state.fault.empty()) state.fault = kernel->name + ": " + message.data();
    return fail(cudaErrorLaunchFailure);
  }
  launch->warnings = message.data();
  launch->record = {kernel->name.c_str(), shape, reinterpret_cast<uint64_t>(stream), launch->counters.data(),
                    launch->warnings.c_str()};
  state.launches.push_back(std::move(launch));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  KernelHandle* kernel = find_kernel(function);
  if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return refuse("cudaFuncSetAttribute: attribute " + std::to_string(attribute) +
                  " is unknown to the stand-in");
  }
  if (load(*kernel->binary) != cudaSuccess) return runtime().last_error;
  const size_t limit = runtime().device.shared_per_block - kernel->binary->static_shared[kernel->name];
  if (value < 0 || static_cast<size_t>(value) > limit) return fail(cudaErrorInvalidValue);
  const int device = runtime().device.ordinal;
  kernel->dynamic_shared_limits[device] = value;
  runtime().attributes.push_back({kernel->name.c_str(), device, value});
  return cudaSuccess;
}

// Blocks that threads, slots and shared memory leave room for. PTX has no registers to count.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function,
                                                                   int threads, size_t shared, unsigned) {
  KernelHandle* kernel = find_kernel(function);
  if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
  if (load(*kernel->binary) != cudaSuccess) return runtime().last_error;
  const int kThreads = 2048;
  const int kBlocks = 32;
  const int kReservedShared = 1024;
  const int used = static_cast<int>(kernel->binary->static_shared[kernel->name] + shared) + kReservedShared;
  *blocks = std::min({kThreads / threads, kBlocks, runtime().device.shared_per_multiprocessor / used});
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

// ---- Errors.

cudaError_t cudaGetLastError() {
  const cudaError_t error = runtime().last_error;
  runtime().last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return runtime().last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    default: return "unknown error";
  }
}

const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// ---- Device.

cudaError_t cudaGetDevice(int* device) {
  *device = runtime().device.ordinal;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return device == runtime().device.ordinal ? cudaSuccess : fail(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1 + runtime().device.ordinal;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const Device& device = runtime().device;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = device.compute_capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device.compute_capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_per_block; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device.shared_per_multiprocessor; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    case cudaDevAttrL2CacheSize: *value = device.l2_bytes; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
    case cudaDevAttrMaxGridDimY: *value = 65535; break;
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default:
      return refuse("cudaDeviceGetAttribute: attribute " + std::to_string(attribute) +
                    " is unknown to the stand-in");
  }
  return cudaSuccess;
}

// ---- Memory. Work is done at once, in order, whatever the stream.

cudaError_t cudaMalloc(void** address, size_t size) {
  if (check_not_capturing() != cudaSuccess) return cudaErrorStreamCaptureUnsupported;
  const size_t kAlignment = 256;  // CUDA C++ Programming Guide, "Device Memory Accesses"
  auto storage = std::make_unique<char[]>(size + kAlignment);
  const uintptr_t start =
      (reinterpret_cast<uintptr_t>(storage.get()) + kAlignment - 1) / kAlignment * kAlignment;
  *address = reinterpret_cast<void*>(start);
  memset(*address, 0xff, size);  // NaN in every floating type
  runtime().allocations[*address] = {size, std::move(storage)};
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  if (check_not_capturing() != cudaSuccess) return cudaErrorStreamCaptureUnsupported;
  if (address && !runtime().allocations.erase(address)) return fail(cudaErrorInvalidValue);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** address, size_t size, cudaStream_t) {
  const int capturing = runtime().device.capturing;
  runtime().device.capturing = 0;  // stream-ordered allocation may be captured
  const cudaError_t error = cudaMalloc(address, size);
  runtime().device.capturing = capturing;
  return error;
}

cudaError_t cudaFreeAsync(void* address, cudaStream_t) {
  if (address && !runtime().allocations.erase(address)) return fail(cudaErrorInvalidValue);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, size);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  if (check_not_capturing() != cudaSuccess) return cudaErrorStreamCaptureUnsupported;
  memcpy(to, from, size);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t) {
  if (runtime().options.bounds && !in_device_memory(address, size)) {
    return refuse("cudaMemsetAsync of " + std::to_string(size) +
                  " bytes reaches outside the buffers that may be written");
  }
  memset(address, value, size);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* address, int value, size_t size) {
  return cudaMemsetAsync(address, value, size, nullptr);
}

// ---- Streams.

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = runtime().device.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return check_not_capturing(); }

cudaError_t cudaDeviceSynchronize() { return check_not_capturing(); }

}  // extern "C"
