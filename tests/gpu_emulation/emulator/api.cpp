// The C interface of ptx.h over the classes.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "decoder.h"
#include "machine.h"
#include "ptx.h"

struct PtxModule {
  std::unique_ptr<ptx::Program> program;
  std::string listing;
};

namespace {

void copy_text(const std::string& text, char* to, size_t size) {
  if (!size) return;
  const size_t length = std::min(text.size(), size - 1);
  std::memcpy(to, text.data(), length);
  to[length] = '\0';
}

std::string list_kernels(const ptx::Program& program) {
  std::string listing;
  for (const auto& [name, kernel] : program.kernels) {
    listing += name;
    for (uint64_t number : {uint64_t{kernel.parameters.size()}, kernel.shared_bytes, kernel.local_bytes,
                            uint64_t{kernel.code.size()}}) {
      listing += '\t' + std::to_string(number);
    }
    listing += '\t';
    for (const std::string& instruction : kernel.unsupported) listing += instruction + ";";
    listing += '\n';
  }
  return listing;
}

}  // namespace

PtxModule* ptx_load(const char* source, char* error, size_t error_size) {
  try {
    auto module = std::make_unique<PtxModule>();
    module->program = ptx::load_program(source);
    module->listing = list_kernels(*module->program);
    return module.release();
  } catch (const std::exception& problem) {
    copy_text(problem.what(), error, error_size);
    return nullptr;
  }
}

void ptx_free(PtxModule* module) { delete module; }

const char* ptx_kernels(PtxModule* module) { return module->listing.c_str(); }

const char* ptx_counter_names(void) { return ptx::kCounterNames; }

int ptx_launch(PtxModule* module, const char* name, const PtxLaunchShape* shape, void** arguments,
               const PtxRegion* regions, size_t region_count, const PtxOptions* options, uint64_t* counters,
               char* message, size_t message_size) {
  try {
    const auto kernel = module->program->kernels.find(name);
    if (kernel == module->program->kernels.end()) throw ptx::Error(std::string("no kernel ") + name);
    ptx::Machine machine(*module->program);
    machine.launch(kernel->second, *shape, arguments, regions, region_count, *options);
    std::memcpy(counters, &machine.counters(), sizeof(ptx::Counters));
    std::string warnings;
    for (const std::string& warning : machine.warnings()) warnings += warning + "\n";
    copy_text(warnings, message, message_size);
    return 0;
  } catch (const std::exception& problem) {
    copy_text(problem.what(), message, message_size);
    return 1;
  }
}
