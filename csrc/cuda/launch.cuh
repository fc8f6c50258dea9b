// Launches: the kernel of a dtype, the number of blocks, and the last block of a grid.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "launchers.h"

namespace divqat::cuda {

// Calls f with a null pointer of the element type.
template <class F>
void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(static_cast<float*>(nullptr));
    case DType::kDouble:
      return f(static_cast<double*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kHalf:
      return f(static_cast<__half*>(nullptr));
  }
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which a later call would return again
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// A counter at 0 that no other launch uses at the same time as this one. The launch must leave it
// at 0, as is_last_block() does.
uint32_t* next_counter(cudaStream_t stream);

// How many blocks of `threads` threads are resident on the device at the same time.
int64_t resident_blocks(const void* kernel, int threads);
template <class... P>
int64_t resident_blocks(void (*kernel)(P...), int threads) {
  return resident_blocks(reinterpret_cast<const void*>(kernel), threads);
}

// Whether the current device has cooperative launches.
bool supports_cooperative_launch();

void count_launch();

// Launches blocks × threads; the error if that fails.
template <class... P, class... A>
cudaError_t try_launch(void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream,
                       bool cooperative, A&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...);
  if (error == cudaSuccess) count_launch();
  return error;
}

// Launches blocks × threads.
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream, A&&... args) {
  check(try_launch(kernel, blocks, threads, stream, false, std::forward<A>(args)...), "launch");
}

// Launches blocks that may wait for each other: all are resident at the same time. False, with
// nothing launched, where this is refused: on a device that cannot, or where fewer multiprocessors
// are free than the device has (MPS, a green context), of which the occupancy knows nothing.
template <class... P, class... A>
bool launch_together(void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream,
                     A&&... args) {
  if (!supports_cooperative_launch()) return false;
  const cudaError_t error =
      try_launch(kernel, blocks, threads, stream, true, std::forward<A>(args)...);
  if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported) {
    cudaGetLastError();  // clears the error, which a later call would return again
    return false;
  }
  check(error, "launch");
  return true;
}

// Whether this block is the last of the grid to call this. All threads must call it, and all get
// the same answer. The last block can read what the others wrote before their call, with __ldcg:
// from L2, as L1 is not coherent.
__device__ inline bool is_last_block(uint32_t* counter) {
  __shared__ bool last;
  __threadfence();  // this thread's results are visible before the block is counted
  __syncthreads();
  // The last block wraps the counter to 0, ready for the next launch.
  if (threadIdx.x == 0) last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  __threadfence();  // the results are read after the count
  return last;
}

}  // namespace divqat::cuda
