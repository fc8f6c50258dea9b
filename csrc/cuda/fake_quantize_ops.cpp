// fake_quantize and its backward: from tensors to the launchers of fake_quantize.cu.
#include <ATen/ops/empty_like.h>

#include "../checks.h"
#include "ops.h"
#include "ops_common.h"

namespace divqat::cuda {
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
  QuantizeParams params =
      quantize_params(from, scales.const_data_ptr<float>(), zero_points.const_data_ptr<int32_t>(),
                      quant_min, quant_max, channels, !ch_axis);
  params.propagate_nan = propagate_nan;
  fake_quantize(dtype_of(x), params, from.const_data_ptr(), y.mutable_data_ptr(),
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

}  // namespace divqat::cuda
