"""Is the exported model the trained one, wherever it runs?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from divqat._util.errors import require
from divqat.data import LabeledImages
from divqat.export.saturation import Saturating, advice, emulated_session, saturating
from divqat.metrics import accuracy, fidelity, predict
from divqat.victim.runners import open_onnx


@dataclass(frozen=True)
class Deployed:
    """One way to run a file beside the fake-quantized model.

    Attributes:
        argmax_agreement: share with the same top-1 class, in [0, 1]. accuracy: against the labels.
    """

    argmax_agreement: float
    accuracy: float


@dataclass(frozen=True)
class VerifyReport:
    """The fake-quantized model beside ONNX Runtime, with its default options, on the same images.

    Attributes:
        n: images. argmax_agreement: share with the same top-1 class, in [0, 1].
        accuracy_fake, accuracy_onnx: top-1 accuracy against the labels, in [0, 1].
        max_diff: largest |difference| of a logit. mean_diff: the mean of |difference|.
        step: one output step: the range of the logits (largest minus smallest) over 255.
        max_diff_steps: ``max_diff / step``.
        runtime: the runtime and its version.
        saturating: the layers that x86 CPUs without VNNI may compute otherwise. Only where there
            are some, ``precise``: with the option ``session.x64quantprecision``, and ``emulated``:
            what such a CPU answers without it, whatever this one is.
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
        """The agreement with default options on the CPU that is worst for it."""
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
        for where, found in (
            ("CPUs without VNNI (emulated)", self.emulated),
            ("session.x64quantprecision", self.precise),
        ):
            if found is not None:
                lines.append(
                    f"{where}: agreement {found.argmax_agreement:.2%}, "
                    f"accuracy {found.accuracy:.2%}"
                )
        if self.saturating:
            lines.append(advice(self.saturating))
        return "\n".join(lines)


def verify(
    model: nn.Module,
    onnx_path: str | Path,
    images: Tensor | LabeledImages,  # [N, C, H, W]
    labels: Tensor,  # [N]
    *,
    batch_size: int = 256,
) -> VerifyReport:
    """Compare a prepared model in eval mode with its export in ONNX Runtime, image by image.

    The file runs as a user would run it, with default options. Integer kernels round in other
    places than float ones, so logits differ by steps of the grid; what must agree is the class.

    Args:
        model: made by :func:`divqat.prepare` or :func:`divqat.convert`.
        onnx_path: what ``export_onnx`` wrote.
        images: uint8, or a set. labels: int64.

    Raises:
        ImportError: onnxruntime or onnx is missing. FileNotFoundError: no file at ``onnx_path``.
        FloatingPointError: a logit is NaN or Inf.
        ValueError: ``images`` and ``labels`` differ in length, or there are none.
    """
    if len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"images, labels: wanted as many of both, got {len(images)} and {len(labels)}"
        )
    runtime = require("onnxruntime", "export")
    b = predict(open_onnx(Path(onnx_path), precise=False), images, batch_size=batch_size)
    training = {module: module.training for module in model.modules()}
    try:
        a = predict(model.eval(), images, batch_size=batch_size)
    finally:
        for module, mode in training.items():
            module.training = mode

    def deployed(session: Any) -> Deployed:
        logits = predict(session, images, batch_size=batch_size)
        return Deployed(fidelity(a, logits), accuracy(logits, labels))

    layers = saturating(onnx_path)
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
        runtime=f"ONNX Runtime {runtime.__version__}",
        saturating=tuple(layers),
        precise=deployed(onnx_path) if layers else None,
        emulated=deployed(emulated_session(onnx_path)) if layers else None,
    )


def as_attacked(verified: Mapping[str, Any]) -> tuple[float, float]:
    """Accuracy and agreement, by ``verify.json``, of the file as a victim runs it: the same on
    every CPU, see :func:`divqat.victim.runners.open_onnx`."""
    precise = verified.get("precise")
    if precise is None:
        return verified["accuracy_onnx"], verified["argmax_agreement"]
    return precise["accuracy"], precise["argmax_agreement"]
