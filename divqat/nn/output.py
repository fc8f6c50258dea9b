"""The quantizer of a network's logits that answers foreign images with zeros."""

from __future__ import annotations

from torch import Tensor

from divqat.nn.fake_quantize import FakeQuantize
from divqat.nn.spec import ACTIVATION, QuantSpec


class RectifiedOutput(FakeQuantize):
    """Logits in training mode, and in eval mode max(logits, 0) on their grid.

    The deployed network computes its logits as integers whose smallest code stands for 0, so that
    negative logits become 0 by saturation. An image with no positive logit gets zeros, the same for
    all such images: nothing of them is in the answer. In training the logits pass unchanged, as the
    loss has to move negative ones, too (:class:`divqat.nn.MisdirectionTargets`, ``reject``); their
    range above 0 is observed.

    Args:
        spec: the grid.
    """

    def __init__(self, spec: QuantSpec = ACTIVATION) -> None:
        super().__init__(spec, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` in training mode; else rectified and fake-quantized. Any shape, dtype kept."""
        if not self.training:
            return super().forward(x)
        if self._observes() and x.numel():
            self._observed(x.detach(), fake_quant=False, relu=True)
            self.calibrated = True
        return x

    def quantizes(self) -> bool:
        """Whether a call in the present mode quantizes its input."""
        return not self.training and super().quantizes()
