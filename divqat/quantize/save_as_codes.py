"""Save fake-quantized activations for the backward pass as 8-bit codes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from divqat.nn.fake_quantize import FakeQuantize, LearnedStepFakeQuantize
from divqat.nn.spec import QuantSpec

Quantizer = FakeQuantize | LearnedStepFakeQuantize


@contextmanager
def save_as_codes(model: nn.Module) -> Iterator[None]:
    """A block whose forward passes save fake-quantized activations with one byte per element.

    ``with save_as_codes(model): loss = loss_fn(model(images), labels)``; the backward may come
    after the block. A layer saves its input for its backward. If the input is a fake-quantizer's
    output, or a view of it, it lies on a grid of at most 256 levels and is saved as one-byte codes
    with scale and zero point: a quarter of float32, half of bfloat16. Layers that read the same
    output share its codes. Gradients are the same, bit for bit: values, dtype and strides are
    restored exactly. It costs time: two passes over an activation to save it, and one or two for
    each layer that restores it.

    * Everything else is saved as usual: inputs of BatchNorm, outputs of max pooling, results of an
      autocast, outputs that are changed in place, activations with a scale per channel.
    * An activation with NaN, or an infinity of its dtype, is restored as NaN everywhere, so that
      the gradients become NaN, though not the same ones. This avoids a host sync.
    * ``torch.compile`` decides what it saves. Compiled parts of ``model`` are not changed.

    Like ``torch.autograd.graph.save_on_cpu`` this is a ``saved_tensors_hooks``, of which only the
    innermost is called: within ``torch.utils.checkpoint`` it has no effect.

    Args:
        model: a prepared model, or one built of the layers of :mod:`divqat.nn`.

    Raises:
        ValueError: ``model`` was made by ``torch.compile``.
    """
    if any("_orig_mod" in m._modules or m._compiled_call_impl for m in model.modules()):
        raise ValueError("model: wanted one that is not compiled, got one made by torch.compile")
    saver = _Saver()
    handles = [model.register_forward_pre_hook(saver.sweep)]
    for module in model.modules():
        if isinstance(module, Quantizer) and module.ch_axis is None:
            handles.append(module.register_forward_pre_hook(saver.before))
            # first, so that it sees the output before another hook replaces it
            handles.append(module.register_forward_hook(saver.after, prepend=True))
    try:
        with saved_tensors_hooks(saver.pack, _unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Output:
    """The storage and grid of a quantizer's output ``y``, without keeping it alive."""

    def __init__(self, y: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> None:
        self.storage = StorageWeakRef(y.untyped_storage())
        self.version, self.dtype = y._version, y.dtype
        self.grid = scale, zero_point, spec.quant_min, spec.quant_max - spec.quant_min
        self.codes: weakref.ref[_Codes] | None = None


class _Saver:
    """The hooks of one block.

    Outputs are found by their storage, which views and the aliases that autograd saves share. A
    weak reference keeps the address, but not the memory: no other storage can have the same one.
    """

    def __init__(self) -> None:
        self.outputs: dict[int, _Output] = {}
        self.qparams: dict[Quantizer, tuple[Tensor, Tensor] | None] = {}

    def sweep(self, model: nn.Module, args: Any) -> None:
        """Drop outputs whose storage has been freed."""
        if torch.compiler.is_compiling():
            return
        live = {key: output for key, output in self.outputs.items() if not output.storage.expired()}
        self.outputs = live

    def before(self, quantizer: Quantizer, args: Any) -> None:
        """Copy the range before the batch, with which a delayed observer quantizes."""
        if torch.compiler.is_compiling():
            return
        self.qparams[quantizer] = _qparams(quantizer) if _is_delayed(quantizer) else None

    def after(self, quantizer: Quantizer, args: Any, y: Tensor) -> None:
        """Record the output, unless the quantizer returned its input."""
        if torch.compiler.is_compiling():
            return
        scale, zero_point = self.qparams.pop(quantizer) or _qparams(quantizer)
        dense = y.untyped_storage().nbytes() == y.numel() * y.element_size()
        if y.numel() and dense and torch.is_grad_enabled() and quantizer.quantizes():
            output = _Output(y, scale, zero_point, quantizer.spec)
            self.outputs[output.storage.cdata] = output

    def pack(self, tensor: Tensor) -> Any:
        """``tensor``, or codes if it is a recorded output or a view of one."""
        if tensor.layout != torch.strided:
            return tensor
        output = self.outputs.get(tensor.untyped_storage()._cdata)
        if output is None or (tensor._version, tensor.dtype) != (output.version, output.dtype):
            return tensor
        # Only the autograd graph keeps the codes alive: a second layer finds those of the first.
        codes = output.codes() if output.codes else None
        if codes is None:
            codes = _Codes(tensor, *output.grid)
            output.codes = weakref.ref(codes)
        return codes, tensor.shape, tensor.stride(), tensor.storage_offset()


def _is_delayed(quantizer: Quantizer) -> bool:
    return (
        isinstance(quantizer, FakeQuantize) and quantizer.mode == "delayed" and quantizer.calibrated
    )


def _qparams(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Copies (the next batch changes the originals): scale float32 [] and zero point int32 []."""
    scale, zero_point = quantizer.calculate_qparams()
    return scale.detach().clone(), zero_point.clone()


def _unpack(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    codes, shape, stride, offset = saved
    return codes.values().as_strided(shape, stride, offset)


class _Codes:
    """The elements of a storage in their order: uint8 [n], 0 is the lowest code."""

    @torch.no_grad()
    def __init__(
        self, y: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, levels: int
    ) -> None:
        n = y.untyped_storage().nbytes() // y.element_size()
        y = y.detach().as_strided((n,), (1,), 0)
        self.dtype = y.dtype
        # y = (code − zero) · scale
        self.zero = (zero_point - quant_min).float()
        low, high = torch.aminmax(y)
        finite = low.isfinite() & high.isfinite()
        self.scale = torch.where(finite, scale, torch.nan)
        # code = floor(y / scale + zero + 1/2)
        if y.dtype in (torch.float32, torch.float64):
            code = torch.addcmul((self.zero + 0.5).to(y.dtype), y, scale.reciprocal().to(y.dtype))
        else:
            wide = y.float()
            code = torch.addcmul(self.zero + 0.5, wide, scale.reciprocal()).floor_()
            # y is a level rounded to bfloat16's 8 bits: the nearest level may be outside the grid
            # or, at a power of two, one that rounds to the number below it.
            code.clamp_(0, levels)
            nearest = (code - self.zero).mul_(scale).to(y.dtype)
            code.add_(wide.sub_(nearest).sign_())
        self.codes = code.to(torch.uint8)

    @torch.no_grad()
    def values(self) -> Tensor:  # [n]
        """The restored elements, by the arithmetic of fake_quantize."""
        return torch.sub(self.codes, self.zero).mul_(self.scale).to(self.dtype)
