// fake_quantize and its backward on the CPU.
#include "fake_quantize_common.h"
#include "ops.h"

namespace divqat {

std::tuple<Tensor, Tensor> fake_quantize_cpu(const Tensor& x, const Tensor& scale,
                                             const Tensor& zero_point, int64_t quant_min,
                                             int64_t quant_max, std::optional<int64_t> ch_axis,
                                             bool propagate_nan) {
  check_float("x", x);
  check_range(quant_min, quant_max);
  const Tensor from = dense(x);
  const Channels channels = channels_of(from, ch_axis);
  check_qparam("scale", scale, x, channels.count, at::kFloat);
  check_qparam("zero_point", zero_point, x, channels.count, at::kInt);
  Tensor y = at::empty_like(from);
  Tensor mask = empty_mask(x);
  if (x.numel() == 0) return {y, mask};
  const Tensor scales = scale.contiguous(), zero_points = zero_point.contiguous();
  const int32_t* zero = zero_points.const_data_ptr<int32_t>();
  const ChannelTables tables(
      scales.const_data_ptr<float>(), [&](int64_t c) { return float(zero[c]); }, channels,
      quant_min, quant_max, !ch_axis);
  quantize_tensor(from, y, mask, *tables,
                  propagate_nan ? QuantizeMode::kPropagateNan : QuantizeMode::kLowestForNan);
  return {y, mask};
}

Tensor fake_quantize_backward_cpu(const Tensor& grad_y, const Tensor& mask) {
  check_float("grad_y", grad_y);
  check_mask(mask, grad_y);
  Tensor grad_x = at::empty_like(grad_y);
  masked_grad_tensor(grad_y, mask, grad_x);
  return grad_x;
}

void masked_grad_tensor(const Tensor& grad_y, const Tensor& mask, const Tensor& grad_x) {
  const uint8_t* bits = mask.const_data_ptr<uint8_t>();
  const bool stream = grad_x.nbytes() > kStreamBytes;
  with_kernels(grad_y.scalar_type(), [&](const auto& kernels, auto* type) {
    const auto* from = data(grad_y, type);
    auto* to = mutable_data(grad_x, type);
    in_parallel(grad_y.numel(), [&](int64_t begin, int64_t end) {
      kernels.masked_grad(from, bits, to, begin, end, stream);
    });
  });
}

}  // namespace divqat
