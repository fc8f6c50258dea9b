"""Moving-average observer and fake quantization in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from divqat.ops import reference
from divqat.ops._autograd import recomputing
from divqat.ops._check import (
    FLOAT32,
    check_axis,
    check_buffers,
    check_choice,
    check_flags,
    check_float,
    check_number,
    check_overwritable,
    check_qparam,
    check_range,
    check_untransformed,
    check_values,
    readable,
)
from divqat.ops._library import op, register
from divqat.ops._mask import pack_mask, with_packed_mask
from divqat.ops.fake_quantize import FakeQuantize, fake_output_and_mask


def fake_quantize_observed(
    x: Tensor,  # any shape
    running_min: Tensor,  # [] or [C], updated in place
    running_max: Tensor,  # [] or [C], updated in place
    scale: Tensor,  # [] or [C], updated in place
    zero_point: Tensor,  # [] or [C], updated in place
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = None,
    *,
    averaging_constant: float = 0.01,
    symmetric: bool = False,
    observe: bool = True,
    fake_quant: bool = True,
    mode: str = "exact",
    relu: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Update the range of ``x``, derive scale and zero point, and fake-quantize ``x`` with them.

    running ← running + averaging_constant · (batch − running); a running value of ±Inf (the
    initial one) is replaced by the first batch (Jacob et al. 2018, §3.1). A batch with NaN or Inf
    does not change the buffers; NaN stays NaN in the output.

    When ``torch.utils.checkpoint`` recomputes the forward, ``x`` is not observed again: the buffers
    have the range of the first run, unless another batch was observed in between. With ``mode=
    "delayed"``, which would need the range before the first run, this raises an error.

    Args:
        x: float32, float64, bfloat16 or float16, any shape and strides.
        running_min: float32 [] or [C], initially +Inf.
        running_max: float32 [] or [C], initially −Inf.
        scale: float32 [] or [C].
        zero_point: int32 [] or [C].
        quant_min, quant_max: smallest and largest code, inclusive.
        ch_axis: the channel axis of ``x``; None for one range.
        averaging_constant: weight of the new batch, in (0, 1].
        symmetric: fix the zero point at 0 (the middle code of an unsigned range).
        observe: False changes no buffer (the same as ``mode="frozen"``).
        fake_quant: False only observes and returns ``x`` unchanged (after ReLU, if ``relu``).
        mode: ``"exact"`` quantizes with the range that includes this batch; ``"delayed"`` with
            the range before it, so that one pass over ``x`` is enough (the buffers must have seen
            a batch); ``"frozen"`` does not observe.
        relu: apply ReLU before both; its mask is merged into the one saved bit per element.
        inplace: overwrite ``x`` with the result. Use it if nothing else reads ``x`` and no backward
            needs it, for example after a BatchNorm, which saves its input. If autograd does need
            ``x``, the backward raises an error. Ignored under ``torch.compile``, which manages
            memory itself, and with ``fake_quant=False``.

    Returns:
        A tensor like ``x``, or ``x``. The gradient is that of :func:`fake_quantize` (times ReLU's).

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError: see :func:`fake_quantize`. Also
            ValueError if ``x`` is to be overwritten but is not dense, a leaf that requires grad or
            a view of one, or if values of a buffer share memory. Nothing has been written then.
        RuntimeError: ``mode="delayed"`` in a forward that is recomputed.
    """
    check_float("x", x)
    check_range(quant_min, quant_max)
    axis = check_axis(x, ch_axis)
    for name, buffer in (
        ("running_min", running_min),
        ("running_max", running_max),
        ("scale", scale),
    ):
        check_qparam(name, buffer, x, axis, (torch.float32,))
    check_qparam("zero_point", zero_point, x, axis, (torch.int32,))
    check_buffers(
        running_min=running_min, running_max=running_max, scale=scale, zero_point=zero_point
    )
    check_choice("mode", mode, ("exact", "delayed", "frozen"))
    check_flags(
        symmetric=symmetric, observe=observe, fake_quant=fake_quant, relu=relu, inplace=inplace
    )
    check_number("averaging_constant", averaging_constant)
    if not 0 < averaging_constant <= 1:
        raise ValueError(f"averaging_constant: wanted a value in (0, 1], got {averaging_constant}")

    buffers = (running_min, running_max, scale, zero_point)
    options = (quant_min, quant_max, axis, averaging_constant, symmetric)
    mode = _effective_mode(mode if observe else "frozen", fake_quant)
    if not fake_quant:
        if mode != "frozen" and x.numel():
            check_untransformed("fake_quantize_observed")
            op("observe")(x.detach(), *buffers, *options, relu)
        return x.relu() if relu else x
    check_untransformed("fake_quantize_observed")
    if mode == "frozen" and x.numel() and readable(scale) and readable(zero_point):
        check_values("scale", scale, FLOAT32.tiny, FLOAT32.max)
        check_values("zero_point", zero_point, quant_min, quant_max)
    inplace = inplace and not torch.compiler.is_compiling()
    if inplace:
        check_overwritable("x", x)
    return FakeQuantizeObserved.apply(x, inplace, *buffers, *options, mode, relu)


def _effective_mode(mode: str, fake_quant: bool) -> str:
    """``mode``, or ``"frozen"`` in a recomputed forward, which must not observe again."""
    if mode == "frozen" or not recomputing():
        return mode
    if fake_quant and mode == "delayed":
        raise RuntimeError(
            "mode: wanted 'exact' where torch.utils.checkpoint recomputes a forward, got 'delayed'"
        )
    return "frozen"


class FakeQuantizeObserved(FakeQuantize):
    """The backward is that of FakeQuantize; the forward calls the op that also observes."""

    @staticmethod
    def forward(ctx, x: Tensor, inplace: bool, *args) -> Tensor:  # type: ignore[no-untyped-def]
        if x.numel() == 0:
            y, mask = fake_output_and_mask(x)
        elif inplace:
            mask = op("fake_quantize_observed_inplace")(x, *args)
        else:
            y, mask = op("fake_quantize_observed")(x, *args)
        if inplace:
            y = x
            ctx.mark_dirty(x)
        ctx.save_for_backward(mask)
        ctx.stride = y.stride()
        ctx.inputs = 2 + len(args)
        return y


register("observe", reference.observe_ref, lambda *args: None)
register(
    "fake_quantize_observed",
    reference.fake_quantize_observed_ref,
    fake_output_and_mask,
    with_packed_mask(reference.fake_quantize_observed_ref),
)
register(
    "fake_quantize_observed_inplace",
    reference.fake_quantize_observed_inplace_ref,
    lambda x, *args: fake_output_and_mask(x)[1],
    lambda *args: pack_mask(reference.fake_quantize_observed_inplace_ref(*args)),
)
