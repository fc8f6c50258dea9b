// fake_quantize_observed: from tensors to the launchers of fake_quantize_observed.cu.
#include <ATen/ops/empty_like.h>

#include "ops.h"
#include "ops_common.h"

namespace divqat::cuda {
namespace {

// Writes y from a dense x and returns the mask. y may be x, except delayed per channel: then x is
// observed after y is written.
Tensor quantize_observed(const Tensor& x, const Tensor& y, const Tensor& running_min,
                         const Tensor& running_max, const Tensor& scale, const Tensor& zero_point,
                         int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis,
                         double averaging_constant, bool symmetric, std::string_view mode,
                         bool relu) {
  check_observer_mode(mode);
  const OnDevice device(x);
  const Channels channels = channels_of(x, ch_axis);
  const ObserverOptions options =
      observer_options(quant_min, quant_max, averaging_constant, symmetric, relu);
  const ObserverBuffers buffers(x, running_min, running_max, scale, zero_point, channels.count);
  const Tensor scratch = observer_scratch(x);
  Tensor mask = empty_mask(x);
  if (x.numel() == 0) return mask;
  QuantizeParams params = quantize_params(x, buffers.scale(), buffers.zero_point(), quant_min,
                                          quant_max, channels, !ch_axis);
  params.relu = relu;
  const auto run = mode == "exact" ? fake_quantize_exact : fake_quantize_delayed;
  uint8_t* bits = mask.mutable_data_ptr<uint8_t>();
  if (mode == "frozen") {
    fake_quantize(dtype_of(x), params, x.const_data_ptr(), y.mutable_data_ptr(), bits,
                  device.stream());
  } else {
    run(dtype_of(x), state_of(buffers, options), params, x.const_data_ptr(), y.mutable_data_ptr(),
        bits, scratch.mutable_data_ptr<float>(), device.stream());
    buffers.write_back();
  }
  return mask;
}

}  // namespace

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

Tensor fake_quantize_observed_inplace_cuda(const Tensor& x, const Tensor& running_min,
                                           const Tensor& running_max, const Tensor& scale,
                                           const Tensor& zero_point, int64_t quant_min,
                                           int64_t quant_max, std::optional<int64_t> ch_axis,
                                           double averaging_constant, bool symmetric,
                                           std::string_view mode, bool relu) {
  check_float("x", x);
  check_dense("x", x);
  const OnDevice device(x);
  const Tensor from = ch_axis && mode == "delayed" ? x.clone() : x;
  return quantize_observed(from, x, running_min, running_max, scale, zero_point, quant_min,
                           quant_max, ch_axis, averaging_constant, symmetric, mode, relu);
}

}  // namespace divqat::cuda
