// Launchers of row_pairs.h.
#include "row_pairs.h"

#include "row_pairs.cuh"

namespace ssl_kernels {
namespace row_pairs {
namespace {

// Chunks of 16 bytes of each operand that a thread holds, for rows of more than one per lane.
template <typename scalar_t>
constexpr int kHeldChunks = sizeof(scalar_t) == 2 ? 2 : 4;

// The widest row that a warp holds.
template <typename scalar_t>
constexpr int64_t kWarpWidth = kWarpSize * kHeldChunks<scalar_t> * Vector<scalar_t>::kSize;

template <typename scalar_t>
Operands<scalar_t> operands_of(const RowPairsOperands& args) {
  Operands<scalar_t> operands = {};
  for (int k = 0; k <= args.pairs; ++k) {
    operands.data[k] = static_cast<const scalar_t*>(args.operands[k]);
    operands.row_stride[k] = args.row_strides[k];
    operands.column_stride[k] = args.column_strides[k];
  }
  return operands;
}

// Whether every row of every operand is made of aligned vectors.
template <typename scalar_t>
bool in_vectors(const RowPairsOperands& args) {
  constexpr int kSize = Vector<scalar_t>::kSize;
  bool aligned = args.D % kSize == 0;
  for (int k = 0; k <= args.pairs; ++k) {
    aligned &= args.column_strides[k] == 1 && reinterpret_cast<uintptr_t>(args.operands[k]) % 16 == 0 &&
               (args.N == 1 || args.row_strides[k] % kSize == 0);
  }
  return aligned;
}

// The threads of a row, and blocks of such teams.
struct Grid {
  Grid(const RowPairsOperands& args, int64_t widest_of_a_warp)
      : team(args.D <= widest_of_a_warp ? kWarpSize : kThreads),
        blocks(static_cast<unsigned>((args.N + kThreads / team - 1) / (kThreads / team))) {}
  int team;
  unsigned blocks;
};

template <typename scalar_t, int kPairs, bool kVectors>
int run(const RowPairsFwdArgs& args, cudaStream_t stream) {
  const RowPairsOperands& common = args.common;
  const auto launch = [&](auto kernel) {
    const Grid grid(common, kWarpWidth<scalar_t>);
    kernel<<<grid.blocks, kThreads, 0, stream>>>(operands_of<scalar_t>(common), common.N, common.D, grid.team,
                                                 common.normalize != 0, common.distance != 0, args.values,
                                                 static_cast<Saved<acc_t_of<scalar_t>>*>(args.saved));
    return cudaGetLastError();
  };
  return common.D <= kWarpSize * Vector<scalar_t>::kSize
             ? launch(row_pairs_fwd_kernel<scalar_t, kPairs, kVectors, 1>)
             : launch(row_pairs_fwd_kernel<scalar_t, kPairs, kVectors, kHeldChunks<scalar_t>>);
}

template <typename scalar_t, int kPairs, bool kVectors>
int run(const RowPairsBwdArgs& args, cudaStream_t stream) {
  const RowPairsOperands& common = args.common;
  const Grid grid(common, kWarpWidth<scalar_t>);
  Gradients<scalar_t> grads = {};
  for (int k = 0; k <= kPairs; ++k) grads.data[k] = static_cast<scalar_t*>(args.grads[k]);
  row_pairs_bwd_kernel<scalar_t, kPairs, kVectors><<<grid.blocks, kThreads, 0, stream>>>(
      operands_of<scalar_t>(common), common.N, common.D, grid.team, common.normalize != 0,
      common.distance != 0, args.grad_values, static_cast<const Saved<acc_t_of<scalar_t>>*>(args.saved),
      grads);
  return cudaGetLastError();
}

template <typename scalar_t, typename Args>
int run_of(const Args& args, cudaStream_t stream) {
  const bool vectors = in_vectors<scalar_t>(args.common);
  if (args.common.pairs == 1)
    return vectors ? run<scalar_t, 1, true>(args, stream) : run<scalar_t, 1, false>(args, stream);
  return vectors ? run<scalar_t, 2, true>(args, stream) : run<scalar_t, 2, false>(args, stream);
}

template <typename Args>
int dispatch(const Args& args, cudaStream_t stream) {
  switch (args.common.dtype) {
    case kFloat64: return run_of<double>(args, stream);
    case kFloat16: return run_of<__half>(args, stream);
    case kBFloat16: return run_of<__nv_bfloat16>(args, stream);
    default: return run_of<float>(args, stream);
  }
}

}  // namespace
}  // namespace row_pairs
}  // namespace ssl_kernels

int row_pairs_fwd(const RowPairsFwdArgs* args, cudaStream_t stream) {
  return ssl_kernels::row_pairs::dispatch(*args, stream);
}

int row_pairs_bwd(const RowPairsBwdArgs* args, cudaStream_t stream) {
  return ssl_kernels::row_pairs::dispatch(*args, stream);
}
