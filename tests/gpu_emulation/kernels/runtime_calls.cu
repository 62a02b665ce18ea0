// Launchers that use the runtime in every way the stand-in knows, for the tests of the rig.
#include <cuda_runtime.h>
#include <stdint.h>

__global__ void reverse(float* x, int n) {
  extern __shared__ float row[];
  const int i = threadIdx.x;
  row[i] = static_cast<float>(i);
  __syncthreads();
  x[blockIdx.x * n + i] = row[n - 1 - i];
}

__global__ void copy(const float* from, float* to, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) to[i] = from[i];
}

struct Args {
  float* x;
  int64_t n;
  float value;
};

__global__ void fill(Args args) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < args.n) args.x[i] = args.value;
}

extern "C" {

int reverse_launch_without_attribute(float* x, int n, int shared, cudaStream_t stream) {
  reverse<<<2, n, shared, stream>>>(x, n);
  return cudaGetLastError();
}

int reverse_launch(float* x, int n, int shared, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  const int code = reverse_launch_without_attribute(x, n, shared, stream);
  cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, 0);
  return code;
}

int allow_shared(int bytes) {
  return cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

int grid_launch(float* x, int blocks_x, int blocks_y, int blocks_z, cudaStream_t stream) {
  copy<<<dim3(blocks_x, blocks_y, blocks_z), 1, 0, stream>>>(x, x, 1);
  return cudaGetLastError();
}

int device_attributes(int* found) {
  int device, major, minor;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  found[0] = 10 * major + minor;
  cudaDeviceGetAttribute(&found[1], cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&found[2], cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&found[3], cudaDevAttrWarpSize, device);
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found[4], reverse, 64, 0);
}

int unknown_attribute() {
  int value;
  return cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(1000), 0);
}

// x[0..n) from a fresh allocation of four floats.
int copy_from_scratch(float* x, int n, cudaStream_t stream) {
  float* scratch;
  const cudaError_t error = cudaMalloc(&scratch, 4 * sizeof(float));
  if (error != cudaSuccess) return error;
  copy<<<1, 32, 0, stream>>>(scratch, x, n);
  cudaFree(scratch);
  return cudaGetLastError();
}

int synchronize(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

int clear(void* x, int bytes, cudaStream_t stream) { return cudaMemsetAsync(x, 0, bytes, stream); }

int fill_launch(const Args* args, cudaStream_t stream) {
  fill<<<static_cast<unsigned>((args->n + 31) / 32), 32, 0, stream>>>(*args);
  return cudaGetLastError();
}

}  // extern "C"
