"""The common part of defenses that poison the gradients of an unknown attacker's network."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from divqat._util.seeds import derived_seed
from divqat._util.settings import option
from divqat.defenses.defense import Defense, Owner

S = TypeVar("S", bound="SurrogateDefense")

BATCH = 256  # images per forward pass of the surrogate


@dataclass(frozen=True, kw_only=True)
class SurrogateDefense(Defense):
    """A defense that computes gradients of a surrogate, a network of the owner, in eval mode.

    :meth:`fit` creates the surrogate; its weights depend on the owner's seed.

    Args:
        epsilon: bound of |y' - y|_1, 0 to 2. (The papers show whole curves; 1 is from the code of
            Tang et al., USENIX Security 2024.)
    """

    strength: ClassVar[str | None] = "epsilon"

    epsilon: float = option(1.0, "Largest L1 distance to the clean answer.", least=0, most=2)

    _surrogate: ClassVar[nn.Module | None] = None  # set on the instance by fit

    def fit(self: S, owner: Owner) -> S:
        fitted = super().fit(owner)
        # Not the owner's seed itself: an attacker's clone with the same seed would start from the
        # weights of the surrogate.
        seed = derived_seed(owner.seed, "surrogate")
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            network = owner.build()
        surrogate = self._train(network, owner, seed).eval().requires_grad_(False)
        object.__setattr__(fitted, "_surrogate", surrogate)  # the dataclass is frozen
        return fitted

    def _train(self, network: nn.Module, owner: Owner, seed: int) -> nn.Module:
        """The surrogate, from a network with random weights; here unchanged."""
        return network

    def __call__(self, probs: Tensor, images: Tensor) -> Tensor:
        surrogate = self._surrogate
        if surrogate is None:
            raise RuntimeError(f"{type(self).__name__}: call fit(owner) first and use its result")
        device = next(surrogate.parameters()).device
        parts = zip(probs.split(BATCH), images.split(BATCH), strict=True)
        released = [self._poison(surrogate, y, x.to(device)) for y, x in parts]
        return torch.cat(released).float()

    @abstractmethod
    def _poison(
        self,
        surrogate: nn.Module,
        y: Tensor,  # float32 [N, num_classes] on the CPU
        images: Tensor,  # float32 [N, C, H, W] on the surrogate's device
    ) -> Tensor:  # [N, num_classes] on the CPU
        """The released answers for clean answers ``y``."""
