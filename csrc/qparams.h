// The observer's arithmetic for one channel, on the host and on the device, in float32 and in the
// order of observe_ref and choose_qparams (divqat/ops/reference.py), so that the bits agree. Build
// without floating-point contraction.
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

// The comparisons let NaN through, as torch.clamp does.
DIVQAT_HOST_DEVICE inline float at_least(float x, float bound) { return x < bound ? bound : x; }
DIVQAT_HOST_DEVICE inline float at_most(float x, float bound) { return x > bound ? bound : x; }
DIVQAT_HOST_DEVICE inline bool is_finite(float x) { return x - x == 0.0f; }

// The smallest scale: float32's epsilon.
constexpr float kMinScale = 1.1920928955078125e-7f;

// The width of a range over its levels, as a scale. With a single level it may be too large for a
// float.
DIVQAT_HOST_DEVICE inline float as_scale(float step, float levels) {
  return at_least(levels > 1.0f ? step : at_most(step, 3.4028234663852886e38f), kMinScale);
}

// scale = 2 · max(−low, high) / (quant_max − quant_min), at least kMinScale; NaN where low is.
DIVQAT_HOST_DEVICE inline float symmetric_scale(float low, float high, int32_t quant_min,
                                                int32_t quant_max) {
  const float amax = -low > high || low != low ? -low : high;
  const float levels = float(quant_max - quant_min);
  return as_scale(amax / levels * 2.0f, levels);  // twice amax may be too large for a float
}

// The gradient of a learned scale. At kMinScale and below, where max(scale, kMinScale) quantizes, it
// only raises the scale: a step down would have no end.
DIVQAT_HOST_DEVICE inline float lsq_scale_grad(float grad, float scale) {
  return scale <= kMinScale ? -fabsf(grad) : grad;
}

// Scale and zero point that cover [low, high] and 0.
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
  // be too large for a float.
  const float width = high - low, levels = float(o.quant_max - o.quant_min);
  *scale = as_scale(is_finite(width) ? width / levels : high / levels - low / levels, levels);
  const float exact = float(o.quant_min) - rintf(low / *scale);
  *zero_point = int32_t(at_most(at_least(exact, float(o.quant_min)), float(o.quant_max)));
}

// running ← running + weight · (batch − running), the first batch as it is. The difference may be
// too large for a float, the average is not.
DIVQAT_HOST_DEVICE inline float moved(float running, float batch, float weight) {
  if (!is_finite(running)) return batch;
  const float step = batch - running;
  return is_finite(step) ? running + weight * step : running - weight * running + weight * batch;
}

// One step of the moving average with the batch's [low, high] (NaN in either: not observed), then
// scale and zero point from it.
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
