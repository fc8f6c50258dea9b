// The ops on CUDA, one per schema in divqat/ops/_library.py.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace divqat::cuda {

using at::Tensor;

std::tuple<Tensor, Tensor> fake_quantize_cuda(const Tensor& x, const Tensor& scale,
                                              const Tensor& zero_point, int64_t quant_min,
                                              int64_t quant_max, std::optional<int64_t> ch_axis,
                                              bool propagate_nan);
Tensor fake_quantize_backward_cuda(const Tensor& grad_y, const Tensor& mask);

void observe_cuda(const Tensor& x, const Tensor& running_min, const Tensor& running_max,
                  const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                  int64_t quant_max, std::optional<int64_t> ch_axis, double averaging_constant,
                  bool symmetric, bool relu);
std::tuple<Tensor, Tensor> fake_quantize_observed_cuda(
    const Tensor& x, const Tensor& running_min, const Tensor& running_max, const Tensor& scale,
    const Tensor& zero_point, int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis,
    double averaging_constant, bool symmetric, std::string_view mode, bool relu);
// Overwrites x, which is dense, with y; returns the mask.
Tensor fake_quantize_observed_inplace_cuda(
    const Tensor& x, const Tensor& running_min, const Tensor& running_max, const Tensor& scale,
    const Tensor& zero_point, int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis,
    double averaging_constant, bool symmetric, std::string_view mode, bool relu);

std::vector<Tensor> fake_quantize_weights_cuda(at::TensorList weights, int64_t quant_min,
                                               int64_t quant_max, std::optional<int64_t> ch_axis);
std::vector<Tensor> fake_quantize_weights_backward_cuda(at::TensorList grads,
                                                        at::TensorList weights, int64_t quant_min,
                                                        int64_t quant_max,
                                                        std::optional<int64_t> ch_axis);

Tensor fake_quantize_lsq_cuda(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                              int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis);
std::tuple<Tensor, Tensor, Tensor> fake_quantize_lsq_backward_cuda(
    const Tensor& grad_y, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis, double grad_factor);

std::tuple<Tensor, Tensor, Tensor, Tensor> divergence_loss_cuda(
    const Tensor& logits, const Tensor& teacher_logits, const Tensor& target, const Tensor& weight,
    double temperature, std::string_view direction, std::string_view classes,
    std::optional<double> bound, bool guard, double label_smoothing, int64_t ignore_index);
void divergence_loss_backward_cuda(const Tensor& grad_logits, const Tensor& grad_output);

}  // namespace divqat::cuda
