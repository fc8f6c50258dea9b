// fake_quantize_observed on the CPU.
#include "observer.h"
#include "ops.h"

namespace divqat {
namespace {

// Writes y from a dense x and returns the mask. y may be x, as x is observed before y is written.
Tensor quantize_observed(const Tensor& x, const Tensor& y, const Tensor& running_min,
                         const Tensor& running_max, const Tensor& scale, const Tensor& zero_point,
                         std::optional<int64_t> ch_axis, const ObserverOptions& options,
                         std::string_view mode) {
  check_observer_mode(mode);
  Observer observer(x, running_min, running_max, scale, zero_point, channels_of(x, ch_axis),
                    options);
  Tensor mask = empty_mask(x);
  if (mode == "exact") observer.observe(x);
  const ChannelTables tables = observer.tables(!ch_axis);
  if (mode == "delayed") observer.observe(x);
  if (mode != "frozen") observer.write_back();
  if (x.numel() == 0) return mask;
  quantize_tensor(x, y, mask, *tables,
                  options.relu ? QuantizeMode::kRelu : QuantizeMode::kPropagateNan);
  return mask;
}

}  // namespace

std::tuple<Tensor, Tensor> fake_quantize_observed_cpu(
    const Tensor& x, const Tensor& running_min, const Tensor& running_max, const Tensor& scale,
    const Tensor& zero_point, int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis,
    double averaging_constant, bool symmetric, std::string_view mode, bool relu) {
  check_float("x", x);
  const Tensor from = dense(x);
  const Tensor y = at::empty_like(from);
  const auto options =
      observer_options(quant_min, quant_max, averaging_constant, symmetric, relu);
  return {y, quantize_observed(from, y, running_min, running_max, scale, zero_point, ch_axis,
                               options, mode)};
}

Tensor fake_quantize_observed_inplace_cpu(
    const Tensor& x, const Tensor& running_min, const Tensor& running_max, const Tensor& scale,
    const Tensor& zero_point, int64_t quant_min, int64_t quant_max, std::optional<int64_t> ch_axis,
    double averaging_constant, bool symmetric, std::string_view mode, bool relu) {
  check_float("x", x);
  check_dense("x", x);
  const auto options =
      observer_options(quant_min, quant_max, averaging_constant, symmetric, relu);
  return quantize_observed(x, x, running_min, running_max, scale, zero_point, ch_axis, options,
                           mode);
}

}  // namespace divqat
