// The buffers that observe and fake_quantize_observed update in place, on any device.
#pragma once
#include <string_view>

#include "checks.h"
#include "qparams.h"

namespace divqat {

inline ObserverOptions observer_options(int64_t quant_min, int64_t quant_max,
                                        double averaging_constant, bool symmetric, bool relu) {
  check_range(quant_min, quant_max);
  return {int32_t(quant_min), int32_t(quant_max), float(averaging_constant), symmetric, relu};
}

inline void check_observer_mode(std::string_view mode) {
  TORCH_CHECK_VALUE(mode == "exact" || mode == "delayed" || mode == "frozen",
                    "observer_mode: wanted exact, delayed or frozen, got ", mode);
}

// No two values of a buffer may share memory.
inline void check_updatable(const char* name, const Tensor& value) {
  TORCH_CHECK_VALUE(value.is_non_overlapping_and_dense() || value.stride(0) != 0, name,
                    ": wanted memory of its own for each value, got ", value.sizes(),
                    " with strides ", value.strides());
}

// The buffer itself if it is contiguous, else a copy, which write_back() copies back. A destructor
// must not do that, as copy_() may throw.
class ContiguousBuffer {
 public:
  explicit ContiguousBuffer(const Tensor& buffer) : buffer_(buffer), memory_(buffer.contiguous()) {}
  ContiguousBuffer(const ContiguousBuffer&) = delete;
  void write_back() const {
    if (!memory_.is_same(buffer_)) buffer_.copy_(memory_);
  }
  template <class T>
  T* data() const {
    return memory_.data_ptr<T>();
  }

 private:
  Tensor buffer_;
  Tensor memory_;
};

// Each [channels], or [] for one channel.
class ObserverBuffers {
 public:
  ObserverBuffers(const Tensor& x, const Tensor& running_min, const Tensor& running_max,
                  const Tensor& scale, const Tensor& zero_point, int64_t channels)
      : running_min_(running_min),
        running_max_(running_max),
        scale_(scale),
        zero_point_(zero_point) {
    check_qparam("running_min", running_min, x, channels, at::kFloat);
    check_qparam("running_max", running_max, x, channels, at::kFloat);
    check_qparam("scale", scale, x, channels, at::kFloat);
    check_qparam("zero_point", zero_point, x, channels, at::kInt);
    check_updatable("running_min", running_min);
    check_updatable("running_max", running_max);
    check_updatable("scale", scale);
    check_updatable("zero_point", zero_point);
  }

  float* running_min() const { return running_min_.data<float>(); }
  float* running_max() const { return running_max_.data<float>(); }
  float* scale() const { return scale_.data<float>(); }
  int32_t* zero_point() const { return zero_point_.data<int32_t>(); }

  void write_back() const {
    running_min_.write_back();
    running_max_.write_back();
    scale_.write_back();
    zero_point_.write_back();
  }

 private:
  ContiguousBuffer running_min_, running_max_, scale_, zero_point_;
};

}  // namespace divqat
