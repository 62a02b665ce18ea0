// Launchers of batch_hard.h.
#include "batch_hard.h"

#include "batch_hard.cuh"
#include "launcher.cuh"

namespace ssl_kernels {
namespace batch_hard {
namespace {

template <typename Engine>
void run(Launcher& launcher, const BatchHardArgs& args) {
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  const BatchHardCommon& common = args.common;
  const int64_t N = common.N;
  const Matrix<scalar_t> matrix = {
      static_cast<const scalar_t*>(common.embeddings), {common.strides[0], common.strides[1]}, N, common.D};
  auto* rnorm = common.normalize ? launcher.scratch<acc_t>(N) : nullptr;
  auto* half_square = common.cosine ? nullptr : launcher.scratch<acc_t>(N);
  Problem<scalar_t, acc_t> problem = {prepare(launcher, matrix, rnorm, half_square)};
  problem.rows.rnorm = rnorm;
  problem.width = matrix.width();
  problem.half_square = half_square;
  problem.labels = common.labels;

  const int64_t row_blocks = blocks_for(N, Shape<Engine>::kBlockM);
  const int64_t tiles = blocks_for(N, Shape<Engine>::kBlockN);
  const int chunks = blocks_for(problem.width, Shape<Engine>::kChunk);
  const int parts = pick_splits(common.splits, row_blocks, tiles, int64_t{multiprocessors()} * 2);
  auto* partial = launcher.scratch<Hardest<acc_t>>(parts * N);
  launcher.launch(batch_hard_kernel<Engine>, dim3(row_blocks, parts), Shape<Engine>::kThreads,
                  shared_bytes_of<Shape<Engine>>(chunks), problem, partial);
  launcher.launch(batch_hard_merge_kernel<acc_t>, blocks_for(N, 256), 256, 0, partial, parts, N,
                  args.positive_index, args.negative_index);
}

Launcher dispatch(const BatchHardArgs& args, cudaStream_t stream, bool dry) {
  Launcher launcher(args.common.workspace, stream, dry);
  with_engine(args.common.dtype, args.common.allow_tf32,
              [&](auto engine) { run<decltype(engine)>(launcher, args); });
  return launcher;
}

}  // namespace
}  // namespace batch_hard
}  // namespace ssl_kernels

int batch_hard_workspace(const BatchHardArgs* args, size_t* bytes) {
  const ssl_kernels::Launcher launcher = ssl_kernels::batch_hard::dispatch(*args, nullptr, true);
  *bytes = launcher.used();
  return launcher.error();
}

int batch_hard(const BatchHardArgs* args, cudaStream_t stream) {
  return ssl_kernels::batch_hard::dispatch(*args, stream, false).error();
}
