"""A prepared model as a ``torch.export`` program of quantize and dequantize nodes.

This is the form (PT2E) that ExecuTorch, LiteRT and others read: activations are int8 codes, weights
int8 per channel, biases float, and every quantized operation has a dequantize node before it and a
quantize node after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from divqat._util.errors import require
from divqat.export.arguments import arguments
from divqat.nn.spec import QuantSpec
from divqat.quantize.checks import as_call
from divqat.quantize.convert import convert
from divqat.quantize.deployed import IntegerLayer, QuantizeDequantize
from divqat.quantize.requantize import requantize
from divqat.quantize.tracing.traced import PreparedModule

LOWEST, HIGHEST = -128, 127


def export_program(model: nn.Module, example_input: Any) -> torch.export.ExportedProgram:
    """Convert a prepared model to a program with nodes of ``torch.ops.quantized_decomposed``.

    The activations' codes are int8: unsigned ones less 128. The outputs are quantized, too, to the
    8 bits of their range on ``example_input``, as integer kernels end in codes; so pass pictures of
    the model's kind, some hundreds. The program takes one row at a time.

    Args:
        model: a trained model, made by :func:`divqat.prepare`.
        example_input: float32 [N, C, H, W], or the arguments as for :func:`divqat.prepare`.

    Raises:
        ImportError: torchao, which defines the nodes, is missing.
        TypeError: ``example_input`` is not float32.
        ValueError: see :func:`divqat.convert`; or an output is the same for all of
            ``example_input``, or not finite.
    """
    require("torchao.quantization.pt2e", "executorch")
    inputs = arguments(model, example_input)
    converted = convert(model)
    with torch.no_grad():
        args, kwargs = as_call(example_input)
        outputs = converted(*args, **kwargs)
    for module in converted.modules():
        if isinstance(module, PreparedModule):
            requantize(module, through=frozenset())
    for name, module in list(converted.named_modules()):
        if isinstance(module, IntegerLayer):
            converted.set_submodule(name, _Layer(module))
    for name, module in list(converted.named_modules()):
        if isinstance(module, QuantizeDequantize):
            converted.set_submodule(name, _Quantizer.of(module))
    batched = zip(inputs.values, inputs.dynamic_shapes, strict=True)
    one = tuple(value[:1] if dynamic else value for value, dynamic in batched)
    program = torch.export.export(_WithCodes(converted, outputs).eval(), one)
    _separate(program.graph_module)
    return program


def _separate(module: torch.fx.GraphModule) -> None:
    """Give each user of a dequantized tensor a node of its own. Runtimes take an operation with the
    nodes around it; ExecuTorch 1.5 finds circles if two operations share one."""
    for node in list(module.graph.nodes):
        if node.target != torch.ops.quantized_decomposed.dequantize_per_tensor.default:
            continue
        for user in list(node.users)[1:]:
            with module.graph.inserting_before(user):
                user.replace_input_with(node, module.graph.node_copy(node))
    module.recompile()


class _Quantizer(nn.Module):
    """Quantize and dequantize nodes with constant parameters."""

    def __init__(self, scale: float, zero_point: int, low: int, high: int, relu: bool) -> None:
        super().__init__()
        self.qparams, self.relu = (scale, zero_point, low, high, torch.int8), relu

    @classmethod
    def of(cls, module: QuantizeDequantize) -> _Quantizer:
        spec: QuantSpec = module.spec
        shift = 0 if spec.signed else LOWEST
        low, high = spec.quant_min + shift, spec.quant_max + shift
        return cls(float(module.scale), int(module.zero_point) + shift, low, high, module.relu)

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        codes = ops.quantize_per_tensor(x.relu() if self.relu else x, *self.qparams)
        return ops.dequantize_per_tensor(codes, *self.qparams)


class _Layer(nn.Module):
    """A layer whose weight is a dequantize node of int8 codes; its bias is float32."""

    bias: Tensor | None

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.input, self.layer, self.axis = layer.input, layer.layer, layer.axis
        self.register_buffer("weight", layer.weight)
        self.register_buffer("scale", layer.weight_scale)
        self.register_buffer("zero_point", layer.weight_zero_point.long())
        bias = layer.bias
        if bias is not None and layer.bias_scale is not None:
            bias = bias.float() * layer.bias_scale
        self.register_buffer("bias", bias)
        self.tensor_scale = None if layer.weight_scale.dim() else float(layer.weight_scale)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ops, limits = torch.ops.quantized_decomposed, (-HIGHEST, HIGHEST, torch.int8)
        if self.tensor_scale is not None:
            weight = ops.dequantize_per_tensor(self.weight, self.tensor_scale, 0, *limits)
        else:
            weight = ops.dequantize_per_channel(
                self.weight, self.scale, self.zero_point, self.axis, *limits
            )
        return self.layer.compute(self.input(input), weight, self.bias, *args, **kwargs)


class _WithCodes(nn.Module):
    """A model whose floating-point outputs are rounded to codes of their range."""

    def __init__(self, model: nn.Module, outputs: Any) -> None:
        super().__init__()
        self.model = model
        self.quantizers = nn.ModuleList(
            _output_quantizer(value) for value in pytree.tree_leaves(outputs) if _is_float(value)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        remaining = iter(self.quantizers)
        return pytree.tree_map(
            lambda value: next(remaining)(value) if _is_float(value) else value,
            self.model(*args, **kwargs),
        )


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _output_quantizer(values: Tensor) -> _Quantizer:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = (high - low) / (HIGHEST - LOWEST)
    if not 0 < scale < float("inf"):
        raise ValueError(
            "example_input: wanted pictures with different, finite outputs, whose range becomes "
            f"their grid, got outputs from {low:.4g} to {high:.4g}"
        )
    return _Quantizer(scale, round(LOWEST - low / scale), LOWEST, HIGHEST, relu=False)
