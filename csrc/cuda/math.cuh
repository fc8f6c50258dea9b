// Element types, and functions of float and double under one name.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

namespace divqat::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The type to compute in: double for double, float for all others.
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

// Rounds half to even, like nearbyint.
__device__ inline float rint_of(float x) { return rintf(x); }
__device__ inline double rint_of(double x) { return rint(x); }

// If one operand is NaN, the other one.
__device__ inline float min_of(float a, float b) { return fminf(a, b); }
__device__ inline double min_of(double a, double b) { return fmin(a, b); }
__device__ inline float max_of(float a, float b) { return fmaxf(a, b); }
__device__ inline double max_of(double a, double b) { return fmax(a, b); }
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }
__device__ inline float log1p_of(float x) { return log1pf(x); }
__device__ inline double log1p_of(double x) { return log1p(x); }
__device__ inline float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fma_of(double a, double b, double c) { return fma(a, b, c); }

}  // namespace divqat::cuda
