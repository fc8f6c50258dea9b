// What the tensor side calls: every kernel behind plain pointers, sizes and a stream. The pointers
// are device memory; nothing here waits for the device.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

#include <vector>

#include "../divergence_loss_direction.h"
#include "../qparams.h"

namespace divqat::cuda {

enum class DType { kFloat, kDouble, kBFloat16, kHalf };

// Kernels launched by this module so far, on all devices.
int64_t launch_count();

// Bytes from one place to another, both on 16 bytes, with this build's loads and stores.
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

// y [n] and, unless it is nullptr, mask [ceil(n / 8)], on 4 bytes, from x [n]; y may be x.
void fake_quantize(DType dtype, const QuantizeParams& params, const void* x, void* y, uint8_t* mask,
                   cudaStream_t stream);
// grad_x [n] = grad_y where the mask is set, else 0; in place where they are the same.
void fake_quantize_backward(DType dtype, const void* grad_y, const uint8_t* mask, void* grad_x,
                            int64_t n, cudaStream_t stream);

// What a range of x becomes: a step of an observer, or the scale of a weight.
struct ObserverState {
  float* running_min;  // [channels], as are the others; the first two are an observer's alone
  float* running_max;
  float* scale;
  int32_t* zero_point;
  ObserverOptions options;
  bool scale_only;
};

// Floats of scratch memory that what follows takes.
constexpr int64_t kObserverScratch = 32768;

void observe(DType dtype, const ObserverState& state, const void* x, int64_t n, int64_t channels,
             int64_t inner, float* scratch, cudaStream_t stream);
// Both at once: y and mask with the range after this step (exact) or the one before (delayed). The
// grid's scale and zero point are the state's. y may be x, but not for several channels delayed.
void fake_quantize_exact(DType dtype, const ObserverState& state, const QuantizeParams& params,
                         const void* x, void* y, uint8_t* mask, float* scratch,
                         cudaStream_t stream);
void fake_quantize_delayed(DType dtype, const ObserverState& state, const QuantizeParams& params,
                           const void* x, void* y, uint8_t* mask, float* scratch,
                           cudaStream_t stream);

// A weight whose rows, which have a scale each, are contiguous.
struct WeightRows {
  const void* from;  // [rows, columns], as are the others
  const void* grad;  // nullptr in the forward
  void* out;         // y, or the gradient of the weight
  int64_t rows;
  int64_t columns;
};

// One launch for all weights, or for every kWeightsPerLaunch of them.
constexpr int kWeightsPerLaunch = 800;
void fake_quantize_weights(DType dtype, const std::vector<WeightRows>& weights, int32_t quant_min,
                           int32_t quant_max, cudaStream_t stream);

// A learned grid. The element at memory offset i belongs to channel (i / inner) % channels.
struct LsqParams {
  const float* scale;      // [channels]
  const void* zero_point;  // [channels], float if learned, else int32
  bool learned;
  bool per_tensor;  // as in QuantizeGrid
  float quant_min;
  float quant_max;
  int64_t n;
  int64_t channels;
  int64_t inner;
};

// Doubles of scratch memory that the backward takes.
constexpr int64_t kLsqScratch = 32768;

// y [n] from x [n].
void fake_quantize_lsq(DType dtype, const LsqParams& params, const void* x, void* y,
                       cudaStream_t stream);
// grad_x [n], grad_scale [channels] and grad_zero_point [channels], 0 where it is not learned.
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
  void* loss;  // [], as are the next two; float, or double for double logits
  void* ce;
  void* divergence;
  void* grad_logits;  // [rows, classes]
};

// Doubles of scratch memory that the loss takes.
constexpr int64_t kLossScratch = 12288;

// The loss, its two terms and its gradient.
void divergence_loss(DType dtype, const LossInputs& in, const LossOptions& options,
                     const LossOutputs& out, double* scratch, cudaStream_t stream);
// grad_logits [n] times *grad_output, in place; returns at once where that is 1.
void divergence_loss_backward(DType dtype, void* grad_logits, const void* grad_output, int64_t n,
                              cudaStream_t stream);

}  // namespace divqat::cuda
