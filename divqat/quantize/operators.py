"""Which quantized layers each preset's runtime computes with integers."""

from __future__ import annotations

from torch import nn

from divqat.nn._layer import QuantLayer
from divqat.nn.function import QuantFunction, matmul
from divqat.quantize.config import QuantConfig

TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
KINDS = ("linear", "matmul", "conv1d", "conv2d", "conv3d", *TRANSPOSED)

# ONNX Runtime: what a session with default options does, as a test checks. TensorRT is not run: no
# layer is known to lack a kernel there.
INTEGER: dict[str, tuple[str, ...]] = {
    "ONNX Runtime": tuple(kind for kind in KINDS if kind not in TRANSPOSED),
    "TensorRT": KINDS,
}

_MODULES = {nn.Linear: "linear", nn.Conv2d: "conv2d", nn.ConvTranspose2d: "conv_transpose2d"}


def runtime_of(config: QuantConfig) -> str:
    """The runtime for which ``config`` quantizes: symmetric activations are TensorRT's."""
    return "TensorRT" if config.activation.symmetric else "ONNX Runtime"


def kind_of(layer: QuantLayer) -> str:
    """Which of ``KINDS`` a layer is."""
    if isinstance(layer, QuantFunction):
        function = layer.function
        return "matmul" if function is matmul else function.__name__
    return next(kind for module, kind in _MODULES.items() if isinstance(layer, module))


def lacks_kernel(layer: QuantLayer, config: QuantConfig) -> str | None:
    """Why a quantized layer computes in float in the runtime; None: it does not."""
    runtime = runtime_of(config)
    if kind_of(layer) in INTEGER[runtime]:
        return None
    return (
        f"{runtime} has no integer kernel for it; use Upsample or PixelShuffle and Conv2d, or name "
        "it in skip"
    )
