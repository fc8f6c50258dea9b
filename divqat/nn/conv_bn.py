"""A convolution and its BatchNorm, folded during training as in deployment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from divqat.nn.conv import QuantConv2d
from divqat.nn.spec import ACTIVATION, WEIGHT, QuantSpec
from divqat.ops._snapshot import snapshot
from divqat.ops.reference import EPS


class QuantConvBn2d(QuantConv2d):
    """``nn.Conv2d`` followed by ``nn.BatchNorm2d``, trained with the folded weight quantized.

    The deployed layer is one convolution with weight W·γ/σ and bias β + (b − μ)·γ/σ, where μ and σ²
    are the running statistics. Training must therefore quantize W·s with s = γ/σ (Jacob et al.
    2018, §3.2):

    * Batch statistics: y = BN(conv(x, Q(W·s)/s)). The usual division of the output by s costs a
      pass over the activations. Dividing the quantized *weight* is the same in exact arithmetic
      (convolution is linear in each output channel) and costs a pass over the weight only.
      BatchNorm remains PyTorch's own.
    * Frozen statistics and eval mode: y = conv(x, Q(W·s)) + β + (b − μ)·s, the deployed sum.

    γ = 0 is defined: where |γ| is tiny, another factor replaces it in Q(W·s)/s. With a scale per
    channel γ still gets its gradient; with one scale per tensor the channel stays off. In the
    deployed form its weight is 0 and its output is β.

    Args:
        *args, **kwargs: those of ``nn.Conv2d``.
        eps, momentum: those of ``nn.BatchNorm2d``.
        weight_spec, input_spec: see :class:`QuantConv2d`. A learned weight scale must be per
            channel: it is the scale of W, and that of W·s is |s| times it.

    Raises:
        ValueError: a learned weight scale per tensor.
    """

    SWITCHES = ("frozen",)

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        weight_spec: QuantSpec = WEIGHT,
        input_spec: QuantSpec | None = ACTIVATION,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, weight_spec=weight_spec, input_spec=input_spec, **kwargs)
        if weight_spec.learned and not weight_spec.per_channel:
            raise ValueError(f"weight_spec: wanted a learned scale per channel, got {weight_spec}")
        self.bn = nn.BatchNorm2d(
            self.out_channels,
            eps=eps,
            momentum=momentum,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        self.frozen = False  # use the running statistics in training mode, too

    def freeze(self) -> None:
        """Stop updating and using batch statistics; γ and β stay trainable."""
        self.frozen = True

    def _fold(self, gamma: Tensor) -> Tensor:
        """s = γ/σ as [C_out, 1, 1, 1]."""
        assert self.bn.running_var is not None
        return (gamma * torch.rsqrt(self.bn.running_var + self.bn.eps)).view(-1, 1, 1, 1)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with BatchNorm folded in."""
        s = self._fold(self.bn.weight)
        mean = self.bn.running_mean
        assert mean is not None
        offset = -mean if self.bias is None else self.bias - mean
        return self.weight * s, self.bn.bias + offset * s.flatten()

    def weight_qparams(self) -> Tensor:
        """The folded weight's scale."""
        scale = super().weight_qparams()
        if self.weight_fake_quantize is None:
            return scale
        # γ = 0 must not become a scale of 0.
        return (scale * self._fold(self.bn.weight.detach()).flatten().abs()).clamp(min=EPS)

    def _deployed(self) -> bool:
        """Whether a call computes the deployed sum."""
        return self.frozen or not self.training

    def _factor(self) -> Tensor:
        """s, [C_out, 1, 1, 1]; a constant where batch statistics are used."""
        if self._deployed():
            return self._fold(self.bn.weight)
        gamma = self.bn.weight.detach()
        # A channel that γ ≈ 0 switches off must not become 0/0. With a scale per channel, Q(W·s)/s
        # does not depend on the size of s; with a shared scale s has to stay small.
        tiny = self.bn.eps
        floor = 1.0 if self.weight_spec.per_channel else tiny
        # A copy: BatchNorm is about to update the variance that s depends on.
        (s,) = snapshot(self._fold(torch.where(gamma.abs() < tiny, floor, gamma)))
        return s

    def scaled_weight(self) -> tuple[Tensor, Tensor | None]:
        """W·s and s."""
        s = self._factor()
        return self.weight * s, s

    def quantized_weight(self) -> tuple[Tensor, Tensor | None]:
        """Q(W·s) and s: a learned scale is that of W, an observed one that of W·s."""
        if self.weight_fake_quantize is None or not self.weight_quant_enabled:
            return super().quantized_weight()
        s = self._factor()
        return self.quantize_weight(self.weight) * s, s

    def _check_statistics(self) -> None:
        """Check that ``torch.optim.swa_utils.update_bn`` has not reset frozen statistics.

        It sets the momentum to None meanwhile; only if the layer has that momentum itself, the
        check needs a host sync."""
        bn = self.bn
        suspicious = self.training and bn.momentum is None and not torch.compiler.is_compiling()
        if suspicious and bn.num_batches_tracked == 0:
            raise RuntimeError(
                "frozen: wanted a BatchNorm with statistics, got one that was reset (by "
                "update_bn?); first set frozen = False in every QuantConvBn2d"
            )

    def forward(self, input: Tensor) -> Tensor:
        """[N, C_in, H, W] → [N, C_out, H', W']."""
        x = self.quantize_input(input)
        if not self.weight_quant_enabled and not self.training:
            # Not folded: the same bits as the float model.
            return self.bn(self.compute(x, self.weight, self.bias))
        weight, s = self.quantized_weight()
        if self._deployed():
            self._check_statistics()
            return self.compute(x, weight, self.deployed_bias(self.folded()[1]))
        assert s is not None
        return self.bn(self.compute(x, weight / s, self.bias))
