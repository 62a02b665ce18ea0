// Launchers of cutmix.h.
#include "cutmix.h"

#include "cutmix.cuh"
#include "launcher.cuh"
#include "walk_parts.cuh"

namespace ssl_kernels {
namespace mixing {
namespace {

class Cutmix {
 public:
  Cutmix(const CutmixArgs& args, cudaStream_t stream, bool dry)
      : args_(args),
        launcher_(args.workspace, stream, dry),
        permutation_{args.permutation, args.permutation_stride, static_cast<int>(args.B)},
        boxes_{args.boxes,
               {args.box_strides[0], args.box_strides[1]},
               static_cast<int>(args.H),
               static_cast<int>(args.W)},
        image_{std::max<int64_t>(args.row_stride, 1), std::max<int64_t>(args.column_stride, 1), boxes_.H,
               boxes_.W} {}

  template <typename bits_t>
  void forward() {
    auto* out = static_cast<bits_t*>(args_.out);
    if (args_.out == args_.x) {
      const OrderMemory memory = order_memory(launcher_, args_.B);
      auto* steps = launcher_.scratch<CutStep>(args_.B);
      launcher_.launch(cutmix_order_kernel, 1, kOrderThreads, memory.shared, permutation_, boxes_,
                       memory.global, steps);
      for_features<bits_t>(kCutThreads, [&](auto vec, int64_t first, int64_t features, unsigned blocks) {
        launcher_.launch(cutmix_walk_kernel<bits_t, decltype(vec)::value>, blocks, kCutThreads, 0, out,
                         args_.out_stride, first, features, image_, permutation_.count,
                         static_cast<const CutStep*>(steps));
      });
      return;
    }
    for_features<bits_t>(kGatherThreads, [&](auto vec, int64_t first, int64_t features, unsigned) {
      launcher_.launch(cutmix_gather_kernel<bits_t, decltype(vec)::value>,
                       gather_grid(features, decltype(vec)::value), kGatherThreads, 0,
                       static_cast<const bits_t*>(args_.x), args_.x_stride, out, args_.out_stride, first,
                       features, image_, boxes_, permutation_);
    });
  }

  template <typename scalar_t>
  void backward() {
    int* inverse = launcher_.scratch<int>(args_.B);
    int* seen = launcher_.scratch<int>(args_.B);
    launcher_.launch(inverse_kernel, 1, kOrderThreads, 0, permutation_, inverse, seen);
    for_features<scalar_t>(kGatherThreads, [&](auto vec, int64_t first, int64_t features, unsigned) {
      launcher_.launch(cutmix_grad_kernel<scalar_t, decltype(vec)::value>,
                       gather_grid(features, decltype(vec)::value), kGatherThreads, 0,
                       static_cast<const scalar_t*>(args_.x), args_.x_stride,
                       static_cast<scalar_t*>(args_.out), args_.out_stride, first, features, image_, boxes_,
                       permutation_.count, static_cast<const int*>(inverse));
    });
  }

  int finish(size_t* bytes) const {
    if (bytes) *bytes = launcher_.used();
    return launcher_.error();
  }

 private:
  // Below 2^31, as a result of more blocks would have 2^43 elements.
  unsigned gather_grid(int64_t features, int vec) const {
    return static_cast<unsigned>(gather_blocks(features, vec) * blocks_for(args_.B, kGatherSamples));
  }

  // launch(elements of a thread, first feature, features, blocks): vectors as far as they go, then single
  // elements.
  template <typename T, typename Launch>
  void for_features(int threads, Launch launch) {
    constexpr int kVec = 16 / sizeof(T);
    const auto aligned = [&](const void* data, int64_t stride) {
      return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (stride % kVec == 0 || args_.B == 1);
    };
    int64_t done = 0;
    if (aligned(args_.x, args_.x_stride) && aligned(args_.out, args_.out_stride))
      done = args_.F / kVec * kVec;
    if (done > 0) {
      launch(std::integral_constant<int, kVec>(), int64_t{0}, done, blocks_for(done / kVec, threads));
    }
    if (done < args_.F) {
      launch(std::integral_constant<int, 1>(), done, args_.F - done, blocks_for(args_.F - done, threads));
    }
  }

  const CutmixArgs& args_;
  Launcher launcher_;
  Permutation permutation_;
  Boxes boxes_;
  Image image_;
};

int forward(const CutmixArgs& args, cudaStream_t stream, size_t* bytes) {
  if (std::max({args.B, args.H, args.W}) >= kMostSamples) return cudaErrorInvalidValue;
  Cutmix cutmix(args, stream, bytes != nullptr);
  switch (args.element_bytes) {
    case 1: cutmix.forward<uint8_t>(); break;
    case 2: cutmix.forward<uint16_t>(); break;
    case 4: cutmix.forward<uint32_t>(); break;
    case 8: cutmix.forward<uint64_t>(); break;
    default: return cudaErrorInvalidValue;
  }
  return cutmix.finish(bytes);
}

int backward(const CutmixArgs& args, cudaStream_t stream, size_t* bytes) {
  if (std::max({args.B, args.H, args.W}) >= kMostSamples) return cudaErrorInvalidValue;
  Cutmix cutmix(args, stream, bytes != nullptr);
  switch (args.dtype) {
    case kFloat64: cutmix.backward<double>(); break;
    case kFloat32: cutmix.backward<float>(); break;
    case kFloat16: cutmix.backward<__half>(); break;
    case kBFloat16: cutmix.backward<__nv_bfloat16>(); break;
    default: return cudaErrorInvalidValue;
  }
  return cutmix.finish(bytes);
}

}  // namespace
}  // namespace mixing
}  // namespace ssl_kernels

int cutmix_fwd_workspace(const CutmixArgs* args, size_t* bytes) {
  return ssl_kernels::mixing::forward(*args, nullptr, bytes);
}

int cutmix_bwd_workspace(const CutmixArgs* args, size_t* bytes) {
  return ssl_kernels::mixing::backward(*args, nullptr, bytes);
}

int cutmix_fwd(const CutmixArgs* args, cudaStream_t stream) {
  return ssl_kernels::mixing::forward(*args, stream, nullptr);
}

int cutmix_bwd(const CutmixArgs* args, cudaStream_t stream) {
  return ssl_kernels::mixing::backward(*args, stream, nullptr);
}
