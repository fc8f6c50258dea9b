// fake_quantize_weights and its backward on the CPU: one parallel loop over the rows of all
// weights. A row is in the cache when it is read again.
#include <cstring>

#include "../qparams.h"
#include "fake_quantize_common.h"
#include "fake_quantize_weights_plan.h"
#include "min_max.h"
#include "ops.h"

namespace divqat {
namespace {

// Outputs of more bytes than this are written with non-temporal stores: they would be evicted
// before they are read, and the stores need not read the cache lines first.
constexpr size_t kCacheBytes = 32 << 20;

// grad is undefined in the forward.
struct Weight {
  Tensor from, grad, out;
  Channels channels;
};

// n elements with one scale: the forward, or the backward if grad is given.
template <class Kernels, class T>
void quantize_row(const Kernels& kernels, const T* from, const T* grad, T* out, int64_t n,
                  int64_t quant_min, int64_t quant_max, bool stream) {
  float low, high;
  kernels.min_max(from, n, &low, &high);
  const float scale = symmetric_scale(low, high, int32_t(quant_min), int32_t(quant_max));
  const float inv_scale = 1.0f / scale, zero_point = 0.0f;
  const QuantizeParams params{&scale,           &inv_scale,       &zero_point, 1,     n,
                              float(quant_min), float(quant_max), false,       stream};
  if (!grad) {
    kernels.fake_quantize(from, out, nullptr, 0, n, params, QuantizeMode::kPropagateNan);
  } else if (sizeof(T) < 8 && rintf(low * inv_scale) >= params.quant_min &&
             rintf(high * inv_scale) <= params.quant_max) {
    // Rounding is monotonic: if minimum and maximum are in range, so is the row. Not for float64,
    // whose minimum and maximum are rounded to float32, which may decide near a tie.
    stream ? kernels.copy(grad, out, n) : void(std::memcpy(out, grad, size_t(n) * sizeof(T)));
  } else {
    kernels.clipped_grad(from, grad, out, n, params);
  }
}

// A weight with one scale, or with rows that are not contiguous: all threads work on it.
void quantize_weight(const Weight& w, int64_t quant_min, int64_t quant_max, bool per_tensor) {
  std::vector<float> range(size_t(2 * w.channels.count)), scale(size_t(w.channels.count));
  float *low = range.data(), *high = low + w.channels.count;
  min_max_tensor(w.from, w.channels, low, high);
  for (size_t c = 0; c < scale.size(); ++c) {
    scale[c] = symmetric_scale(low[c], high[c], int32_t(quant_min), int32_t(quant_max));
  }
  const ChannelTables tables(
      scale.data(), [](int64_t) { return 0.0f; }, w.channels, quant_min, quant_max, per_tensor);
  if (!w.grad.defined()) {
    return quantize_tensor(w.from, w.out, Tensor(), *tables, QuantizeMode::kPropagateNan);
  }
  const Tensor mask = empty_mask(w.from);
  quantize_tensor(w.from, w.out, mask, *tables, QuantizeMode::kPropagateNan);
  masked_grad_tensor(w.grad, mask, w.out);
}

std::vector<Tensor> run(const std::vector<Weight>& weights, int64_t quant_min, int64_t quant_max,
                        bool per_tensor) {
  std::vector<WeightShape> shapes;
  std::vector<Tensor> outputs;
  size_t bytes = 0;
  for (const Weight& w : weights) {
    outputs.push_back(w.out);
    bytes += w.out.nbytes();
    const int64_t rows = w.channels.count, columns = w.channels.inner;
    const bool contiguous = !per_tensor && rows * columns == w.from.numel();
    shapes.push_back(contiguous ? WeightShape{rows, columns} : WeightShape{0, 0});
    if (!contiguous && w.from.numel()) quantize_weight(w, quant_min, quant_max, per_tensor);
  }
  const bool stream = bytes > kCacheBytes;
  const WeightsPlan plan(shapes, kGrain / 4);
  at::parallel_for(0, int64_t(plan.tasks().size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const WeightTask& task = plan.tasks()[size_t(t)];
      const Weight& w = weights[size_t(task.weight)];
      const int64_t n = w.channels.inner;
      with_kernels(w.from.scalar_type(), [&](const auto& kernels, auto* type) {
        const auto* from = data(w.from, type);
        const auto* grad = w.grad.defined() ? data(w.grad, type) : nullptr;
        auto* out = mutable_data(w.out, type);
        for (int64_t i = task.row_begin * n; i < task.row_end * n; i += n) {
          quantize_row(kernels, from + i, grad ? grad + i : nullptr, out + i, n, quant_min,
                       quant_max, stream);
        }
      });
    }
  });
  return outputs;
}

Weight weight_of(const Tensor& w, std::optional<int64_t> ch_axis) {
  check_float("weights", w);
  const Tensor from = dense(w);
  return {from, Tensor(), at::empty_like(from), channels_of(from, ch_axis)};
}

}  // namespace

std::vector<Tensor> fake_quantize_weights_cpu(at::TensorList weights, int64_t quant_min,
                                              int64_t quant_max, std::optional<int64_t> ch_axis) {
  check_range(quant_min, quant_max);
  std::vector<Weight> list;
  for (const Tensor& w : weights) list.push_back(weight_of(w, ch_axis));
  return run(list, quant_min, quant_max, !ch_axis);
}

std::vector<Tensor> fake_quantize_weights_backward_cpu(at::TensorList grads,
                                                       at::TensorList weights, int64_t quant_min,
                                                       int64_t quant_max,
                                                       std::optional<int64_t> ch_axis) {
  check_range(quant_min, quant_max);
  TORCH_CHECK_VALUE(grads.size() == weights.size(), "grads: wanted ", weights.size(),
                    " like weights, got ", grads.size());
  std::vector<Weight> list;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_same("grads", grads[i], weights[i]);
    list.push_back(weight_of(weights[i], ch_axis));
    list.back().grad = laid_out_as(grads[i], list.back().from);
  }
  return run(list, quant_min, quant_max, !ch_axis);
}

}  // namespace divqat
