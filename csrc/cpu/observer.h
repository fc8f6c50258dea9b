// One step of an observer: running range, scale and zero point from the range of a batch.
#pragma once
#include "../observer_buffers.h"
#include "fake_quantize_common.h"
#include "min_max.h"

namespace divqat {

class Observer {
 public:
  Observer(const Tensor& x, const Tensor& running_min, const Tensor& running_max,
           const Tensor& scale, const Tensor& zero_point, Channels channels,
           const ObserverOptions& options)
      : channels_(channels),
        options_(options),
        buffers_(x, running_min, running_max, scale, zero_point, channels.count) {}

  void observe(const Tensor& dense_x) {
    if (dense_x.numel() == 0) return;
    c10::SmallVector<float, 16> range(size_t(2 * channels_.count));
    float *low = range.data(), *high = low + channels_.count;
    min_max_tensor(dense_x, channels_, low, high);
    for (int64_t c = 0; c < channels_.count; ++c) {
      observe_channel(low[c], high[c], options_, buffers_.running_min() + c,
                      buffers_.running_max() + c, buffers_.scale() + c, buffers_.zero_point() + c);
    }
  }

  void write_back() const { buffers_.write_back(); }

  // Copies of the current scales and zero points.
  ChannelTables tables(bool per_tensor) const {
    const int32_t* zero = buffers_.zero_point();
    return ChannelTables(
        buffers_.scale(), [&](int64_t c) { return float(zero[c]); }, channels_, options_.quant_min,
        options_.quant_max, per_tensor);
  }

 private:
  Channels channels_;
  ObserverOptions options_;
  ObserverBuffers buffers_;
};

}  // namespace divqat
