// fake_quantize_weights and its backward: from tensors to the launcher of fake_quantize_weights.cu.
#include <ATen/ops/empty.h>

#include <map>

#include "../checks.h"
#include "ops.h"
#include "ops_common.h"

namespace divqat::cuda {
namespace {

// A weight with one scale, or with rows that are not contiguous: a launch for the scales, one to
// quantize, and in the backward one for the gradient.
void quantize_weight(const Tensor& from, const Tensor& grad, const Tensor& out, Channels channels,
                     int64_t quant_min, int64_t quant_max, bool per_tensor, cudaStream_t stream) {
  const auto options = from.options().dtype(at::kFloat);
  const Tensor scale = at::empty({channels.count}, options);
  const Tensor zero_point = at::empty({channels.count}, options.dtype(at::kInt));
  const Tensor scratch = at::empty({kObserverScratch}, options);
  ObserverState state = {};
  state.scale = scale.mutable_data_ptr<float>();
  state.zero_point = zero_point.mutable_data_ptr<int32_t>();
  state.options = {int32_t(quant_min), int32_t(quant_max), 1.0f, true, false};
  state.scale_only = true;
  const DType dtype = dtype_of(from);
  const int64_t n = from.numel();
  observe(dtype, state, from.const_data_ptr(), n, channels.count, channels.inner,
          scratch.mutable_data_ptr<float>(), stream);
  const QuantizeParams params = quantize_params(from, state.scale, state.zero_point, quant_min,
                                                quant_max, channels, per_tensor);
  if (!grad.defined()) {
    return fake_quantize(dtype, params, from.const_data_ptr(), out.mutable_data_ptr(), nullptr,
                         stream);
  }
  const Tensor mask = empty_mask(from);
  uint8_t* bits = mask.mutable_data_ptr<uint8_t>();
  fake_quantize(dtype, params, from.const_data_ptr(), out.mutable_data_ptr(), bits, stream);
  fake_quantize_backward(dtype, grad.const_data_ptr(), bits, out.mutable_data_ptr(), n, stream);
}

// One launch for all weights of a dtype. grads is empty in the forward.
std::vector<Tensor> run(at::TensorList weights, at::TensorList grads, int64_t quant_min,
                        int64_t quant_max, std::optional<int64_t> ch_axis) {
  check_range(quant_min, quant_max);
  std::vector<Tensor> outputs, alive;  // keeps dense copies alive until the launches
  if (weights.empty()) return outputs;
  const OnDevice device(weights[0]);
  std::map<DType, std::vector<WeightRows>> rows;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_float("weights", weights[i]);
    check_device("weights", weights[i], weights[0]);
    const Tensor from = dense(weights[i]);
    const Channels channels = channels_of(from, ch_axis);
    Tensor grad;
    if (!grads.empty()) {
      check_same("grads", grads[i], weights[i]);
      grad = laid_out_as(grads[i], from);
    }
    outputs.push_back(at::empty_like(from));
    alive.insert(alive.end(), {from, grad});
    const Tensor& out = outputs.back();
    if (from.numel() == 0) continue;
    if (ch_axis && channels.count * channels.inner == from.numel()) {
      rows[dtype_of(from)].push_back({from.const_data_ptr(),
                                      grad.defined() ? grad.const_data_ptr() : nullptr,
                                      out.mutable_data_ptr(), channels.count, channels.inner});
    } else {
      quantize_weight(from, grad, out, channels, quant_min, quant_max, !ch_axis, device.stream());
    }
  }
  for (const auto& [dtype, list] : rows) {
    fake_quantize_weights(dtype, list, int32_t(quant_min), int32_t(quant_max), device.stream());
  }
  return outputs;
}

}  // namespace

std::vector<Tensor> fake_quantize_weights_cuda(at::TensorList weights, int64_t quant_min,
                                               int64_t quant_max, std::optional<int64_t> ch_axis) {
  return run(weights, {}, quant_min, quant_max, ch_axis);
}

std::vector<Tensor> fake_quantize_weights_backward_cuda(at::TensorList grads,
                                                        at::TensorList weights, int64_t quant_min,
                                                        int64_t quant_max,
                                                        std::optional<int64_t> ch_axis) {
  TORCH_CHECK_VALUE(grads.size() == weights.size(), "grads: wanted ", weights.size(),
                    " like weights, got ", grads.size());
  return run(weights, grads, quant_min, quant_max, ch_axis);
}

}  // namespace divqat::cuda
