"""Comparison of an exported model with the trained one, on this CPU and on those without VNNI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from divqat._util.errors import require
from divqat._util.modes import modes_kept
from divqat.data import LabeledImages
from divqat.export.saturation import Saturating, advice, emulated_session, saturating
from divqat.metrics import accuracy, fidelity, predict
from divqat.victim.metadata import read_metadata
from divqat.victim.runners import RUNTIMES, open_file


@dataclass(frozen=True)
class Deployed:
    """Another way to run the file, compared with the fake-quantized model.

    Attributes:
        argmax_agreement: share of images with the same top-1 class, in [0, 1].
        accuracy: top-1 accuracy against the labels, in [0, 1].
    """

    argmax_agreement: float
    accuracy: float


@dataclass(frozen=True)
class VerifyReport:
    """The fake-quantized model compared with a runtime (default options) on the same images.

    Attributes:
        n: number of images.
        argmax_agreement: share of images with the same top-1 class, in [0, 1].
        accuracy_fake, accuracy_onnx: top-1 accuracy against the labels, in [0, 1]; the second is
            that of the file.
        max_diff: largest |difference| of a logit.
        mean_diff: mean of |difference|.
        step: one output step: the range of the logits (largest minus smallest) over 255.
        max_diff_steps: ``max_diff / step``.
        runtime: the runtime and its version.
        saturating: layers whose sums may saturate on x86 CPUs without VNNI.
        precise: with the option ``session.x64quantprecision``; None if no layer can saturate.
        emulated: default options on an emulated CPU without VNNI; None if no layer can saturate.
    """

    n: int
    argmax_agreement: float
    accuracy_fake: float
    accuracy_onnx: float
    max_diff: float
    mean_diff: float
    step: float
    max_diff_steps: float
    runtime: str
    saturating: tuple[Saturating, ...] = ()
    precise: Deployed | None = None
    emulated: Deployed | None = None

    @property
    def least_agreement(self) -> float:
        """The agreement with default options on the worst CPU: this one, or one without VNNI."""
        emulated = 1.0 if self.emulated is None else self.emulated.argmax_agreement
        return min(self.argmax_agreement, emulated)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"least_agreement": self.least_agreement}

    def __str__(self) -> str:
        lines = [
            f"images            {self.n}",
            f"argmax agreement  {self.argmax_agreement:.2%}",
            f"accuracy          {self.accuracy_fake:.2%} fake-quantized, "
            f"{self.accuracy_onnx:.2%} {self.runtime}",
            f"logit difference  {self.max_diff:.4f} at most ({self.max_diff_steps:.1f} steps "
            f"of {self.step:.4f}), {self.mean_diff:.5f} on average",
        ]
        for name, deployed in (
            ("CPUs without VNNI (emulated)", self.emulated),
            ("session.x64quantprecision", self.precise),
        ):
            if deployed is not None:
                lines.append(
                    f"{name}: agreement {deployed.argmax_agreement:.2%}, "
                    f"accuracy {deployed.accuracy:.2%}"
                )
        if self.saturating:
            lines.append(advice(self.saturating))
        return "\n".join(lines)


def verify(
    model: nn.Module,
    path: str | Path,
    images: Tensor | LabeledImages,  # [N, C, H, W]
    labels: Tensor,  # [N]
    *,
    batch_size: int = 256,
) -> VerifyReport:
    """Compare a prepared model in eval mode with its export in a runtime, image by image.

    The file runs in ONNX Runtime, ExecuTorch (``.pte``) or OpenVINO (``.xml``), with default
    options, as most users run it. Integer kernels round at other points than float kernels, so
    logits differ by steps of the grid; the classes must agree.

    Args:
        model: made by :func:`divqat.prepare` or :func:`divqat.convert`.
        path: a file written by ``export_onnx``, ``export_executorch`` or ``export_openvino``.
        images: uint8 [N, C, H, W], or a set.
        labels: int64 [N].
        batch_size: images per forward pass.

    Raises:
        ImportError: the runtime is missing (for ONNX, also onnx).
        FileNotFoundError: there is no file at ``path``.
        FloatingPointError: a logit is NaN or Inf.
        ValueError: ``images`` and ``labels`` differ in length, or are empty.
    """
    if len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"images, labels: wanted the same number of both, at least 1, got {len(images)} and "
            f"{len(labels)}"
        )
    path = Path(path)
    b = predict(open_file(path, precise=False), images, batch_size=batch_size)
    with modes_kept(model):
        a = predict(_normalized(model.eval(), path), images, batch_size=batch_size)

    def deployed(session: Any) -> Deployed:
        logits = predict(session, images, batch_size=batch_size)
        return Deployed(fidelity(a, logits), accuracy(logits, labels))

    layers = saturating(path) if path.suffix not in RUNTIMES else []
    difference = (a - b).abs()
    step = float(a.max() - a.min()) / 255
    return VerifyReport(
        n=len(labels),
        argmax_agreement=fidelity(a, b),
        accuracy_fake=accuracy(a, labels),
        accuracy_onnx=accuracy(b, labels),
        max_diff=float(difference.max()),
        mean_diff=float(difference.mean()),
        step=step,
        max_diff_steps=float(difference.max()) / step if step else 0.0,
        runtime=_runtime(path),
        saturating=tuple(layers),
        precise=deployed(path) if layers else None,
        emulated=deployed(emulated_session(path)) if layers else None,
    )


def _runtime(path: Path) -> str:
    """The runtime of a file, with its version."""
    if path.suffix not in RUNTIMES:
        return f"ONNX Runtime {require('onnxruntime', 'export').__version__}"
    name, package, _ = RUNTIMES[path.suffix]
    return f"{name} {version(package)}"


def _normalized(model: nn.Module, path: Path) -> Any:
    """The model, of images in [-1, 1], with the normalization that its ONNX file declares."""
    declared = read_metadata(path) if path.suffix not in RUNTIMES else None
    if declared is None:
        return model
    first = next(chain(model.parameters(), model.buffers()))
    return lambda images: model(declared.normalize(images).to(first.device))


def as_attacked(verified: Mapping[str, Any]) -> tuple[float, float]:
    """Accuracy and agreement, from ``verify.json``, of the file as a victim runs it, which is the
    same on every CPU: see :func:`divqat.victim.runners.open_onnx`."""
    precise = verified.get("precise")
    if precise is None:
        return verified["accuracy_onnx"], verified["argmax_agreement"]
    return precise["accuracy"], precise["argmax_agreement"]
