// fake_quantize_lsq and its backward on the CPU.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include "../qparams.h"
#include "fake_quantize_common.h"
#include "ops.h"

namespace divqat {
namespace {

// max(scale, kMinScale)
Tensor positive(const Tensor& scale) {
  Tensor raised = scale.clone(at::MemoryFormat::Contiguous);
  float* values = raised.mutable_data_ptr<float>();
  for (int64_t i = 0; i < raised.numel(); ++i) values[i] = at_least(values[i], kMinScale);
  return raised;
}

// The zero point, float or int, rounded half to even and clamped to the range.
Tensor round_zero_point(const Tensor& zero_point, int64_t quant_min, int64_t quant_max) {
  Tensor rounded = at::empty_like(zero_point, zero_point.options().dtype(at::kFloat),
                                  at::MemoryFormat::Contiguous);
  rounded.copy_(zero_point);
  float* values = rounded.mutable_data_ptr<float>();
  for (int64_t i = 0; i < rounded.numel(); ++i) {
    values[i] = at_most(at_least(rintf(values[i]), float(quant_min)), float(quant_max));
  }
  return rounded;
}

void check_lsq(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
               int64_t quant_max, int64_t count) {
  check_range(quant_min, quant_max);
  check_qparam("scale", scale, x, count, at::kFloat);
  check_qparam("zero_point", zero_point, x, count,
               zero_point.scalar_type() == at::kInt ? at::kInt : at::kFloat);
}

}  // namespace

Tensor fake_quantize_lsq_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                             int64_t quant_min, int64_t quant_max,
                             std::optional<int64_t> ch_axis) {
  check_float("x", x);
  const Tensor from = dense(x);
  const Channels channels = channels_of(from, ch_axis);
  check_lsq(x, scale, zero_point, quant_min, quant_max, channels.count);
  Tensor y = at::empty_like(from);
  if (x.numel() == 0) return y;
  const Tensor scales = positive(scale);
  const Tensor zero_points = round_zero_point(zero_point, quant_min, quant_max);
  const float* zero = zero_points.const_data_ptr<float>();
  const ChannelTables tables(
      scales.const_data_ptr<float>(), [&](int64_t c) { return zero[c]; }, channels, quant_min,
      quant_max, !ch_axis);
  quantize_tensor(from, y, Tensor(), *tables, QuantizeMode::kPropagateNan);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_lsq_backward_cpu(
    const Tensor& grad_y, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis, double grad_factor) {
  check_float("x", x);
  check_same("grad_y", grad_y, x);
  const Tensor from = dense(x);
  const Tensor grad = laid_out_as(grad_y, from);
  const Channels channels = channels_of(from, ch_axis);
  check_lsq(x, scale, zero_point, quant_min, quant_max, channels.count);
  Tensor grad_x = at::empty_like(from);
  Tensor grad_scale = at::zeros_like(scale);
  Tensor grad_zero_point = at::zeros_like(zero_point, zero_point.options().dtype(at::kFloat));
  if (x.numel() == 0) return {grad_x, grad_scale, grad_zero_point};

  const Tensor scales = positive(scale);
  const Tensor zero_points = round_zero_point(zero_point, quant_min, quant_max);
  const float* zero = zero_points.const_data_ptr<float>();
  const ChannelTables tables(
      scales.const_data_ptr<float>(), [&](int64_t c) { return zero[c]; }, channels, quant_min,
      quant_max, !ch_axis);

  // Partial sums over blocks of a fixed size, added in order: the same bits for any number of
  // threads.
  const bool columns = channels.inner == 1 && channels.count > 1;
  const int64_t n = from.numel();
  const int64_t block = columns ? channels.count * std::max<int64_t>(1, kGrain / channels.count)
                        : channels.count == 1 ? kGrain
                                              : channels.inner;
  const int64_t blocks = (n + block - 1) / block;
  const int64_t width = columns ? 2 * channels.count : 2;
  std::vector<double> partial(size_t(blocks * width));
  with_kernels(x.scalar_type(), [&](const auto& kernels, auto* type) {
    const auto* gradient = data(grad, type);
    const auto* values = data(from, type);
    auto* out = mutable_data(grad_x, type);
    const int64_t grain = std::max<int64_t>(1, kGrain / block);
    at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t i = b * block, length = std::min(block, n - i);
        double* sums = &partial[size_t(b * width)];
        if (columns) {
          kernels.lsq_backward_columns(gradient + i, values + i, out + i, length / channels.count,
                                       *tables, sums);
        } else {
          kernels.lsq_backward(gradient + i, values + i, out + i, length, *tables,
                               b % channels.count, sums);
        }
      }
    });
  });

  std::vector<double> sums(size_t(2 * channels.count));
  for (size_t i = 0; i < partial.size(); ++i) sums[i % sums.size()] += partial[i];
  const Tensor given = scale.contiguous();
  const Tensor scale_out = grad_scale.contiguous(), zero_out = grad_zero_point.contiguous();
  for (int64_t c = 0; c < channels.count; ++c) {
    scale_out.mutable_data_ptr<float>()[c] = lsq_scale_grad(
        float(sums[size_t(2 * c)] * grad_factor), given.const_data_ptr<float>()[c]);
    // dy/dzero_point = −scale outside, 0 inside
    zero_out.mutable_data_ptr<float>()[c] =
        float(-sums[size_t(2 * c + 1)] * (*tables).scale[c] * grad_factor);
  }
  if (zero_point.scalar_type() == at::kInt) zero_out.zero_();
  return {grad_x, grad_scale.copy_(scale_out), grad_zero_point.copy_(zero_out)};
}

}  // namespace divqat
