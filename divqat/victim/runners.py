"""Deployed models of every format as functions from images to logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from divqat._util.files import check_beside
from divqat._util.text import printable
from divqat.victim.executorch_file import executorch_runner
from divqat.victim.metadata import InputMetadata, parse_metadata
from divqat.victim.onnx_file import check_onnx, open_session
from divqat.victim.openvino_file import OpenVINORunner
from divqat.victim.outputs import LastOperation, Outputs, onnx_kind
from divqat.victim.padding import in_batches

# Suffix of an exported file → runtime, its package, and what opens the file. Others are ONNX.
RUNTIMES: dict[str, tuple[str, str, Callable[[Path], Callable[[Tensor], Tensor]]]] = {
    ".pte": ("ExecuTorch", "executorch", executorch_runner),
    ".xml": ("OpenVINO", "openvino", OpenVINORunner),
}
INPUTS = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}  # that ONNX models may take
SUFFIXES = (".onnx", *RUNTIMES)


def logits_function(model: Any) -> Callable[[Tensor], Tensor]:
    """Any model that :class:`divqat.victim.Victim` takes as a function with checked logits.

    If the model outputs probabilities, the logits are their logarithms, and a warning says so once
    per function. Probabilities are recognized by the model's last operation where it is known (an
    ONNX file, torch's softmax), else by the rows of the first answer, whatever their resolution:
    floats of any width, rounded floats, 8-bit codes.

    Returns:
        A function from floating-point images [N, C, H, W] on any device to float32 logits
        [N, num_classes] on the CPU. It runs under ``torch.inference_mode``. It raises
        FloatingPointError if a logit is NaN or Inf, and ValueError if the module is in training
        mode, the ONNX model takes another shape, or the outputs are sigmoids.

    Raises:
        See :class:`divqat.victim.Victim`.
    """
    run = _runner(model)
    is_onnx = isinstance(model, (str, Path)) and Path(model).suffix not in RUNTIMES
    outputs = Outputs(onnx_kind(Path(model)) if is_onnx else None)

    def logits_of(images: Tensor) -> Tensor:
        trace = outputs.kind is None and isinstance(model, nn.Module) and not _is_compiled(model)
        with torch.inference_mode(), LastOperation() if trace else nullcontext() as last:
            logits = run(images.float())
        if not isinstance(logits, Tensor):
            raise TypeError(f"model: wanted logits as a Tensor, got {type(logits).__name__}")
        if logits.dim() != 2 or len(logits) != len(images) or logits.shape[1] < 2:
            raise ValueError(
                f"model: wanted logits [{len(images)}, num_classes] of at least 2 classes, got "
                f"{list(logits.shape)}"
            )
        logits = outputs.logits(logits.cpu(), last.kind(logits) if last else None)
        if not logits.isfinite().all():
            bad = int((~logits.isfinite()).any(1).sum())
            raise FloatingPointError(f"model: NaN or Inf in the logits of {bad} of {len(images)}")
        return logits

    return logits_of


def _runner(model: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(model, nn.Module):
        check_eval(model)
        return lambda images: _run_module(model, images)
    if isinstance(model, (str, Path)):
        model = open_file(Path(model))
    if hasattr(model, "get_inputs") and hasattr(model, "run"):  # an onnxruntime.InferenceSession
        return _session_runner(model)
    if callable(model):
        return model
    raise TypeError(
        f"model: wanted an nn.Module, a path ({', '.join(SUFFIXES)}), an InferenceSession or a "
        f"function, got {type(model).__name__}"
    )


def _run_module(model: nn.Module, images: Tensor) -> Tensor:
    check_eval(model)  # again: training may have continued since
    tensor = next(chain(model.parameters(), model.buffers()), images)
    return model(images.to(tensor.device))


def _is_compiled(model: nn.Module) -> bool:
    """Whether any part is compiled: a TorchFunctionMode would make torch.compile recompile it."""
    return any(
        isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None
        for m in model.modules()
    )


def check_eval(model: nn.Module) -> None:
    """Check that a module and all its parts are in eval mode; ValueError if not.

    The graph of ``torch.export``, as of PT2E, has one mode, whatever its flag says: that of its
    operations, and no ``eval()``.
    """
    if isinstance(model, fx.GraphModule) and "train" in vars(model):
        trains = [str(node) for node in model.graph.nodes if _trains(node)]
        if trains:
            raise ValueError(
                f"model: wanted an export of a model in eval mode, got {trains[0]!r} in training "
                "mode"
            )
        return
    training = [name or type(model).__name__ for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(
            f"model: wanted eval mode, but {training[0]!r} is in training mode; call model.eval()"
        )


def _trains(node: fx.Node) -> bool:
    """Whether an operation of an exported graph, such as a dropout, runs in training mode."""
    schema = getattr(node.target, "_schema", None)
    for index, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name in ("train", "training"):
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            return given is True
    return False


def open_file(path: Path, *, precise: bool = True) -> Any:
    """An exported file in its runtime, by its suffix; ``precise`` is for :func:`open_onnx`."""
    if path.suffix in RUNTIMES:
        return RUNTIMES[path.suffix][2](path)
    return open_onnx(path, precise=precise)


def open_onnx(path: Path, *, precise: bool = True) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU that computes exactly what the file says.

    CPUs without VNNI add products of uint8 activations and int8 weights in 16 bits, which can
    saturate for weights beyond ±64. By default ONNX Runtime accepts these changed answers for the
    sake of speed. Its option ``session.x64quantprecision`` avoids saturation, so that all machines
    agree. The option fails if layers share a weight or its zero point; then a warning says that the
    default is used.

    Args:
        path: the file.
        precise: with that option; False: with default options, as most users open it.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: ONNX Runtime is not installed.
        ValueError: the file differs from what ``divqat export`` wrote, or see
            :func:`divqat.victim.onnx_file.check_onnx`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model: no ONNX file at {path}")
    check_beside(path, "export.json", f"divqat export {path.parent} writes it again")
    check_onnx(path)
    if not precise:
        return open_session(path, exact=False)
    try:
        return open_session(path, exact=True)
    except ValueError as error:
        session = open_session(path, exact=False)
        warnings.warn(
            "sums of int8 products may saturate on this CPU, as with session.x64quantprecision "
            + printable(error),
            stacklevel=2,
        )
        return session


def _session_runner(session: Any) -> Callable[[Tensor], Tensor]:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    got = ", ".join(f"{i.name}: {i.type} {i.shape}" for i in inputs)
    if len(inputs) != 1 or inputs[0].type not in INPUTS or len(inputs[0].shape) != 4:
        raise ValueError(f"model: wanted one ONNX input, float or uint8 [N, C, H, W], got {got}")
    if len(outputs) != 1:
        raise ValueError(f"model: wanted one ONNX output, got {[o.name for o in outputs]}")
    name, shape, dtype = inputs[0].name, inputs[0].shape, INPUTS[inputs[0].type]
    declared = parse_metadata(session.get_modelmeta().custom_metadata_map, "model")
    if declared is not None and declared.dtype != dtype:
        raise ValueError(f"model: wanted its declared input {declared.dtype}, got {got}")
    # A file that declares nothing takes the floats of divqat's models, or pictures.
    declared = declared or InputMetadata(dtype=dtype)
    fixed = shape[0] if isinstance(shape[0], int) else None

    def run(images: Tensor) -> Tensor:
        images = declared.feed(images)
        for wanted, got in zip(shape[1:], images.shape[1:], strict=True):
            if isinstance(wanted, int) and wanted != got:
                raise ValueError(
                    f"images: the ONNX input {name!r} wants {shape}, got {list(images.shape)}"
                )

        def answers(part: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {name: part.numpy()})[0])

        return in_batches(answers, images.cpu(), fixed, f"the ONNX input {name!r}")

    return run


def check_images(images: Tensor) -> None:
    """Check that images are finite floats [N, C, H, W] with N >= 1.

    Raises:
        TypeError, ValueError: they are not.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images: wanted a Tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(
            f"images: wanted floats in [-1, 1], got {images.dtype}; divqat.data.to_float makes them"
        )
    if images.dim() != 4 or not len(images):
        raise ValueError(
            f"images: wanted [N, C, H, W] with N of at least 1, got {list(images.shape)}"
        )
    if not images.isfinite().all():
        raise ValueError("images: wanted finite values, got NaN or Inf")
