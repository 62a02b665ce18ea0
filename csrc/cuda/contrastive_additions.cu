// The kernels of `contrastive` that take additions, in a file of their own: both compile at once.
#include "contrastive_launch.cuh"

namespace ssl_kernels {
namespace contrastive {
namespace {

struct Adding {
  template <typename Args>
  static void run(Launcher& launcher, const Args& args) {
    with_engine(args.common.dtype, args.common.allow_tf32, [&](auto engine) {
      contrastive::run<AddingEngine<decltype(engine)>>(launcher, args);
    });
  }
};

}  // namespace
}  // namespace contrastive
}  // namespace ssl_kernels

using ssl_kernels::contrastive::Adding;

int contrastive_additions_fwd_workspace(const ContrastiveFwdArgs* args, size_t* bytes) {
  return ssl_kernels::contrastive::workspace<Adding>(*args, bytes);
}

int contrastive_additions_bwd_workspace(const ContrastiveBwdArgs* args, size_t* bytes) {
  return ssl_kernels::contrastive::workspace<Adding>(*args, bytes);
}

int contrastive_additions_fwd(const ContrastiveFwdArgs* args, cudaStream_t stream) {
  return ssl_kernels::contrastive::launch<Adding>(*args, stream);
}

int contrastive_additions_bwd(const ContrastiveBwdArgs* args, cudaStream_t stream) {
  return ssl_kernels::contrastive::launch<Adding>(*args, stream);
}
