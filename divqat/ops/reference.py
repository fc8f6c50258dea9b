"""The fake-quantization formulas in plain PyTorch, which are the fallback on every device.

One rule for all backends:

* q = clamp(nearbyint(x · (1/scale)) + zero_point, quant_min, quant_max): round half to even, after
  multiplication by the reciprocal and before the zero point is added; y = (q − zero_point) · scale.
* The gradient mask is taken on the *rounded* value, inclusive at both ends.
* bfloat16 and float16 are computed in float32 and rounded once at the store; float64 stays float64.
* NaN stays NaN with gradient 0; ±Inf saturates with gradient 0.

Masks are bool here, one element per element of x; the ops pack them (``_mask.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from divqat.ops._snapshot import snapshot
from divqat.ops.qparams import EPS, choose_qparams, lsq_scale_grad, moved, positive


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def along(value: Tensor, x: Tensor, ch_axis: int | None) -> Tensor:
    """Shape a per-channel value [C] so that it broadcasts along ``ch_axis`` of ``x``."""
    if ch_axis is None:
        return value.reshape(())
    shape = [1] * x.dim()
    shape[ch_axis] = -1
    return value.view(shape)


def _other_dims(x: Tensor, ch_axis: int | None) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != ch_axis]


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
) -> tuple[Tensor, Tensor]:
    """The dequantized value and whether its code was in range, both dense.

    In place wherever possible: new memory costs more than arithmetic.
    """
    dtype = compute_dtype(x.dtype)
    scale, zero_point = along(scale, x, ch_axis), along(zero_point, x, ch_axis)
    # q = nearbyint(x · (1/scale)) + zero_point
    rounded = (x.to(dtype) * scale.reciprocal().to(dtype)).round_().add_(zero_point)
    q = rounded.clamp(quant_min, quant_max)
    mask = rounded == q
    # y = (q − zero_point) · scale. ATen multiplies float64 codes in float32 per tensor and in
    # float64 per channel; doing the same keeps both bit-equal.
    level = q.sub_(zero_point)
    if dtype == torch.float64 and ch_axis is None:
        return (level.float() * scale).double(), mask
    return level.mul_(scale.to(dtype)), mask


def fake_quantize_ref(
    x: Tensor,  # any shape
    scale: Tensor,  # [] or [C]
    zero_point: Tensor,  # [] or [C]
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
    propagate_nan: bool,
) -> tuple[Tensor, Tensor]:
    """Quantize and dequantize ``x``; returns y and the in-range mask, with the strides of ``x``."""
    y, mask = _quantize(x, scale, zero_point, quant_min, quant_max, ch_axis)
    if not propagate_nan:
        # The lowest level, computed by the same arithmetic.
        lowest = torch.full_like(y, -torch.inf)
        lowest, _ = _quantize(lowest, scale, zero_point, quant_min, quant_max, ch_axis)
        y = torch.where(x.isnan(), lowest, y)
    return _like(x, y), _like(x, mask)


def fake_quantize_backward_ref(grad_y: Tensor, mask: Tensor) -> Tensor:
    """grad_x = grad_y where the rounded value was in range, else 0; mask is bool like grad_y."""
    return _like(grad_y, torch.where(mask, grad_y, 0.0))


def _like(x: Tensor, value: Tensor) -> Tensor:
    """``value`` with the dense strides of ``empty_like(x)``; floats are rounded to x's dtype."""
    dtype = x.dtype if value.is_floating_point() else value.dtype
    out = torch.empty_like(x, dtype=dtype)
    if value.stride() == out.stride() and value.dtype == dtype:
        return value
    return out.copy_(value)


def observe_ref(
    x: Tensor,
    running_min: Tensor,  # [] or [C], updated in place, as are the next three
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
    averaging_constant: float,
    symmetric: bool,
    relu: bool,
) -> None:
    """Moving average of min and max, then scale and zero point, without a host sync.

    running ← running + averaging_constant · (batch − running), initially the first batch. A channel
    whose batch has NaN or Inf is not observed: one bad batch must not spoil the range permanently.
    """
    if x.numel() == 0:
        return
    # a per-tensor scale is [] or [1]
    buffers = (b.view(-1) for b in (running_min, running_max, scale, zero_point))
    running_min, running_max, scale, zero_point = buffers
    if ch_axis is None:
        low, high = torch.aminmax(x)
    else:
        dims = _other_dims(x, ch_axis)
        low, high = (torch.amin(x, dims), torch.amax(x, dims)) if dims else (x, x)
    low, high = low.float().view_as(running_min), high.float().view_as(running_max)
    if relu:
        low, high = low.clamp(min=0.0), high.clamp(min=0.0)
    usable = low.isfinite() & high.isfinite()
    for running, batch in ((running_min, low), (running_max, high)):
        running.copy_(torch.where(usable, moved(running, batch, averaging_constant), running))
    seen = running_min.isfinite()
    new_scale, new_zero_point = choose_qparams(
        running_min, running_max, quant_min, quant_max, symmetric
    )
    scale.copy_(torch.where(seen, new_scale, scale))
    zero_point.copy_(torch.where(seen, new_zero_point, zero_point))


def fake_quantize_observed_ref(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
    averaging_constant: float,
    symmetric: bool,
    mode: str,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Observe, quantize and dequantize: exact observes first, delayed afterwards, frozen never."""
    buffers = (running_min, running_max, scale, zero_point)
    observe = (*buffers, quant_min, quant_max, ch_axis, averaging_constant, symmetric, relu)
    if mode == "exact":
        observe_ref(x, *observe)
    if mode != "frozen":
        scale, zero_point = snapshot(scale, zero_point)
    positive = x.relu() if relu else x
    y, mask = _quantize(positive, scale, zero_point, quant_min, quant_max, ch_axis)
    if relu:
        mask = mask & (x > 0)
    if mode == "delayed":
        observe_ref(x, *observe)
    return _like(x, y), _like(x, mask)


def fake_quantize_observed_inplace_ref(x: Tensor, *args: Any) -> Tensor:
    """The same, but x is overwritten with y; returns the mask."""
    y, mask = fake_quantize_observed_ref(x, *args)
    x.copy_(y)
    return mask


def fake_quantize_lsq_ref(
    x: Tensor,
    scale: Tensor,  # [] or [C]
    zero_point: Tensor,  # [] or [C], float or int; rounded and clamped to the range
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
) -> Tensor:
    """Quantize and dequantize with a learned scale and offset."""
    zero_point = zero_point.round().clamp(quant_min, quant_max)
    return _like(x, _quantize(x, positive(scale), zero_point, quant_min, quant_max, ch_axis)[0])


def fake_quantize_lsq_backward_ref(
    grad_y: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None,
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and zero_point (Esser et al. 2020, eq. 3; Jain et al. 2020 for the
    offset).

    It uses only differentiable ops, so that it also serves double backward.
    """
    dtype = compute_dtype(x.dtype)
    used = positive(scale)
    s, z = along(used.to(dtype), x, ch_axis), along(zero_point.to(dtype), x, ch_axis)
    z = z.round().clamp(quant_min, quant_max)
    # the same reciprocal as in the forward
    u = x.to(dtype) * along(used.reciprocal().to(dtype), x, ch_axis)
    rounded = u.round() + z
    q = rounded.clamp(quant_min, quant_max)
    inside = rounded == q
    grad = grad_y.to(dtype)
    # dy/ds = nearbyint(x/s) − x/s inside, quant_min − z or quant_max − z outside
    grad_s = grad * (q - z - torch.where(inside, u, 0.0)) * grad_factor
    # dy/dz = 0 inside, −s outside
    grad_z = torch.where(inside, 0.0, -grad) * s * grad_factor
    dims = _other_dims(x, ch_axis)

    def total(value: Tensor, like: Tensor) -> Tensor:
        summed = value.sum(dims) if dims else value
        return summed.reshape(like.shape).to(like.dtype)

    grad_x = torch.where(inside, grad, 0.0).to(x.dtype)
    grad_zero_point = (
        total(grad_z, zero_point)
        if zero_point.is_floating_point()
        else torch.zeros_like(zero_point, dtype=torch.float32)
    )
    return grad_x, lsq_scale_grad(total(grad_s, scale), scale), grad_zero_point


def weight_scale(w: Tensor, quant_min: int, quant_max: int, ch_axis: int | None) -> Tensor:
    """Symmetric scale [C] (or []) from the largest magnitude of each row; float32."""
    if w.numel() == 0:
        return w.new_full([] if ch_axis is None else [w.shape[ch_axis]], EPS, dtype=torch.float32)
    dims = _other_dims(w, ch_axis)
    amax = torch.amax(w.abs(), dims) if dims else w.abs()
    return choose_qparams(-amax, amax, quant_min, quant_max, symmetric=True)[0]


def fake_quantize_weights_ref(
    weights: list[Tensor], quant_min: int, quant_max: int, ch_axis: int | None
) -> list[Tensor]:
    """Quantize and dequantize every weight with the symmetric scale of each of its rows."""
    return [y for y, _ in _weights(weights, quant_min, quant_max, ch_axis)]


def fake_quantize_weights_backward_ref(
    grads: list[Tensor], weights: list[Tensor], quant_min: int, quant_max: int, ch_axis: int | None
) -> list[Tensor]:
    """Masked gradients; the mask is recomputed from the weights."""
    masks = [mask for _, mask in _weights(weights, quant_min, quant_max, ch_axis)]
    return [
        torch.where(mask, grad, torch.zeros_like(grad))
        for grad, mask in zip(grads, masks, strict=True)
    ]


def _weights(
    weights: list[Tensor], quant_min: int, quant_max: int, ch_axis: int | None
) -> list[tuple[Tensor, Tensor]]:
    outputs = []
    for w in weights:
        axis = None if ch_axis is None else ch_axis % w.dim()
        scale = weight_scale(w, quant_min, quant_max, axis)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        y, mask = _quantize(w, scale, zero_point, quant_min, quant_max, axis)
        outputs.append((_like(w, y), _like(w, mask)))
    return outputs
