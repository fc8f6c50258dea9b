// The ops on the CPU, one per schema in divqat/ops/_library.py.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace divqat {

using at::Tensor;

std::tuple<Tensor, Tensor> fake_quantize_cpu(const Tensor& x, const Tensor& scale,
                                             const Tensor& zero_point, int64_t quant_min,
                                             int64_t quant_max, std::optional<int64_t> ch_axis,
                                             bool propagate_nan);
Tensor fake_quantize_backward_cpu(const Tensor& grad_y, const Tensor& mask);

void observe_cpu(const Tensor& x, const Tensor& running_min, const Tensor& running_max,
                 const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                 int64_t quant_max, std::optional<int64_t> ch_axis, double averaging_constant,
                 bool symmetric, bool relu);
std::tuple<Tensor, Tensor> fake_quantize_observed_cpu(
    const Tensor& x, const Tensor& running_min, const Tensor& running_max, const Tensor& scale,
    const Tensor& zero_point, int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis,
    double averaging_constant, bool symmetric, std::string_view mode, bool relu);
// Overwrites x, which is dense, with y; returns the mask.
Tensor fake_quantize_observed_inplace_cpu(
    const Tensor& x, const Tensor& running_min, const Tensor& running_max, const Tensor& scale,
    const Tensor& zero_point, int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis,
    double averaging_constant, bool symmetric, std::string_view mode, bool relu);

Tensor fake_quantize_lsq_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                             int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis);
std::tuple<Tensor, Tensor, Tensor> fake_quantize_lsq_backward_cpu(
    const Tensor& grad_y, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis, double grad_factor);

std::vector<Tensor> fake_quantize_weights_cpu(at::TensorList weights, int64_t quant_min,
                                              int64_t quant_max, std::optional<int64_t> ch_axis);
std::vector<Tensor> fake_quantize_weights_backward_cpu(at::TensorList grads,
                                                       at::TensorList weights, int64_t quant_min,
                                                       int64_t quant_max,
                                                       std::optional<int64_t> ch_axis);

std::tuple<Tensor, Tensor, Tensor, Tensor> divergence_loss_cpu(
    const Tensor& logits, const Tensor& teacher_logits, const Tensor& target, const Tensor& weight,
    double temperature, std::string_view direction, std::string_view classes,
    std::optional<double> bound, bool guard, double label_smoothing, int64_t ignore_index);
void divergence_loss_backward_cpu(const Tensor& grad_logits, const Tensor& grad_output);

}  // namespace divqat
