// divergence_loss and its backward on the CPU.
#include <ATen/ops/empty.h>

#include <memory>

#include "../divergence_loss_checks.h"
#include "ops.h"
#include "parallel.h"

namespace divqat {

std::tuple<Tensor, Tensor, Tensor, Tensor> divergence_loss_cpu(
    const Tensor& logits, const Tensor& teacher_logits, const Tensor& target, const Tensor& weight,
    double temperature, std::string_view direction, std::string_view classes,
    std::optional<double> bound, bool guard, double label_smoothing, int64_t ignore_index) {
  check_loss(logits, teacher_logits, target, weight);
  const Tensor z = logits.contiguous(), t = teacher_logits.contiguous();
  const Tensor labels = target.contiguous();
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const int64_t n = z.size(0), c = z.size(1);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (label[i] == ignore_index) continue;
    TORCH_CHECK_INDEX(label[i] >= 0 && label[i] < c, "target: wanted a class in [0, ", c,
                      ") or ignore_index ", ignore_index, ", got ", label[i], " at ", i);
    ++count;
  }
  LossOptions options;
  options.direction = Direction(choice("direction", direction, kDirections));
  options.non_label = choice("classes", classes, kClasses) == 1;
  options.guard = guard;
  options.weight = double(*weight.const_data_ptr<float>());
  options.temperature = temperature;
  options.bound = bound.value_or(std::numeric_limits<double>::infinity());
  options.label_smoothing = label_smoothing;
  options.inv_count = 1.0 / double(count);

  Tensor grad = at::empty_like(z);
  // One value per row, summed in order afterwards: the same bits for any number of threads.
  std::vector<double> ce(size_t(n), 0.0), divergence(size_t(n), 0.0);
  with_kernels(z.scalar_type(), [&](const auto& kernels, auto* type) {
    const auto *student = data(z, type), *teacher = data(t, type);
    auto* out = mutable_data(grad, type);
    const int64_t grain = std::max<int64_t>(1, kGrain / 8 / std::max<int64_t>(c, 1));
    at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<double[]> scratch(new double[size_t(4 * c)]);
      for (int64_t i = begin; i < end; ++i) {
        if (label[i] == ignore_index) {
          std::fill_n(out + i * c, c, std::decay_t<decltype(*out)>{});
        } else {
          kernels.divergence_row(student + i * c, teacher + i * c, out + i * c, c, label[i],
                                 options, scratch.get(), &ce[size_t(i)], &divergence[size_t(i)]);
        }
      }
    });
  });

  double ce_sum = 0, divergence_sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    ce_sum += ce[size_t(i)];
    divergence_sum += divergence[size_t(i)];
  }
  const double mean_ce = ce_sum / double(count), mean_d = divergence_sum / double(count);
  // L = CE − λ T² D; without the term if λ = 0, even if D is infinite.
  const double penalty =
      options.weight == 0 ? 0.0 : options.weight * temperature * temperature * mean_d;
  const auto dtype = z.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto scalar = [&](double value) {
    const Tensor result = at::empty({}, z.options().dtype(dtype));
    if (dtype == at::kDouble) {
      *result.mutable_data_ptr<double>() = value;
    } else {
      *result.mutable_data_ptr<float>() = float(value);
    }
    return result;
  };
  return {scalar(mean_ce - penalty), scalar(mean_ce), scalar(mean_d),
          laid_out_as(grad, at::empty_like(logits))};
}

void divergence_loss_backward_cpu(const Tensor& grad_logits, const Tensor& grad_output) {
  check_loss_backward(grad_logits, grad_output);
  const bool is_one = grad_output.scalar_type() == at::kDouble
                          ? *grad_output.const_data_ptr<double>() == 1.0
                          : *grad_output.const_data_ptr<float>() == 1.0f;
  if (!is_one) grad_logits.mul_(grad_output);
}

}  // namespace divqat
