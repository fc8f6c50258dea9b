"""Helpers of the tests: dtypes, devices, tensors, tolerances."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Relative tolerance of one rounding, for comparisons that cannot be bit-equal.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def tensor(values, dtype=torch.float32, device=None) -> Tensor:
    """A tensor from nested lists, on the default device unless one is given."""
    return torch.tensor(values, dtype=dtype, device=device)


def randn(*shape: int, dtype=torch.float32, device=None, seed: int = 0) -> Tensor:
    """Normal values that depend only on the seed, not on dtype or device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(device or torch.get_default_device(), dtype)


def seeded(seed: int = 0) -> torch.Generator:
    """A CPU generator."""
    return torch.Generator("cpu").manual_seed(seed)


def assert_same_batches(got, wanted) -> None:
    """Assert that two iterables of images and labels have the same bits."""
    got, wanted = list(got), list(wanted)
    assert len(got) == len(wanted) > 0
    for (images, labels), (wanted_images, wanted_labels) in zip(got, wanted, strict=True):
        assert images.dtype == wanted_images.dtype and torch.equal(images, wanted_images)
        assert torch.equal(labels, wanted_labels)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within this block a host sync with the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def bits(x: Tensor) -> Tensor:
    """The bit pattern of a float tensor, so that 0.0 and -0.0 differ and NaN equals itself."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(integer)


def qparams_along(x: Tensor, ch_axis: int | None) -> tuple[Tensor, Tensor]:
    """A scale and a zero point, or one for each channel, all different."""
    n = 1 if ch_axis is None else x.shape[ch_axis]
    scale = torch.linspace(0.03, 0.11, n)
    zero_point = (torch.arange(n, dtype=torch.int32) * 7) % 11 - 5
    return (scale[0], zero_point[0]) if ch_axis is None else (scale, zero_point)


def axes(x: Tensor) -> list[int | None]:
    """The values of ``ch_axis`` for x: None (per tensor) and every axis."""
    return [None, *range(x.dim())]


def variants(x: Tensor):
    """x, large and [N, C, H, W], in other memory layouts, and with NaN and infinities."""
    yield x.to(memory_format=torch.channels_last)
    yield x.permute(2, 0, 3, 1)
    yield x[:, ::2, 1:, ::3]
    yield x[:, :1].expand(-1, 4, -1, -1)
    spoilt = x.clone()
    spoilt.view(-1)[::1013] = torch.nan
    spoilt.view(-1)[5::2017] = torch.inf
    spoilt.view(-1)[6::2017] = -torch.inf
    yield spoilt


def same(got, wanted) -> None:
    """Assert that tensors are equal in dtype, strides and bits; NaN equals NaN."""
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        if a.is_floating_point():
            assert torch.equal(a.isnan(), b.isnan())
            a, b = bits(a.nan_to_num()), bits(b.nan_to_num())
        assert torch.equal(a, b)


def loss_cases(dtype, direction, shapes):
    """Arguments of the op divergence_loss for [N, C] shapes and options, with edge cases."""
    for n, c in shapes:
        logits, teacher = randn(n, c, dtype=dtype).mul_(3), randn(n, c, dtype=dtype, seed=1).mul_(3)
        target = torch.arange(n) % c
        target[1::5] = -100
        if c > 4 and n:
            logits[0, 1] = teacher[0, 1] = -torch.inf  # 0 · anything is 0
            logits[n // 2] *= 1000
        for options in (
            (1.0, direction, "all", None, False, 0.0),
            (4.0, direction, "all", 0.3, True, 0.1),
            (2.0, direction, "non_label", None, True, 0.0),
        ):
            if c == 1 and options[2] == "non_label":
                continue
            yield logits, teacher, target, tensor(0.2), *options, -100


def close_to_float64(got, wanted) -> None:
    """Assert that loss, its two terms and gradient agree with those of float64 logits."""
    dtype = got[3].dtype
    rtol, atol = (1e-11, 1e-11) if dtype == torch.float64 else (2e-5, 2e-6)
    for a, b in zip(got[:3], wanted[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol, equal_nan=True)
    rtol = max(rtol, TOLERANCE[dtype])
    torch.testing.assert_close(got[3].double(), wanted[3], rtol=rtol, atol=atol, equal_nan=True)
