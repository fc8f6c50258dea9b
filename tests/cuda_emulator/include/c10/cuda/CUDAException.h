// Stands in for torch's header of this name.
#pragma once
#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#define C10_CUDA_CHECK(expression)                                          \
  do {                                                                      \
    const cudaError_t error_ = (expression);                                \
    TORCH_CHECK(error_ == cudaSuccess, "CUDA: ", cudaGetErrorString(error_)); \
  } while (0)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() C10_CUDA_CHECK(cudaGetLastError())
