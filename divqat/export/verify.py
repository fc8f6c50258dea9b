"""Is the exported model the trained one?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from divqat.data import to_float
from divqat.progress import progress


@dataclass(frozen=True)
class VerifyReport:
    """The fake-quantized model beside ONNX Runtime on the same images.

    Attributes:
        n: images. argmax_agreement: share with the same top-1 class, in [0, 1].
        accuracy_fake, accuracy_onnx: top-1 accuracy against the labels, in [0, 1].
        max_diff: largest |difference| of a logit. mean_diff: the mean of |difference|.
        step: one output step: the range of the logits (largest minus smallest) over 255.
        max_diff_steps: ``max_diff / step``.
        runtime: the runtime and its version.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(
            (
                f"images            {self.n}",
                f"argmax agreement  {self.argmax_agreement:.2%}",
                f"accuracy          {self.accuracy_fake:.2%} fake-quantized, "
                f"{self.accuracy_onnx:.2%} {self.runtime}",
                f"logit difference  {self.max_diff:.4f} at most ({self.max_diff_steps:.1f} steps "
                f"of {self.step:.4f}), {self.mean_diff:.5f} on average",
            )
        )


def verify(
    model: nn.Module,
    onnx_path: str | Path,
    images: Tensor,  # [N, C, H, W]
    labels: Tensor,  # [N]
    *,
    batch_size: int = 256,
) -> VerifyReport:
    """Compare a prepared model in eval mode with its export in ONNX Runtime, image by image.

    Integer kernels round in other places than float ones, so logits differ by steps of the grid;
    what must agree is the class.

    Args:
        model: made by :func:`divqat.prepare` or :func:`divqat.convert`.
        onnx_path: what ``export_onnx`` wrote.
        images: uint8. labels: int64.

    Raises:
        ImportError: onnxruntime is missing. FileNotFoundError: no file at ``onnx_path``.
        ValueError: ``images`` and ``labels`` differ in length, or there are none.
    """
    if len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"images, labels: wanted as many of both, got {len(images)} and {len(labels)}"
        )
    run, runtime = onnx_runner(onnx_path)
    training = {module: module.training for module in model.modules()}
    model.eval()
    device = next(chain(model.parameters(), model.buffers())).device
    fake, deployed = [], []
    try:
        with torch.inference_mode():
            for chunk in progress(images.split(batch_size), "verify", unit="batch"):
                x = to_float(chunk)
                fake.append(model(x.to(device)).float().cpu())
                deployed.append(run(x))
    finally:
        for module, mode in training.items():
            module.training = mode
    a, b = torch.cat(fake), torch.cat(deployed)
    difference = (a - b).abs()
    step = float(a.max() - a.min()) / 255
    return VerifyReport(
        n=len(labels),
        argmax_agreement=_share(a.argmax(1) == b.argmax(1)),
        accuracy_fake=_share(a.argmax(1) == labels),
        accuracy_onnx=_share(b.argmax(1) == labels),
        max_diff=float(difference.max()),
        mean_diff=float(difference.mean()),
        step=step,
        max_diff_steps=float(difference.max()) / step if step else 0.0,
        runtime=runtime,
    )


def onnx_runner(path: str | Path) -> tuple[Callable[[Tensor], Tensor], str]:
    """A function from float32 images to logits through ONNX Runtime on the CPU, and its name."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no ONNX model at {path}")
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("verify needs onnxruntime: pip install 'divqat[export]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        output = session.run(None, {name: np.ascontiguousarray(x.numpy())})[0]
        return torch.from_numpy(np.asarray(output))

    return run, f"ONNX Runtime {onnxruntime.__version__}"


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())
