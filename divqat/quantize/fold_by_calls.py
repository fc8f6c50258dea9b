"""Fold BatchNorm into convolutions of a model without a graph, by the order of its calls.

Imported only where it is needed: torch.compiler.disable loads the compiler, and Triton with it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from divqat.nn import QuantConvBn2d
from divqat.quantize.checks import as_call, deep_copy
from divqat.quantize.config import QuantConfig
from divqat.quantize.swap import Folded, can_fold, conv_bn
from divqat.quantize.tracing.modes import MODES, same_tensors, tensors_of

MARK = "_divqat_convolution"  # attribute of a convolution's output: whose it is, and its version


class FoldedBatchNorm(Folded):
    """Stands where a BatchNorm was that is folded into a convolution. It returns its input.

    No graph tells where the convolution's output goes, so that each call is checked.

    Args:
        name, conv: names of the BatchNorm and of the convolution.

    Raises:
        RuntimeError: in a forward, the input is not the convolution's output, or the convolution
            was called without the BatchNorm.
    """

    def __init__(self, name: str, conv: str) -> None:
        super().__init__()
        self.name, self.conv, self.waiting = name, conv, 0

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """``input`` itself."""
        if getattr(input, MARK, None) != (self.conv, input._version):
            raise self._error(f"{self.name} was called with another input")
        delattr(input, MARK)
        self.waiting -= 1
        return input

    @torch.compiler.disable
    def mark(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """A forward hook of the convolution."""
        setattr(output, MARK, (self.conv, output._version))
        self.waiting += 1

    @torch.compiler.disable
    def begin(self, module: nn.Module, args: Any) -> None:
        """A forward pre-hook of the model."""
        self.waiting = 0

    @torch.compiler.disable
    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of the model."""
        if self.waiting:
            raise self._error(f"{self.conv} was called without {self.name}")

    def _error(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{what}, which is folded into {self.conv} as it follows in the example_input of "
            f"prepare: name {self.conv} in skip, and it stays in float"
        )


def fold_by_calls(
    model: nn.Module, example_input: Any, config: QuantConfig
) -> tuple[nn.Module, dict[str, str]]:
    """``model`` with each Conv2d and the BatchNorm2d that reads its output as one layer.

    Both are called once in the example, in eval mode. If that changes what the model returns, as
    something else reads the convolution, nothing is folded.

    Args:
        model: not changed.
        example_input: see :func:`divqat.prepare`.

    Returns:
        A copy, and the new prefixes of its keys by the old ones.
    """
    folded, renamed = deep_copy("model", model), dict[str, str]()
    for conv_name, bn_name in _pairs(folded, example_input):
        conv, bn = folded.get_submodule(conv_name), folded.get_submodule(bn_name)
        if type(bn) is not nn.BatchNorm2d or not can_fold(conv, conv_name, bn, config):
            continue
        layer, guard = conv_bn(conv, bn, config.weight), FoldedBatchNorm(bn_name, conv_name)
        layer.register_forward_hook(guard.mark)
        folded.register_forward_pre_hook(guard.begin)
        folded.register_forward_hook(guard.end)
        folded.set_submodule(conv_name, layer)
        folded.set_submodule(bn_name, guard)
        renamed[f"{bn_name}."] = f"{conv_name}.bn."
    answers = zip(_answers(folded, example_input), _answers(model, example_input), strict=True)
    same = all(wanted is None or same_tensors(got, wanted) for got, wanted in answers)
    return (folded, renamed) if same else (deep_copy("model", model), {})


def _pairs(model: nn.Module, example_input: Any) -> list[tuple[str, str]]:
    """Names of convolutions, and of the BatchNorms that read their outputs, of those that are
    called once."""
    outputs: dict[str, list[Tensor]] = {}
    readers: dict[str, list[Tensor]] = {}

    def wrote(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.setdefault(name, []).append(output)

    def read(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        readers.setdefault(name, []).append(args[0])

    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    handles = []
    for module, known in names.items():
        if len(known) == 1 and isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(partial(wrote, known[0])))
        elif len(known) == 1 and isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(partial(read, known[0])))
    tensors_of(model, as_call(example_input), "eval")
    for handle in handles:
        handle.remove()
    return [
        (conv, bn)
        for conv, results in outputs.items()
        for bn, inputs in readers.items()
        if len(results) == len(inputs) == 1 and results[0] is inputs[0]
    ]


def _answers(model: nn.Module, example_input: Any) -> list[list[Tensor] | None]:
    """The tensors that a call returns in eval and in training mode, with weights in float; None: it
    raises."""
    call = as_call(example_input)
    layers = [module for module in model.modules() if isinstance(module, QuantConvBn2d)]
    for layer in layers:
        layer.weight_quant_enabled = False
    try:
        return [tensors_of(model, call, mode) for mode in MODES]
    finally:
        for layer in layers:
            layer.weight_quant_enabled = True
