// C interface of the PTX emulator. Pointers of the host are the addresses of the emulated global memory.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

typedef struct PtxModule PtxModule;

// A range of global memory that a kernel may touch. Everything outside all ranges is out of bounds.
typedef struct {
  uint64_t address;
  uint64_t size;
  const char* name;
  int32_t read_only;
} PtxRegion;

typedef struct {
  int32_t bounds;         // global accesses must lie inside a region
  int32_t races;          // unordered conflicting accesses are errors
  int32_t grid_races;     // ... also those between blocks
  int32_t warp_races;     // ... also those between lanes of a warp without __syncwarp between them
  int32_t uninitialized;  // shared memory must be written before it is read
  uint32_t seed;          // 0: blocks and warps in order; else a random schedule
  uint64_t instruction_limit;
} PtxOptions;

typedef struct {
  uint32_t grid[3];
  uint32_t block[3];
  uint64_t dynamic_shared;
} PtxLaunchShape;

// Parses a PTX module. NULL, and a message in `error`, if it cannot be read.
PtxModule* ptx_load(const char* source, char* error, size_t error_size);
void ptx_free(PtxModule* module);

// One line a kernel: name, parameters, static shared bytes, local bytes, instructions, and the unsupported
// instructions separated by ';', with tabs between. The text lives as long as the module.
const char* ptx_kernels(PtxModule* module);

// Names of the counters, separated by spaces, in the order ptx_launch fills them.
const char* ptx_counter_names(void);

// Runs a grid to its end. `arguments` holds one pointer to each parameter's value, as cuLaunchKernel takes
// them. 0: done, and `message` holds warnings, one per line; 1: `message` says what went wrong and where.
int ptx_launch(PtxModule* module, const char* kernel, const PtxLaunchShape* shape, void** arguments,
               const PtxRegion* regions, size_t region_count, const PtxOptions* options, uint64_t* counters,
               char* message, size_t message_size);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
