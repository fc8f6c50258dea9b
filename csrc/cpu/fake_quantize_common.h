// What the ops that quantize share: per-channel tables, and loops over whole tensors.
#pragma once
#include <c10/util/SmallVector.h>

#include <algorithm>

#include "../checks.h"
#include "parallel.h"

namespace divqat {

// Outputs of more bytes than this are written with non-temporal stores: most of the output would be
// evicted before it is read, and the stores need not read the cache lines first.
constexpr size_t kStreamBytes = 8 << 20;

// Per-channel tables for QuantizeParams: with reciprocals, and padded by wrapping around.
class ChannelTables {
 public:
  // zero_point(i) returns the zero point of channel i as a float.
  template <class ZeroPoint>
  ChannelTables(const float* scale, ZeroPoint zero_point, Channels channels, int64_t quant_min,
                int64_t quant_max, bool per_tensor) {
    const int64_t length = channels.count + kMaxLanes;
    table_.resize(size_t(3 * length));
    float* scales = table_.data();
    for (int64_t i = 0; i < length && channels.count > 0; ++i) {
      const int64_t c = i % channels.count;
      scales[i] = scale[c];
      scales[length + i] = 1.0f / scale[c];
      scales[2 * length + i] = zero_point(c);
    }
    params_ = {scales,
               scales + length,
               scales + 2 * length,
               channels.count,
               std::max<int64_t>(channels.inner, 1),
               float(quant_min),
               float(quant_max),
               per_tensor};
  }
  ChannelTables(const ChannelTables&) = delete;

  const QuantizeParams& operator*() const { return params_; }

 private:
  c10::SmallVector<float, 3 * (8 + kMaxLanes)> table_;
  QuantizeParams params_;
};

// Writes y and, unless it is undefined, mask. x and y are dense in the same memory order.
inline void quantize_tensor(const Tensor& x, const Tensor& y, const Tensor& mask,
                            QuantizeParams params, QuantizeMode mode) {
  params.stream = y.nbytes() > kStreamBytes;
  uint8_t* const bits = mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  with_kernels(x.scalar_type(), [&](const auto& kernels, auto* type) {
    const auto* from = data(x, type);
    auto* to = mutable_data(y, type);
    in_parallel(x.numel(), [&](int64_t begin, int64_t end) {
      kernels.fake_quantize(from, to, bits, begin, end, params, mode);
    });
  });
}

// grad_x = grad_y where the mask is set, else 0; all dense in the same memory order.
void masked_grad_tensor(const Tensor& grad_y, const Tensor& mask, const Tensor& grad_x);

}  // namespace divqat
