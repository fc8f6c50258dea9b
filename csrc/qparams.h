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

// scale = 2 · max(−low, high) / (quant_max − quant_min), at least float32's epsilon; NaN where low is.
DIVQAT_HOST_DEVICE inline float symmetric_scale(float low, float high, int32_t quant_min,
                                                int32_t quant_max) {
  const float amax = -low > high || low != low ? -low : high;
  // twice amax may be too large for a float
  return at_least(amax / float(quant_max - quant_min) * 2.0f, 1.1920928955078125e-7f);
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
  // scale = (high − low) / levels; zero_point = quant_min − nearbyint(low / scale)
  *scale = at_least((high - low) / float(o.quant_max - o.quant_min), 1.1920928955078125e-7f);
  const float exact = float(o.quant_min) - rintf(low / *scale);
  *zero_point = int32_t(at_most(at_least(exact, float(o.quant_min)), float(o.quant_max)));
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
    // running ← running + averaging_constant · (batch − running), the first batch as it is
    *running_min = is_finite(*running_min)
                       ? *running_min + o.averaging_constant * (low - *running_min)
                       : low;
    *running_max = is_finite(*running_max)
                       ? *running_max + o.averaging_constant * (high - *running_max)
                       : high;
  }
  if (is_finite(*running_min)) choose_qparams(*running_min, *running_max, o, scale, zero_point);
}

}  // namespace divqat
