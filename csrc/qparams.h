// Scale and zero point of one channel, and one step of its observer, on host and device. Computed
// in float32 and in the order of divqat/ops/qparams.py, so that the bits agree; compile without
// floating-point contraction.
#pragma once
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define DIVQAT_HOST_DEVICE __host__ __device__
#else
#define DIVQAT_HOST_DEVICE
#endif

namespace divqat {

struct ObserverOptions {
  int32_t quant_min;
  int32_t quant_max;
  float averaging_constant;
  bool symmetric;
  bool relu;
};

// NaN passes through, as in torch.clamp.
DIVQAT_HOST_DEVICE inline float at_least(float x, float bound) { return x < bound ? bound : x; }
DIVQAT_HOST_DEVICE inline float at_most(float x, float bound) { return x > bound ? bound : x; }
DIVQAT_HOST_DEVICE inline bool is_finite(float x) { return x - x == 0.0f; }

// The smallest scale: float32's epsilon.
constexpr float kMinScale = 1.1920928955078125e-7f;

// A step between two levels as a scale. If quant_max − quant_min is 1, the step may exceed the
// largest float.
DIVQAT_HOST_DEVICE inline float as_scale(float step, float levels) {
  return at_least(levels > 1.0f ? step : at_most(step, 3.4028234663852886e38f), kMinScale);
}

// scale = 2 · max(−low, high) / (quant_max − quant_min), at least kMinScale; NaN if low is.
DIVQAT_HOST_DEVICE inline float symmetric_scale(float low, float high, int32_t quant_min,
                                                int32_t quant_max) {
  const float amax = -low > high || low != low ? -low : high;
  const float levels = float(quant_max - quant_min);
  return as_scale(amax / levels * 2.0f, levels);  // in this order, as 2 · amax may overflow
}

// The gradient of a learned scale. At kMinScale and below it may only raise the scale: there x is
// quantized with kMinScale, so a falling scale would change nothing and go on falling.
DIVQAT_HOST_DEVICE inline float lsq_scale_grad(float grad, float scale) {
  return scale <= kMinScale ? -fabsf(grad) : grad;
}

// Scale and zero point for a range that covers low, high and 0.
DIVQAT_HOST_DEVICE inline void choose_qparams(float low, float high, const ObserverOptions& o,
                                              float* scale, int32_t* zero_point) {
  low = at_most(low, 0.0f);
  high = at_least(high, 0.0f);
  if (o.symmetric) {
    *scale = symmetric_scale(low, high, o.quant_min, o.quant_max);
    *zero_point = o.quant_min < 0 ? 0 : (o.quant_min + o.quant_max + 1) / 2;
    return;
  }
  // scale = (high − low) / levels; zero_point = quant_min − nearbyint(low / scale). high − low may
  // overflow.
  const float width = high - low, levels = float(o.quant_max - o.quant_min);
  *scale = as_scale(is_finite(width) ? width / levels : high / levels - low / levels, levels);
  const float exact = float(o.quant_min) - rintf(low / *scale);
  *zero_point = int32_t(at_most(at_least(exact, float(o.quant_min)), float(o.quant_max)));
}

// The moving average running + weight · (batch − running), or batch if it is the first. The
// difference may overflow; the average does not.
DIVQAT_HOST_DEVICE inline float moved(float running, float batch, float weight) {
  if (!is_finite(running)) return batch;
  const float step = batch - running;
  return is_finite(step) ? running + weight * step : running - weight * running + weight * batch;
}

// One step of the moving averages with the batch's minimum and maximum, which are ignored if either
// is NaN or infinite; then scale and zero point.
DIVQAT_HOST_DEVICE inline void observe_channel(float low, float high, const ObserverOptions& o,
                                               float* running_min, float* running_max,
                                               float* scale, int32_t* zero_point) {
  if (o.relu) {
    low = at_least(low, 0.0f);
    high = at_least(high, 0.0f);
  }
  if (is_finite(low) && is_finite(high)) {
    *running_min = moved(*running_min, low, o.averaging_constant);
    *running_max = moved(*running_max, high, o.averaging_constant);
  }
  if (is_finite(*running_min)) choose_qparams(*running_min, *running_max, o, scale, zero_point);
}

}  // namespace divqat
