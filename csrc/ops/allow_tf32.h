// Whether torch's own settings let float32 products on a GPU round their operands to TF32.
#pragma once

#include <ATen/Context.h>

namespace ssl_kernels {

// Of all switches, the older allow_tf32 and the newer fp32_precision, as torch resolves them; never raises.
inline bool allow_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

}  // namespace ssl_kernels
