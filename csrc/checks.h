// Layouts, channels and argument checks for the tensor side of every op. An error names the
// argument, what was wanted and what came.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <optional>

namespace divqat {

using at::Tensor;

// A copy of value with the strides of `like`, which is dense, or value itself.
inline Tensor laid_out_as(const Tensor& value, const Tensor& like) {
  if (value.strides() == like.strides()) return value;
  const at::NoGradGuard no_grad;
  return at::empty_like(like, value.options()).copy_(value);
}

// x itself if it is dense, in any order of its axes; else a dense copy with the strides of
// empty_like(x).
inline Tensor dense(const Tensor& x) {
  return x.is_non_overlapping_and_dense() ? x : laid_out_as(x, at::empty_like(x));
}

// An op that overwrites x needs it dense.
inline void check_dense(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.is_non_overlapping_and_dense(), name,
                    ": wanted dense memory to write over, got ", x.sizes(), " with strides ",
                    x.strides());
}

// The element at memory offset i of a dense tensor belongs to channel (i / inner) % count.
struct Channels {
  int64_t count = 1;
  int64_t inner = 1;
};

inline Channels channels_of(const Tensor& dense_x, std::optional<int64_t> ch_axis) {
  if (!ch_axis) return {1, dense_x.numel()};
  TORCH_CHECK_INDEX(*ch_axis >= -dense_x.dim() && *ch_axis < dense_x.dim(),
                    "ch_axis: wanted an axis of x with ", dense_x.dim(), " dims, got ", *ch_axis);
  const int64_t axis = *ch_axis < 0 ? *ch_axis + dense_x.dim() : *ch_axis;
  const int64_t count = dense_x.size(axis);
  // The stride of an axis of length 1 is arbitrary.
  return {count, count == 1 ? dense_x.numel() : dense_x.stride(axis)};
}

inline void check_float(const char* name, const Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
                       dtype == at::kHalf,
                   name, ": wanted float32, float64, bfloat16 or float16, got ", dtype);
}

inline void check_range(int64_t quant_min, int64_t quant_max) {
  TORCH_CHECK_VALUE(quant_min < quant_max && quant_min >= -(1 << 23) && quant_max <= 1 << 23,
                    "quant_min, quant_max: wanted quant_min < quant_max of at most 24 bits, got ",
                    quant_min, ", ", quant_max);
}

inline void check_device(const char* name, const Tensor& value, const Tensor& x) {
  TORCH_CHECK_VALUE(value.device() == x.device(), name, ": wanted it on ", x.device(),
                    " like x, got ", value.device());
}

// A scale, zero point or running minimum or maximum: `count` values on x's device.
inline void check_qparam(const char* name, const Tensor& value, const Tensor& x, int64_t count,
                         at::ScalarType dtype) {
  check_device(name, value, x);
  TORCH_CHECK_TYPE(value.scalar_type() == dtype, name, ": wanted ", dtype, ", got ",
                   value.scalar_type());
  TORCH_CHECK_VALUE(value.numel() == count && value.dim() <= 1, name, ": wanted ", count,
                    " value(s) beside x ", x.sizes(), ", got ", value.sizes());
}

inline void check_same(const char* name, const Tensor& value, const Tensor& x) {
  check_device(name, value, x);
  TORCH_CHECK_TYPE(value.scalar_type() == x.scalar_type(), name, ": wanted ", x.scalar_type(),
                   ", got ", value.scalar_type());
  TORCH_CHECK_VALUE(value.sizes() == x.sizes(), name, ": wanted ", x.sizes(), ", got ",
                    value.sizes());
}

inline int64_t mask_bytes(int64_t elements) { return (elements + 7) / 8; }

inline Tensor empty_mask(const Tensor& x) {
  return at::empty({mask_bytes(x.numel())}, x.options().dtype(at::kByte));
}

inline void check_mask(const Tensor& mask, const Tensor& grad_y) {
  check_device("mask", mask, grad_y);
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kByte, "mask: wanted uint8, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.is_contiguous() && mask.numel() == mask_bytes(grad_y.numel()),
                    "mask: wanted ", mask_bytes(grad_y.numel()), " contiguous bytes, got ",
                    mask.sizes());
  TORCH_CHECK_VALUE(grad_y.is_non_overlapping_and_dense(),
                    "grad_y: wanted a dense tensor in the mask's memory order, got strides ",
                    grad_y.strides());
}

}  // namespace divqat
