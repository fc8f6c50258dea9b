// What all kernels share: element types, 16-byte packs, launches, and the last block of a grid.
// No torch header in device code, so that nvcc compiles it without a CUDA torch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "launchers.h"

namespace divqat::cuda {

// Element types compute in float, but double in double.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float to_compute(float x) { return x; }
__device__ inline double to_compute(double x) { return x; }
__device__ inline float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_compute(__half x) { return __half2float(x); }

template <class T>
__device__ inline T from_compute(compute_t<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// Half to even, as nearbyint in the default rounding mode.
__device__ inline float nearest(float x) { return rintf(x); }
__device__ inline double nearest(double x) { return rint(x); }

// W elements that are read and written at once. Global memory wants them aligned to their size.
template <class T, int W>
struct alignas(sizeof(T) * W) Pack {
  T at[W];
};

// Elements of a 16-byte load, the widest there is.
template <class T>
constexpr int kWidth = 16 / int(sizeof(T));

inline bool on_16_bytes(const void* a, const void* b = nullptr, const void* c = nullptr) {
  return (uintptr_t(a) | uintptr_t(b) | uintptr_t(c)) % 16 == 0;
}

__host__ __device__ constexpr int64_t divided_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// Calls f(a null pointer to the element type).
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat: return f(static_cast<float*>(nullptr));
    case DType::kDouble: return f(static_cast<double*>(nullptr));
    case DType::kBFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kHalf: return f(static_cast<__half*>(nullptr));
  }
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // taken: it must not surface in the next call of somebody else
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// A counter at 0 for a launch on this stream, that no other launch uses at the same time. The
// launch must leave it at 0: last_block() does.
uint32_t* next_counter(cudaStream_t stream);

// Blocks of `threads` threads that the device runs at the same time.
int64_t resident_blocks(const void* kernel, int threads);
template <class... P>
int64_t resident_blocks(void (*kernel)(P...), int threads) {
  return resident_blocks(reinterpret_cast<const void*>(kernel), threads);
}

// Whether the current device can run blocks that wait for each other.
bool cooperates();

void count_launch();

// Launches blocks × threads. A cooperative grid is resident as a whole: its blocks may wait for
// each other.
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream,
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
  check(cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...), "launch");
  count_launch();
}

// Whether this is the last block of the grid to arrive here; the same answer in all of its threads,
// which all take part. What any block wrote before, the last one reads with __ldcg: from L2, as L1
// is not coherent.
__device__ inline bool last_block(uint32_t* counter) {
  __shared__ bool last;
  __threadfence();  // this thread's results are out before the block counts as arrived
  __syncthreads();
  // The counter wraps to 0 with the last arrival, ready for the next launch.
  if (threadIdx.x == 0) last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  __threadfence();  // the arrivals were seen before the results are read
  return last;
}

}  // namespace divqat::cuda
