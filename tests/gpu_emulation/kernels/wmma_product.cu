// C = A B^T of 16 x 16 matrices through the wmma interface, for the tests of the rig.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

template <class T>
__global__ void wmma_product(const T* a, const T* b, float* c) {
  using namespace nvcuda;
  __shared__ T tile[256];
  for (int i = threadIdx.x; i < 256; i += 32) tile[i] = b[i];
  __syncthreads();
  wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> left;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> right;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  wmma::fill_fragment(sum, 0.0f);
  wmma::load_matrix_sync(left, a, 16);
  wmma::load_matrix_sync(right, tile, 16);
  wmma::mma_sync(sum, left, right, sum);
  wmma::store_matrix_sync(c, sum, 16, wmma::mem_row_major);
}

// kind 0: half, 1: bfloat16
extern "C" int wmma_product_launch(const void* a, const void* b, float* c, int kind, cudaStream_t stream) {
  if (kind == 0) {
    wmma_product<<<1, 32, 0, stream>>>(static_cast<const __half*>(a), static_cast<const __half*>(b), c);
  } else {
    wmma_product<<<1, 32, 0, stream>>>(static_cast<const __nv_bfloat16*>(a),
                                       static_cast<const __nv_bfloat16*>(b), c);
  }
  return static_cast<int>(cudaGetLastError());
}
