// One step of an observer: running range, scale and zero point from the range of a batch.
#pragma once
#include "min_max.cuh"

namespace divqat::cuda {

// The observer's state for one channel, in registers; the scale alone if scale_only.
struct ObserverChannel {
  float running_min = 0, running_max = 0, scale = 1;
  int32_t zero_point = 0;

  __device__ ObserverChannel(const ObserverState& s, int64_t channel) {
    if (s.scale_only) return;
    running_min = s.running_min[channel];
    running_max = s.running_max[channel];
    scale = s.scale[channel];
    zero_point = s.zero_point[channel];
  }
  __device__ void update(const ObserverState& s, const MinMax& min_max) {
    const float low = min_max.min(), high = min_max.max();
    if (s.scale_only) {
      scale = symmetric_scale(low, high, s.options.quant_min, s.options.quant_max);
    } else {
      observe_channel(low, high, s.options, &running_min, &running_max, &scale, &zero_point);
    }
  }
  __device__ void store(const ObserverState& s, int64_t channel) const {
    if (!s.scale_only) {
      s.running_min[channel] = running_min;
      s.running_max[channel] = running_max;
    }
    s.scale[channel] = scale;
    s.zero_point[channel] = zero_point;
  }
};

__device__ inline void update_channel(const ObserverState& s, int64_t channel,
                                      const MinMax& min_max) {
  ObserverChannel observer(s, channel);
  observer.update(s, min_max);
  observer.store(s, channel);
}

}  // namespace divqat::cuda
