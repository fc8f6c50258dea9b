// fake_quantize, observe, fake_quantize_observed: from tensors to their launchers.
#include <ATen/ops/empty.h>

#include "../checks.h"
#include "device.h"
#include "ops.h"

namespace divqat::cuda {
namespace {

// The buffers of an observer as contiguous memory.
class Buffers {
 public:
  Buffers(const Tensor& x, Channels channels, const Tensor& running_min,
          const Tensor& running_max, const Tensor& scale, const Tensor& zero_point,
          int64_t quant_min, int64_t quant_max, double averaging_constant, bool symmetric,
          bool relu)
      : running_min_(running_min), running_max_(running_max), scale_(scale),
        zero_point_(zero_point) {
    state_.options =
        observer_options(quant_min, quant_max, averaging_constant, symmetric, relu);
    check_observer(x, running_min, running_max, scale, zero_point, channels.count);
    state_.running_min = running_min_.data<float>();
    state_.running_max = running_max_.data<float>();
    state_.scale = scale_.data<float>();
    state_.zero_point = zero_point_.data<int32_t>();
    state_.weights = false;
    scratch_ = at::empty({kObserverScratch}, x.options().dtype(at::kFloat));
  }

  // What was observed, into buffers that are not contiguous.
  void write_back() const {
    running_min_.write_back();
    running_max_.write_back();
    scale_.write_back();
    zero_point_.write_back();
  }
  const ObserverState& state() const { return state_; }
  float* scratch() const { return scratch_.mutable_data_ptr<float>(); }

 private:
  InPlace running_min_, running_max_, scale_, zero_point_;
  ObserverState state_;
  Tensor scratch_;
};

// y and the mask, which is returned, from a dense x. y may be x, unless ranges are delayed and per
// channel: then x is observed when y is there.
Tensor quantize_observed(const Tensor& x, const Tensor& y, const Tensor& running_min,
                         const Tensor& running_max, const Tensor& scale, const Tensor& zero_point,
                         int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis,
                         double averaging_constant, bool symmetric, std::string_view mode,
                         bool relu) {
  check_observer_mode(mode);
  const OnDevice device(x);
  const Channels channels = channels_of(x, ch_axis);
  const Buffers buffers(x, channels, running_min, running_max, scale, zero_point, quant_min,
                        quant_max, averaging_constant, symmetric, relu);
  Tensor mask = empty_mask(x);
  if (x.numel() == 0) return mask;
  QuantizeGrid grid = grid_of(x, buffers.state().scale, buffers.state().zero_point, quant_min,
                              quant_max, channels, !ch_axis);
  grid.relu = relu;
  const auto run = mode == "exact" ? fake_quantize_exact : fake_quantize_delayed;
  uint8_t* bits = mask.mutable_data_ptr<uint8_t>();
  if (mode == "frozen") {
    fake_quantize(dtype_of(x), grid, x.const_data_ptr(), y.mutable_data_ptr(), bits,
                  device.stream());
  } else {
    run(dtype_of(x), buffers.state(), grid, x.const_data_ptr(), y.mutable_data_ptr(), bits,
        buffers.scratch(), device.stream());
    buffers.write_back();
  }
  return mask;
}

}  // namespace

std::tuple<Tensor, Tensor> fake_quantize_cuda(const Tensor& x, const Tensor& scale,
                                              const Tensor& zero_point, int64_t quant_min,
                                              int64_t quant_max, std::optional<int64_t> ch_axis,
                                              bool propagate_nan) {
  check_float("x", x);
  check_range(quant_min, quant_max);
  const OnDevice device(x);
  const Tensor from = dense(x);
  const Channels channels = channels_of(from, ch_axis);
  check_qparam("scale", scale, x, channels.count, at::kFloat);
  check_qparam("zero_point", zero_point, x, channels.count, at::kInt);
  Tensor y = at::empty_like(from), mask = empty_mask(x);
  if (x.numel() == 0) return {y, mask};
  const Tensor scales = scale.contiguous(), zero_points = zero_point.contiguous();
  QuantizeGrid grid =
      grid_of(from, scales.const_data_ptr<float>(), zero_points.const_data_ptr<int32_t>(),
              quant_min, quant_max, channels, !ch_axis);
  grid.propagate_nan = propagate_nan;
  fake_quantize(dtype_of(x), grid, from.const_data_ptr(), y.mutable_data_ptr(),
                mask.mutable_data_ptr<uint8_t>(), device.stream());
  return {y, mask};
}

Tensor fake_quantize_backward_cuda(const Tensor& grad_y, const Tensor& mask) {
  check_float("grad_y", grad_y);
  check_mask(mask, grad_y);
  const OnDevice device(grad_y);
  Tensor grad_x = at::empty_like(grad_y);
  if (grad_y.numel() == 0) return grad_x;
  fake_quantize_backward(dtype_of(grad_y), grad_y.const_data_ptr(), mask.const_data_ptr<uint8_t>(),
                         grad_x.mutable_data_ptr(), grad_y.numel(), device.stream());
  return grad_x;
}

void observe_cuda(const Tensor& x, const Tensor& running_min, const Tensor& running_max,
                  const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                  int64_t quant_max, std::optional<int64_t> ch_axis, double averaging_constant,
                  bool symmetric, bool relu) {
  check_float("x", x);
  const OnDevice device(x);
  const Tensor from = dense(x);
  const Channels channels = channels_of(from, ch_axis);
  const Buffers buffers(x, channels, running_min, running_max, scale, zero_point, quant_min,
                        quant_max, averaging_constant, symmetric, relu);
  if (x.numel() == 0) return;
  observe(dtype_of(x), buffers.state(), from.const_data_ptr(), x.numel(), channels.count,
          channels.inner, buffers.scratch(), device.stream());
  buffers.write_back();
}

std::tuple<Tensor, Tensor> fake_quantize_observed_cuda(
    const Tensor& x, const Tensor& running_min, const Tensor& running_max, const Tensor& scale,
    const Tensor& zero_point, int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis,
    double averaging_constant, bool symmetric, std::string_view mode, bool relu) {
  check_float("x", x);
  const OnDevice device(x);
  const Tensor from = dense(x);
  const Tensor y = at::empty_like(from);
  return {y, quantize_observed(from, y, running_min, running_max, scale, zero_point, quant_min,
                               quant_max, ch_axis, averaging_constant, symmetric, mode, relu)};
}

Tensor fake_quantize_observed_inplace_cuda(
    const Tensor& x, const Tensor& running_min, const Tensor& running_max, const Tensor& scale,
    const Tensor& zero_point, int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis,
    double averaging_constant, bool symmetric, std::string_view mode, bool relu) {
  check_float("x", x);
  check_dense("x", x);
  const OnDevice device(x);
  const Tensor from = ch_axis && mode == "delayed" ? x.clone() : x;
  return quantize_observed(from, x, running_min, running_max, scale, zero_point, quant_min,
                           quant_max, ch_axis, averaging_constant, symmetric, mode, relu);
}

}  // namespace divqat::cuda
