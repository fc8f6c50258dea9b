"""Whether a model outputs logits or probabilities, and conversion to logits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from divqat._util.errors import require

# Last operations, as torch and ONNX name them, and the kind of their output.
ENDINGS = {
    **dict.fromkeys(("softmax", "Softmax", "QLinearSoftmax"), "probabilities"),
    **dict.fromkeys(("log_softmax", "LogSoftmax"), "logits"),
    **dict.fromkeys(("sigmoid", "Sigmoid", "QLinearSigmoid"), "sigmoids"),
}
# Operations that may follow without changing the kind of output.
TRANSPARENT = {
    *("view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous", "to", "float", "half"),
    *("type", "cpu", "clone", "detach", "dequantize", "double", "bfloat16", "round", "round_"),
    *("DequantizeLinear", "QuantizeLinear", "Cast", "Identity", "Reshape", "Flatten", "Squeeze"),
    *("Unsqueeze", "Round", "Dropout"),
}
ONE_BYTE = (torch.uint8, torch.int8)
TINY = torch.finfo(torch.float32).tiny


class Outputs:
    """Converts the outputs of one model to logits, after detecting their kind.

    Args:
        kind: the kind according to the model's graph, a value of :data:`ENDINGS`; None: it is
            detected from the outputs.

    Raises:
        ValueError: the outputs are sigmoids.
    """

    def __init__(self, kind: str | None = None) -> None:
        self.kind: str | None = None
        self.known_by_graph = False
        self._decide_by_graph(kind)

    def logits(
        self,
        rows: Tensor,  # [N, num_classes], on the CPU
        kind: str | None = None,
    ) -> Tensor:  # float32 [N, num_classes]
        """The rows if they are logits, or their logarithms if they are probabilities.

        Args:
            rows: outputs of the model.
            kind: the kind according to its last operation, a value of :data:`ENDINGS`, if known.

        Raises:
            ValueError: sigmoids; 8-bit codes of anything but probabilities; rows that are not
                probabilities after earlier ones that were.
        """
        self._decide_by_graph(kind)
        values, are_probs = _read(rows)
        if self.kind is None and not _is_one_hot(values):
            self._decide("probabilities" if are_probs else "logits", "its rows have the sum 1")
        if rows.dtype in ONE_BYTE and self.kind == "logits":
            raise ValueError(
                f"model: wanted floats, got {rows.dtype} codes: return (codes - zero_point) * scale"
            )
        if self.kind == "logits" or (self.kind is None and not are_probs):
            return values
        if not (are_probs or self.known_by_graph):
            raise ValueError(
                "model: wanted probabilities as in its earlier answers, got rows that are not: "
                "return logits, or the probabilities of classes"
            )
        return values.clamp(min=TINY).log()

    def _decide_by_graph(self, kind: str | None) -> None:
        self.known_by_graph = self.known_by_graph or kind is not None
        if kind is not None and self.kind is None:
            self._decide(kind, "its last operation is a softmax")

    def _decide(self, kind: str, why: str) -> None:
        self.kind = kind
        if kind == "sigmoids":
            raise ValueError(
                "model: wanted logits or probabilities of classes, got sigmoids, which are for "
                "labels that do not exclude each other: return the inputs of the sigmoid"
            )
        if kind == "probabilities":
            warnings.warn(
                f"the model answers probabilities ({why}), which are used unchanged",
                stacklevel=4,
            )


def _read(rows: Tensor) -> tuple[Tensor, bool]:
    """The rows as float32 (codes of probabilities scaled), and whether they are probabilities."""
    if rows.dtype not in ONE_BYTE:
        values = rows.to(torch.float32)
        return values, _are_probabilities(values, _resolution(values))
    codes = rows.to(torch.float32)
    signed = rows.dtype == torch.int8 and bool((rows >= 0).all())
    if rows.dtype == torch.int8 and not signed:
        codes = codes + 128
    for levels in (127, 128) if signed else (255, 256):
        if _are_probabilities(codes / levels, 1 / levels):
            return codes / levels, True
    return codes / levels, False


def _are_probabilities(values: Tensor, step: float) -> bool:
    """Whether float32 rows [N, C] that are multiples of ``step`` (0: any values) can be
    distributions."""
    if not ((values >= 0) & (values <= 1 + step)).all():
        return False
    classes, excess = values.shape[1], values.sum(1) - 1
    slack = max(_rounding(values), 1e-4)
    # Entries that round to 0, and a largest code below 1, only reduce the sum.
    above = slack + step / 2 * (values > 0).sum(1)
    below = slack + step / 2 * classes + step
    return bool(((-below <= excess) & (excess <= above) & (values > 0).any(1)).all())


def _rounding(values: Tensor) -> float:
    """The largest rounding error of a row's sum, larger if the values fit a 16-bit float."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).float(), values):
            # The softmax may have been computed in it: two roundings each of sum and quotient.
            return 2 * torch.finfo(dtype).eps + values.shape[1] * 2.0**-25
    return values.shape[1] * 2.0**-23


def _resolution(values: Tensor) -> float:
    """The largest step up to 0.1 of which all values are multiples, for codes of up to 8 bits times
    a scale, or decimals of up to six digits; 0 if there is none."""
    levels = values.double().unique()
    levels = levels[levels > 0]
    if not len(levels) or levels[-1] > 2:
        return 0.0
    common = _common_step(levels.tolist())
    for step in (*([common] if common else []), *(10.0**-digits for digits in range(1, 7))):
        multiples = levels / step
        if (multiples - multiples.round()).abs().max() < 0.02 + 2.0**-23 / step:
            return min(step, 0.1)
    return 0.0


def _common_step(levels: list[float]) -> float:
    """The greatest common divisor of the values, by Euclid's algorithm; 0 if it is below 1/300."""
    common = 0.0
    for level in levels:
        rest = level
        while rest > 1e-3:
            common, rest = rest, abs(common - round(common / rest) * rest)
        if common < 1 / 300:
            return 0.0
    return levels[-1] / round(levels[-1] / common)  # the largest level has the smallest error


def _is_one_hot(values: Tensor) -> bool:
    """Whether all rows are one-hot: these may be scores as well and decide nothing."""
    return bool(((values == 0) | (values == 1)).all() & (values.sum(1) == 1).all())


class LastOperation(TorchFunctionMode):
    """A block that records which tensors are results of a softmax or sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[Tensor, str]] = {}  # keeps the tensors, so that ids stay unique

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if isinstance(result, Tensor):
            kind = self.kind(args[0]) if name in TRANSPARENT and args else ENDINGS.get(name)
            if kind is not None:
                self._made[id(result)] = result, kind
        return result

    def kind(self, output: object) -> str | None:
        """The kind of ``output``, a value of :data:`ENDINGS`; None if it is unknown."""
        return self._made[id(output)][1] if id(output) in self._made else None


def onnx_kind(path: Path) -> str | None:
    """The kind of the output of an ONNX file according to its graph; None if that does not tell."""
    graph = require("onnx", "export").load(path, load_external_data=False).graph
    producers = {name: node for node in graph.node for name in node.output}
    name = graph.output[0].name if graph.output else ""
    while name in producers and producers[name].op_type in TRANSPARENT:
        node = producers.pop(name)  # an untrusted graph may be cyclic
        name = node.input[0] if node.input else ""
    return ENDINGS.get(producers[name].op_type) if name in producers else None
