// fake_quantize_lsq and its backward: from tensors to the launchers of fake_quantize_lsq.cu.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include "../checks.h"
#include "launchers.h"
#include "ops.h"
#include "ops_common.h"

namespace divqat::cuda {
namespace {

// LsqParams, and the contiguous tensors that they point to.
class LsqChannels {
 public:
  LsqChannels(const Tensor& x, const Tensor& dense_x, const Tensor& scale, const Tensor& zero_point,
              int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis)
      : scale_(scale.contiguous()), zero_point_(zero_point.contiguous()) {
    check_range(quant_min, quant_max);
    const Channels channels = channels_of(dense_x, ch_axis);
    const bool learned = zero_point.scalar_type() != at::kInt;
    check_qparam("scale", scale, x, channels.count, at::kFloat);
    check_qparam("zero_point", zero_point, x, channels.count, learned ? at::kFloat : at::kInt);
    params_.scale = scale_.const_data_ptr<float>();
    params_.zero_point = zero_point_.const_data_ptr();
    params_.learned = learned;
    params_.per_tensor = !ch_axis;
    params_.quant_min = float(quant_min);
    params_.quant_max = float(quant_max);
    params_.n = dense_x.numel();
    params_.channels = channels.count;
    params_.inner = channels.inner;
  }

  const LsqParams& operator*() const { return params_; }

 private:
  Tensor scale_, zero_point_;
  LsqParams params_;
};

}  // namespace

Tensor fake_quantize_lsq_cuda(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                              int64_t quant_min, int64_t quant_max,
                              std::optional<int64_t> ch_axis) {
  check_float("x", x);
  const OnDevice device(x);
  const Tensor from = dense(x);
  const LsqChannels params(x, from, scale, zero_point, quant_min, quant_max, ch_axis);
  Tensor y = at::empty_like(from);
  if (x.numel() == 0) return y;
  fake_quantize_lsq(dtype_of(x), *params, from.const_data_ptr(), y.mutable_data_ptr(),
                    device.stream());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_lsq_backward_cuda(
    const Tensor& grad_y, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis, double grad_factor) {
  check_float("x", x);
  check_same("grad_y", grad_y, x);
  const OnDevice device(x);
  const Tensor from = dense(x);
  const Tensor grad = laid_out_as(grad_y, from);
  const LsqChannels params(x, from, scale, zero_point, quant_min, quant_max, ch_axis);
  Tensor grad_x = at::empty_like(from);
  const auto like = at::TensorOptions(scale.device()).dtype(at::kFloat);
  if (x.numel() == 0) {
    return {grad_x, at::zeros_like(scale), at::zeros_like(zero_point, like)};
  }
  Tensor grad_scale = at::empty(scale.sizes(), like);
  Tensor grad_zero_point = at::empty(zero_point.sizes(), like);
  const Tensor scratch = at::empty({kLsqScratch}, like.dtype(at::kDouble));
  fake_quantize_lsq_backward(
      dtype_of(x), *params, grad.const_data_ptr(), from.const_data_ptr(), grad_x.mutable_data_ptr(),
      grad_factor, scratch.mutable_data_ptr<double>(), grad_scale.mutable_data_ptr<float>(),
      grad_zero_point.mutable_data_ptr<float>(), device.stream());
  return {grad_x, grad_scale, grad_zero_point};
}

}  // namespace divqat::cuda
