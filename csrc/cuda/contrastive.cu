// The kernels of `contrastive` without additions.
#include "contrastive_launch.cuh"

namespace ssl_kernels {
namespace contrastive {
namespace {

// Calls f with the engine of float rows against columns of a Dtype of 2 bytes.
template <typename F>
void with_widening_engine(int column_dtype, bool allow_tf32, F f) {
  const auto widen = [&](auto narrow) {
    if (allow_tf32) return f(WideningEngine<MmaEngine<float>, decltype(narrow)>());
    return f(WideningEngine<FmaEngine<float>, decltype(narrow)>());
  };
  if (column_dtype == kFloat16) return widen(__half());
  return widen(__nv_bfloat16());
}

struct Plain {
  template <typename Args>
  static void run(Launcher& launcher, const Args& args) {
    const ContrastiveArgs& common = args.common;
    const auto run_on = [&](auto engine) { contrastive::run<decltype(engine)>(launcher, args); };
    if (common.columns && common.column_dtype != common.dtype) {
      with_widening_engine(common.column_dtype, common.allow_tf32, run_on);
    } else {
      with_engine(common.dtype, common.allow_tf32, run_on);
    }
  }
};

}  // namespace
}  // namespace contrastive
}  // namespace ssl_kernels

using ssl_kernels::contrastive::Plain;

int contrastive_fwd_workspace(const ContrastiveFwdArgs* args, size_t* bytes) {
  return ssl_kernels::contrastive::workspace<Plain>(*args, bytes);
}

int contrastive_bwd_workspace(const ContrastiveBwdArgs* args, size_t* bytes) {
  return ssl_kernels::contrastive::workspace<Plain>(*args, bytes);
}

int contrastive_fwd(const ContrastiveFwdArgs* args, cudaStream_t stream) {
  return ssl_kernels::contrastive::launch<Plain>(*args, stream);
}

int contrastive_bwd(const ContrastiveBwdArgs* args, cudaStream_t stream) {
  return ssl_kernels::contrastive::launch<Plain>(*args, stream);
}
