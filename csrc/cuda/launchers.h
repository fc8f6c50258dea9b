// The host functions that launch the kernels, for the *_ops.cpp: pointers to device memory, sizes
// and a stream, no torch header. None of them synchronizes.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

#include <vector>

#include "../divergence_loss_direction.h"
#include "../qparams.h"

namespace divqat::cuda {

enum class DType { kFloat, kDouble, kBFloat16, kHalf };

// The number of kernels that this module has launched, on all devices.
int64_t launch_count();

// Copies between addresses aligned to 16 bytes, with the loads and stores of the other kernels.
void copy(void* to, const void* from, int64_t bytes, cudaStream_t stream);

// How x is quantized. The element at memory offset i belongs to channel (i / inner) % channels.
struct QuantizeParams {
  const float* scale;         // [channels]
  const int32_t* zero_point;  // [channels]
  float quant_min;
  float quant_max;
  bool per_tensor;     // one scale: float64 codes are multiplied in float32, as ATen does
  bool propagate_nan;  // else NaN becomes the lowest level
  bool relu;           // before everything else
  int64_t n;
  int64_t channels;
  int64_t inner;
};

// Writes y [n] and, unless it is nullptr, mask [ceil(n / 8)], which is aligned to 4 bytes. y may be
// x.
void fake_quantize(DType dtype, const QuantizeParams& params, const void* x, void* y, uint8_t* mask,
                   cudaStream_t stream);
// grad_x [n] = grad_y where the mask is set, else 0. grad_x may be grad_y.
void fake_quantize_backward(DType dtype, const void* grad_y, const uint8_t* mask, void* grad_x,
                            int64_t n, cudaStream_t stream);

// The state of an observer; with scale_only, the symmetric scale of x itself is all that is taken.
struct ObserverState {
  float* running_min;  // [channels], like the next three; the first two are unused if scale_only
  float* running_max;
  float* scale;
  int32_t* zero_point;
  ObserverOptions options;
  bool scale_only;
};

// Floats of scratch memory for the following three.
constexpr int64_t kObserverScratch = 32768;

void observe(DType dtype, const ObserverState& state, const void* x, int64_t n, int64_t channels,
             int64_t inner, float* scratch, cudaStream_t stream);
// Observes x, and quantizes it with the range after this step (exact) or before it (delayed). scale
// and zero_point of params are those of state. y may be x, except delayed with several channels.
void fake_quantize_exact(DType dtype, const ObserverState& state, const QuantizeParams& params,
                         const void* x, void* y, uint8_t* mask, float* scratch,
                         cudaStream_t stream);
void fake_quantize_delayed(DType dtype, const ObserverState& state, const QuantizeParams& params,
                           const void* x, void* y, uint8_t* mask, float* scratch,
                           cudaStream_t stream);

// A weight with contiguous rows and a scale for each.
struct WeightRows {
  const void* from;  // [rows, columns], like grad and out
  const void* grad;  // nullptr in the forward
  void* out;         // y, or the gradient of the weight
  int64_t rows;
  int64_t columns;
};

// One launch for all weights, or for every kWeightsPerLaunch of them.
constexpr int kWeightsPerLaunch = 800;
void fake_quantize_weights(DType dtype, const std::vector<WeightRows>& weights, int32_t quant_min,
                           int32_t quant_max, cudaStream_t stream);

// QuantizeParams for a learned scale, and a zero point that may be learned.
struct LsqParams {
  const float* scale;      // [channels]
  const void* zero_point;  // [channels], float if learned, else int32
  bool learned;
  bool per_tensor;  // as in QuantizeParams
  float quant_min;
  float quant_max;
  int64_t n;
  int64_t channels;
  int64_t inner;
};

// Doubles of scratch memory for the backward.
constexpr int64_t kLsqScratch = 32768;

// Writes y [n].
void fake_quantize_lsq(DType dtype, const LsqParams& params, const void* x, void* y,
                       cudaStream_t stream);
// Writes grad_x [n], grad_scale [channels] and grad_zero_point [channels], 0 if it is not learned.
void fake_quantize_lsq_backward(DType dtype, const LsqParams& params, const void* grad_y,
                                const void* x, void* grad_x, double grad_factor, double* scratch,
                                float* grad_scale, float* grad_zero_point, cudaStream_t stream);

struct LossInputs {
  const void* logits;          // [rows, classes]
  const void* teacher_logits;  // [rows, classes]
  const int64_t* target;       // [rows]
  const float* weight;         // []
  int64_t rows;
  int64_t classes;
};

struct LossOptions {
  double temperature;
  Direction direction;
  bool non_label;
  bool bounded;
  bool guard;
  double bound;
  double label_smoothing;
  int64_t ignore_index;
};

struct LossOutputs {
  void* loss;  // [], like the next two; float, or double for double logits
  void* ce;
  void* divergence;
  void* grad_logits;  // [rows, classes]
};

// Doubles of scratch memory for the loss.
constexpr int64_t kLossScratch = 12288;

// Writes the loss, its two terms and its gradient.
void divergence_loss(DType dtype, const LossInputs& in, const LossOptions& options,
                     const LossOutputs& out, double* scratch, cudaStream_t stream);
// Multiplies grad_logits [n] by *grad_output in place; the kernel returns at once if that is 1.
void divergence_loss_backward(DType dtype, void* grad_logits, const void* grad_output, int64_t n,
                              cudaStream_t stream);

}  // namespace divqat::cuda
