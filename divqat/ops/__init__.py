"""The ops of divqat: differentiable functions over ``torch.ops.divqat.*``."""

from divqat.ops import _backend
from divqat.ops._backend import backend, backends
from divqat.ops._native import describe as native_kernels
from divqat.ops.divergence_loss import divergence_loss, divergence_loss_terms
from divqat.ops.fake_quantize import fake_quantize
from divqat.ops.fake_quantize_lsq import fake_quantize_lsq
from divqat.ops.fake_quantize_observed import fake_quantize_observed
from divqat.ops.fake_quantize_weights import fake_quantize_weights

__all__ = [
    "backend",
    "backends",
    "divergence_loss",
    "divergence_loss_terms",
    "fake_quantize",
    "fake_quantize_lsq",
    "fake_quantize_observed",
    "fake_quantize_weights",
    "native_kernels",
]

_backend.start()
