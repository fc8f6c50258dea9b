// divergence_loss and its backward: from tensors to the launchers of divergence_loss.cu.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../divergence_loss_checks.h"
#include "launchers.h"
#include "ops.h"
#include "ops_common.h"

namespace divqat::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor> divergence_loss_cuda(
    const Tensor& logits, const Tensor& teacher_logits, const Tensor& target, const Tensor& weight,
    double temperature, std::string_view direction, std::string_view classes,
    std::optional<double> bound, bool guard, double label_smoothing, int64_t ignore_index) {
  check_loss(logits, teacher_logits, target, weight);
  TORCH_CHECK_VALUE(logits.size(1) < 1 << 30, "logits: wanted fewer than 2^30 classes, got ",
                    logits.size(1));
  LossOptions options;
  options.temperature = temperature;
  options.direction = Direction(choice("direction", direction, kDirections));
  options.non_label = choice("classes", classes, kClasses) == 1;
  options.guard = guard;
  options.bounded = bound.has_value();
  options.bound = bound.value_or(0.0);
  options.label_smoothing = label_smoothing;
  options.ignore_index = ignore_index;

  const OnDevice device(logits);
  const Tensor z = logits.contiguous(), t = teacher_logits.contiguous(), y = target.contiguous();
  const auto scalar = z.options().dtype(z.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Tensor loss = at::empty({}, scalar), ce = at::empty({}, scalar);
  Tensor divergence = at::empty({}, scalar), grad_logits = at::empty_like(z);
  const Tensor scratch = at::empty({kLossScratch}, z.options().dtype(at::kDouble));

  LossInputs in;
  in.logits = z.const_data_ptr();
  in.teacher_logits = t.const_data_ptr();
  in.target = y.const_data_ptr<int64_t>();
  in.weight = weight.const_data_ptr<float>();
  in.rows = z.size(0);
  in.classes = z.size(1);
  LossOutputs out;
  out.loss = loss.mutable_data_ptr();
  out.ce = ce.mutable_data_ptr();
  out.divergence = divergence.mutable_data_ptr();
  out.grad_logits = grad_logits.mutable_data_ptr();
  divergence_loss(dtype_of(z), in, options, out, scratch.mutable_data_ptr<double>(),
                  device.stream());
  return {loss, ce, divergence, laid_out_as(grad_logits, at::empty_like(logits))};
}

void divergence_loss_backward_cuda(const Tensor& grad_logits, const Tensor& grad_output) {
  check_loss_backward(grad_logits, grad_output);
  TORCH_CHECK_VALUE(grad_logits.is_non_overlapping_and_dense(),
                    "grad_logits: wanted a dense tensor, got strides ", grad_logits.strides());
  if (grad_logits.numel() == 0) return;
  const OnDevice device(grad_logits);
  divergence_loss_backward(dtype_of(grad_logits), grad_logits.mutable_data_ptr(),
                           grad_output.const_data_ptr(), grad_logits.numel(), device.stream());
}

}  // namespace divqat::cuda
