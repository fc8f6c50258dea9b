"""Export to OpenVINO, Intel's runtime, as a pair of files: the graph (.xml) and its weights."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from divqat._util.errors import require
from divqat._util.files import write_atomic
from divqat.export.onnx import export_onnx
from divqat.quantize.convert import convert
from divqat.quantize.deployed import IntegerLayer
from divqat.victim.openvino_file import OpenVINORunner

PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")  # of a compiled graph


@dataclass(frozen=True)
class OpenVINOReport:
    """The result of an export.

    Attributes:
        path: the file of the graph; that of the weights is beside it, with the suffix ``.bin``.
        bytes: the size of both.
        int8_layers, float_layers: number of convolutions and matrix products that run with integer
            and with float kernels on this CPU, counted in the compiled graph.
        runtime: version of OpenVINO.
        saturating: layers with weights beyond ±64, whose sums of two products can saturate on x86
            CPUs without VNNI, see :mod:`divqat.export.saturation`; OpenVINO has no option against
            it.
    """

    path: Path
    bytes: int
    int8_layers: int
    float_layers: int
    runtime: str
    saturating: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"path": self.path.name}

    def __str__(self) -> str:
        text = (
            f"{self.path}, {self.path.with_suffix('.bin').name}: {self.bytes / 1024:.0f} KiB, "
            f"{self.int8_layers} of {self.int8_layers + self.float_layers} convolutions and matrix "
            "products run in int8"
        )
        return f"{text}\n{self.advice}" if self.saturating else text

    @property
    def advice(self) -> str:
        """A sentence on the layers that can saturate and the remedy."""
        more = f" and {len(self.saturating) - 3} more" if len(self.saturating) > 3 else ""
        return (
            "sums of int8 products can saturate on x86 CPUs without VNNI, in "
            f"{', '.join(self.saturating[:3])}{more}: train with weight_bits=7"
        )


def export_openvino(model: nn.Module, example_input: Any, path: str | Path) -> OpenVINOReport:
    """Write a prepared model as OpenVINO's intermediate representation, with a dynamic batch.

    It is what OpenVINO makes of the file of :func:`divqat.export.export_onnx`, with the same names.
    The files are only written if OpenVINO can load them. A warning names the layers whose sums may
    saturate on an x86 CPU without VNNI, which can happen with weights of more than 7 bits.

    Args:
        model: a trained model, made by :func:`divqat.prepare`.
        example_input: as for ``export_onnx``.
        path: the file of the graph, ``*.xml``; both are replaced if they exist.

    Raises:
        ImportError: openvino, or what ``export_onnx`` needs, is missing.
        TypeError: see ``export_onnx``.
        ValueError: ``path`` has another suffix, or see ``export_onnx``.
        RuntimeError: an exporter or the runtime failed.
    """
    path = Path(path)
    if path.suffix != ".xml":
        raise ValueError(f"path: wanted a file *.xml, got {path}")
    openvino = require("openvino", "openvino")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*can saturate")  # in ONNX Runtime
            export_onnx(model, example_input, file)
        written = file.with_suffix(".xml")
        openvino.save_model(openvino.Core().read_model(file), written, compress_to_fp16=False)
        integer = _products(OpenVINORunner(written).compiled)
        graph, weights = written.read_bytes(), written.with_suffix(".bin").read_bytes()
    write_atomic(path.with_suffix(".bin"), lambda temporary: temporary.write_bytes(weights))
    write_atomic(path, lambda temporary: temporary.write_bytes(graph))
    report = OpenVINOReport(
        path=path,
        bytes=len(graph) + len(weights),
        int8_layers=sum(integer),
        float_layers=len(integer) - sum(integer),
        runtime=openvino.__version__,
        saturating=tuple(_wide(convert(model))),
    )
    if report.saturating:
        warnings.warn(f"{path}: {report.advice}", stacklevel=2)
    return report


def _wide(converted: nn.Module) -> list[str]:
    """The layers with weights that can saturate: 2 · 255 · 64 fits into 16 bits."""
    return [
        name
        for name, layer in converted.named_modules()
        if isinstance(layer, IntegerLayer) and int(layer.weight.int().abs().max()) > 64
    ]


def _products(compiled: Any) -> list[bool]:
    """For each product of a compiled model whether its kernel computes with integers."""
    found = []
    for node in compiled.get_runtime_model().get_ops():
        info = {key: getattr(value, "value", value) for key, value in node.get_rt_info().items()}
        if info.get("layerType") in PRODUCTS:
            found.append(info.get("runtimePrecision") in ("i8", "u8"))
    return found
