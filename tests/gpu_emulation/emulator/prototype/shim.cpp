// Prototype behind the C interface, until the files beside it take over.
#include "ptxemu.h"
#include "../ptx.h"
struct PtxModule { H* h; std::string text; };
extern "C" {
PtxModule* ptx_load(const char* s, char* e, size_t n) {
  H* h = proto::ptx_load(s, e, (int)n);
  return h ? new PtxModule{h, ""} : nullptr;
}
void ptx_free(PtxModule* m) { delete m->h; delete m; }
const char* ptx_kernels(PtxModule* m) {
  m->text.clear();
  for (auto& k : m->h->m.k) {
    std::string bad;
    for (auto& i : k.second.code) if (i.code == C_BAD) bad += i.op + ";";
    m->text += k.first + "\t" + std::to_string(k.second.params.size()) + "\t" + std::to_string(k.second.shared) + "\t" +
               std::to_string(k.second.local) + "\t" + std::to_string(k.second.code.size()) + "\t" + bad + "\n";
  }
  return m->text.c_str();
}
const char* ptx_counter_names(void) {
  return "instructions thread_instructions mma global_load_requests global_load_sectors global_store_requests "
         "global_store_sectors shared_requests shared_wavefronts barriers divergent_instructions atomics async_copies "
         "global_load_bytes global_store_bytes";
}
int ptx_launch(PtxModule* m, const char* kernel, const PtxLaunchShape* shape, void** args, const PtxRegion* regions,
               size_t count, const PtxOptions* o, uint64_t* counters, char* message, size_t n) {
  proto::ptx_cfg(m->h, o->bounds, o->races, o->uninitialized, o->seed, o->warp_races, o->grid_races);
  proto::ptx_clear(m->h);
  for (size_t i = 0; i < count; ++i) proto::ptx_region(m->h, regions[i].address, regions[i].size, regions[i].name, regions[i].read_only);
  int rc = proto::ptx_launch(m->h, kernel, shape->grid, shape->block, shape->dynamic_shared, args, message, (int)n);
  proto::ptx_stats(m->h, counters);
  return rc;
}
}
