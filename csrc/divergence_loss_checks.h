// Argument checks of divergence_loss, for every device, and its options by name.
#pragma once
#include <limits>
#include <string_view>

#include "checks.h"

namespace divqat {

inline void check_loss(const Tensor& logits, const Tensor& teacher_logits, const Tensor& target,
                       const Tensor& weight) {
  check_float("logits", logits);
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits: wanted [N, C], got ", logits.sizes());
  check_same("teacher_logits", teacher_logits, logits);
  check_device("target", target, logits);
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "target: wanted int64, got ",
                   target.scalar_type());
  TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == logits.size(0), "target: wanted [",
                    logits.size(0), "], got ", target.sizes());
  check_device("weight", weight, logits);
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat, "weight: wanted float32, got ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(weight.numel() == 1, "weight: wanted one value, got ", weight.sizes());
}

// The index of `value` among `choices`.
template <size_t N>
int choice(const char* name, std::string_view value, const std::string_view (&choices)[N]) {
  for (size_t i = 0; i < N; ++i) {
    if (value == choices[i]) return int(i);
  }
  std::string wanted;
  for (const auto known : choices) wanted += (wanted.empty() ? "" : ", ") + std::string(known);
  TORCH_CHECK_VALUE(false, name, ": wanted one of ", wanted, ", got ", value);
}

constexpr std::string_view kDirections[] = {"student_teacher", "teacher_student", "js"};
constexpr std::string_view kClasses[] = {"all", "non_label"};

inline void check_loss_backward(const Tensor& grad_logits, const Tensor& grad_output) {
  check_float("grad_logits", grad_logits);
  check_device("grad_output", grad_output, grad_logits);
  const auto wanted = grad_logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(grad_output.scalar_type() == wanted, "grad_output: wanted ", wanted, ", got ",
                   grad_output.scalar_type());
  TORCH_CHECK_VALUE(grad_output.numel() == 1, "grad_output: wanted one value, got ",
                    grad_output.sizes());
}

}  // namespace divqat
