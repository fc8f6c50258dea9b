// What the *_ops.cpp share: device guard, stream, and the arguments of the launchers.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../checks.h"
#include "../observer_buffers.h"
#include "launchers.h"

namespace divqat::cuda {

// Makes the device of x current; its current stream.
class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& x) : guard_(x.device()) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

 private:
  c10::cuda::OptionalCUDAGuard guard_;
};

inline DType dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::kFloat;
    case at::kDouble:
      return DType::kDouble;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return DType::kHalf;  // check_float() let nothing else through
  }
}

// For a dense x.
inline QuantizeParams quantize_params(const at::Tensor& dense_x, const float* scale,
                                      const int32_t* zero_point, int64_t quant_min,
                                      int64_t quant_max, Channels channels, bool per_tensor) {
  QuantizeParams params = {};
  params.scale = scale;
  params.zero_point = zero_point;
  params.quant_min = float(quant_min);
  params.quant_max = float(quant_max);
  params.per_tensor = per_tensor;
  params.propagate_nan = true;
  params.n = dense_x.numel();
  params.channels = channels.count;
  params.inner = channels.inner;
  return params;
}

inline ObserverState state_of(const ObserverBuffers& buffers, const ObserverOptions& options) {
  return {buffers.running_min(),
          buffers.running_max(),
          buffers.scale(),
          buffers.zero_point(),
          options,
          false};
}

inline at::Tensor observer_scratch(const at::Tensor& x) {
  return at::empty({kObserverScratch}, x.options().dtype(at::kFloat));
}

}  // namespace divqat::cuda
