// observe and fake_quantize_observed on the CPU.
#include <limits>
#include <mutex>

#include "grid.h"
#include "ops.h"

namespace divqat {
namespace {

// NaN once there was one.
float lower(float a, float b) { return b < a || b != b ? b : a; }
float higher(float a, float b) { return b > a || b != b ? b : a; }

class Observer {
 public:
  Observer(const Tensor& x, const Tensor& running_min, const Tensor& running_max,
           const Tensor& scale, const Tensor& zero_point, Channels channels,
           const ObserverOptions& options)
      : channels_(channels),
        options_(options),
        running_min_(running_min),
        running_max_(running_max),
        scale_(scale),
        zero_point_(zero_point) {
    check_observer(x, running_min, running_max, scale, zero_point, channels.count);
  }

  void observe(const Tensor& dense_x) {
    if (dense_x.numel() == 0) return;
    c10::SmallVector<float, 16> range(size_t(2 * channels_.count));
    float *low = range.data(), *high = low + channels_.count;
    min_max_all(dense_x, channels_, low, high);
    for (int64_t c = 0; c < channels_.count; ++c) {
      observe_channel(low[c], high[c], options_, running_min_.data<float>() + c,
                      running_max_.data<float>() + c, scale_.data<float>() + c,
                      zero_point_.data<int32_t>() + c);
    }
  }

  // What was observed, into buffers that are not contiguous.
  void write_back() const {
    running_min_.write_back();
    running_max_.write_back();
    scale_.write_back();
    zero_point_.write_back();
  }

  // A copy of the scales and zero points of this moment.
  GridTables grid(bool per_tensor) const {
    const int32_t* zero = zero_point_.data<int32_t>();
    return GridTables(
        scale_.data<float>(), [&](int64_t c) { return float(zero[c]); }, channels_,
        options_.quant_min, options_.quant_max, per_tensor);
  }

 private:
  Channels channels_;
  ObserverOptions options_;
  InPlace running_min_, running_max_, scale_, zero_point_;
};

// y and the mask, which is returned, from a dense x. y may be x: all that is to be known of x is
// taken before.
Tensor quantize_observed(const Tensor& x, const Tensor& y, const Tensor& running_min,
                         const Tensor& running_max, const Tensor& scale, const Tensor& zero_point,
                         std::optional<int64_t> ch_axis, const ObserverOptions& options,
                         std::string_view mode) {
  check_observer_mode(mode);
  Observer observer(x, running_min, running_max, scale, zero_point, channels_of(x, ch_axis),
                    options);
  Tensor mask = empty_mask(x);
  if (mode == "exact") observer.observe(x);
  const GridTables grid = observer.grid(!ch_axis);
  if (mode == "delayed") observer.observe(x);
  if (mode != "frozen") observer.write_back();
  if (x.numel() == 0) return mask;
  quantize_all(x, y, mask, *grid, options.relu ? Rule::kRelu : Rule::kPropagateNan);
  return mask;
}

}  // namespace

// Minimum and maximum do not depend on the order, so threads merge theirs as they finish.
void min_max_all(const Tensor& x, Channels channels, float* low, float* high) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  std::fill_n(low, channels.count, infinity);
  std::fill_n(high, channels.count, -infinity);
  std::mutex mutex;
  with_kernels(x.scalar_type(), [&](const auto& kernels, auto* type) {
    const auto* from = data(x, type);
    if (channels.count == 1) {
      at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
        float least, most;
        kernels.min_max(from + begin, end - begin, &least, &most);
        const std::lock_guard<std::mutex> lock(mutex);
        *low = lower(*low, least);
        *high = higher(*high, most);
      });
      return;
    }
    // Rows of one element per channel, or runs of `inner` elements of one channel.
    const bool columns = channels.inner == 1;
    const int64_t unit = columns ? channels.count : channels.inner;
    const int64_t grain = std::max<int64_t>(1, kGrain / unit);
    at::parallel_for(0, x.numel() / unit, grain, [&](int64_t begin, int64_t end) {
      c10::SmallVector<float, 256> mine(size_t(2 * channels.count));
      float *least = mine.data(), *most = least + channels.count;
      if (columns) {
        kernels.min_max_columns(from + begin * unit, end - begin, channels.count, least, most);
      } else {
        std::fill_n(least, channels.count, infinity);
        std::fill_n(most, channels.count, -infinity);
        for (int64_t run = begin; run < end; ++run) {
          const int64_t c = run % channels.count;
          float run_low, run_high;
          kernels.min_max(from + run * unit, unit, &run_low, &run_high);
          least[c] = lower(least[c], run_low);
          most[c] = higher(most[c], run_high);
        }
      }
      const std::lock_guard<std::mutex> lock(mutex);
      for (int64_t c = 0; c < channels.count; ++c) {
        low[c] = lower(low[c], least[c]);
        high[c] = higher(high[c], most[c]);
      }
    });
  });
}

void observe_cpu(const Tensor& x, const Tensor& running_min, const Tensor& running_max,
                 const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                 int64_t quant_max, std::optional<int64_t> ch_axis, double averaging_constant,
                 bool symmetric, bool relu) {
  check_float("x", x);
  const Tensor from = dense(x);
  Observer observer(x, running_min, running_max, scale, zero_point, channels_of(from, ch_axis),
                    observer_options(quant_min, quant_max, averaging_constant, symmetric, relu));
  observer.observe(from);
  observer.write_back();
}

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
