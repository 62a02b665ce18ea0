// The Python module ssl_kernels._C: importing it registers the kernels; it tells what was built.
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

#include "cpu/contrastive_gradients.h"
#include "cpu/kept_limit.h"
#include "cpu/permutation.h"
#include "cpu/pool.h"
#include "cpu/rows.h"
#include "cpu/tile_math.h"
#include "ops/allow_tf32.h"
#include "ops/contrastive_loss.h"
#include "ops/matrix_product.h"
#include "ops/row_pairs_loss.h"
// setup.py writes it: SSL_KERNELS_SOURCES.
#include "fingerprint.h"

#ifndef SSL_KERNELS_CUDA_ARCHITECTURES
#define SSL_KERNELS_CUDA_ARCHITECTURES ""
#endif

PYBIND11_MODULE(_C, module) {
  using ssl_kernels::cpu::Pool;
  // Made here, not by the first thread to come: a fork in the meantime would leave its child half of them.
  Pool::instance();
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = SSL_KERNELS_TORCH_VERSION;
        info["compiler"] = __VERSION__;
        info["sources"] = SSL_KERNELS_SOURCES;
        info["cuda_architectures"] = SSL_KERNELS_CUDA_ARCHITECTURES;
        info["cpu_instruction_set"] = name_of(ssl_kernels::cpu::isa());
        info["norm_eps"] = ssl_kernels::cpu::kNormEpsilon;
        info["kept_header"] = ssl_kernels::cpu::kKeptHeader;
        pybind11::list runnable;
        for (ssl_kernels::cpu::Isa isa : ssl_kernels::cpu::runnable_isas()) runnable.append(name_of(isa));
        info["cpu_instruction_sets"] = runnable;
        return info;
      },
      "What this extension was built with, and the instruction set its CPU kernels use on this machine, of "
      "those "
      "that it has, the widest first.");
  module.def(
      "empty_cache", [] { Pool::instance().empty(); }, pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Give back the memory that the CPU kernels hold to use it again.");
  module.def(
      "held_bytes",
      [] {
        const Pool::Bytes held = Pool::instance().held();
        return pybind11::dict(pybind11::arg("kept") = held.kept, pybind11::arg("idle") = held.idle);
      },
      "Bytes that the CPU kernels keep from forward to backward, and that they hold to use them again.");
  // Beside the operator of that name: what torch.ops does around it takes a good part of a small call.
  module.def("contrastive_loss", torch::wrap_pybind_function_no_gil(&ssl_kernels::contrastive_loss),
             "contrastive_loss.native of plain tensors on the CPU, past torch.ops.");
  module.def("row_pairs_loss", torch::wrap_pybind_function_no_gil(&ssl_kernels::row_pairs_loss),
             "row_pairs_loss.native, likewise.");
  module.def("is_permutation", &ssl_kernels::cpu::is_permutation,
             "Whether (B,) int64 hold each of 0 ... B - 1 once.");
  module.def(
      "keep_at_most", [](int64_t bytes) { return std::exchange(ssl_kernels::cpu::kept_at_most(), bytes); },
      "Set the most bytes of logits that a call in this thread keeps for backward; what it was before.");
  module.def(
      "make_gradients_from",
      [](int64_t pairs) { return std::exchange(ssl_kernels::cpu::fewest_pairs(), pairs); },
      "Set the fewest pairs of rows and columns of a call in this thread that makes its gradients in "
      "forward; what it was before.");
  module.def("allow_tf32", &ssl_kernels::allow_tf32,
             "Whether the float32 products of the CUDA kernels round their operands to TF32 now.");
  module.def(
      "multiply_matrices",
      [](uintptr_t product, at::Device device) {
        ssl_kernels::multiply_on(device, *reinterpret_cast<const MatrixProduct*>(product));
      },
      "The MatrixProduct (csrc/cuda/matrix_product.h) at this address, as the CUDA launchers have it made, "
      "of matrices in the memory of a device.");
}
