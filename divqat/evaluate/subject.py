"""A deployed model under evaluation, and its answers, each computed once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from divqat._util.devices import fingerprint
from divqat._util.files import file_fingerprint
from divqat._util.names import check_name
from divqat.data import ImageSet, Splits, to_float
from divqat.data.digest import digest
from divqat.metrics import predict
from divqat.victim.runners import logits_function


@dataclass(frozen=True, eq=False)
class Subject:
    """A victim.

    Args:
        name: for tables; victims of several seeds share it.
        model: anything that :class:`divqat.victim.Victim` takes: an ``nn.Module`` in eval mode, the
            path of an ONNX file, an open session, or a function from float images to logits.
        method: how it was trained; ``qat`` is the undefended control.
        seed: of its training, and of the attacks on it; None: it is attacked with every seed.
        agreement: share of test images to which the trained and the deployed model give the same
            class.
        gradients: the module, in eval mode, whose gradients a white-box attacker of ``model``
            follows: the fake-quantized model that was exported, or ``model`` itself; None: the
            robustness of ``model`` is not measured.
        decoy: from float32 images [N, C, H, W] to what ``model`` was trained to answer to foreign
            ones, [N, num_classes], for the attack that knows it; None: there is none.

    Raises:
        TypeError: ``gradients`` is not a module.
        ValueError: ``name`` cannot be the name of a folder.
    """

    name: str
    model: Any
    method: str = "unknown"
    seed: int | None = None
    agreement: float | None = None
    gradients: nn.Module | None = None
    decoy: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_name("name", self.name)
        if not isinstance(self.gradients, nn.Module | None):
            kind = type(self.gradients).__name__
            raise TypeError(f"gradients: wanted an nn.Module or None, got {kind}")

    def fingerprint(self, images: Tensor) -> str:
        """A digest of the model's file or weights, if it has them, and of its answers to uint8
        ``images`` [N, C, H, W]: an ONNX file, for example, can keep its weights in another file."""
        parts: dict[str, Any] = {"logits": predict(self.model, images)}
        if isinstance(self.model, (str, Path)):
            parts["file"] = file_fingerprint(Path(self.model))
        if isinstance(self.model, nn.Module):
            # Classes, as the last bits of the logits depend on the number of threads.
            parts = {"classes": parts["logits"].argmax(1), **self.model.state_dict()}
        return fingerprint(parts)


class CachedModel:
    """A function from float images [N, C, H, W] to logits [N, num_classes] that caches the logits
    of given images: many attacks ask about the same ones, and the model is the slow part.

    Args:
        model: see :class:`Subject`.
        images: uint8 [N, C, H, W], to be cached.
    """

    def __init__(self, model: Any, images: Tensor) -> None:
        self._logits_of = logits_function(model)
        self.logits = predict(model, images)  # [N, num_classes]
        self._rows = {key: row for row, key in enumerate(image_keys(to_float(images)))}

    def __call__(self, images: Tensor) -> Tensor:
        rows = [self._rows.get(key, -1) for key in image_keys(images)]
        known = torch.tensor(rows)
        logits = self.logits[known.clamp(min=0)]
        new = known < 0
        if new.any():
            logits[new] = self._logits_of(images[new.to(images.device)])
        return logits


class Deployed:
    """A subject, with the results that all attacks on it share.

    Args:
        subject: the victim.
        queries: the attacker's images, uint8 [N, C, H, W].
        test: the images on which victims and clones are measured.
    """

    def __init__(self, subject: Subject, queries: Tensor, test: ImageSet) -> None:
        self.subject, self.queries, self.test = subject, queries, test
        self.source = subject.fingerprint(queries[:256])

    @functools.cached_property  # a finished evaluation needs neither
    def model(self) -> CachedModel:
        """The model, with cached answers to the queries."""
        return CachedModel(self.subject.model, self.queries)

    @functools.cached_property
    def test_logits(self) -> Tensor:
        """Its logits for the test images, [N, num_classes]."""
        return predict(self.subject.model, self.test.images)


def image_keys(images: Tensor) -> list[bytes]:
    """A digest of each image of a batch [N, ...]."""
    rows = images.cpu().contiguous().flatten(1).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def data_fingerprint(splits: Splits, queries: Tensor) -> str:
    """A digest of all images and labels that an evaluation uses."""
    sets = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    parts: dict[str, Any] = {"queries": queries}
    for name, images in sets.items():
        parts |= {name: digest(images), f"{name} labels": images.labels}
    return fingerprint(parts)


def overlaps(splits: Splits, queries: Tensor) -> dict[str, int]:
    """How many images of one set are in another, pixel by pixel, by "a in b".

    Streamed sets are left out, as reading them takes too long.

    Args:
        splits: the victim's data.
        queries: uint8 [N, C, H, W].
    """
    sets = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    keys = {"queries": image_keys(queries)}
    keys |= {k: image_keys(s.images) for k, s in sets.items() if isinstance(s, ImageSet)}
    counts = {}
    for one, other in (("queries", "train"), ("queries", "test"), ("test", "train"),
                       ("validation", "test")):  # fmt: skip
        if one in keys and other in keys:
            others = set(keys[other])
            counts[f"{one} in {other}"] = sum(key in others for key in keys[one])
    return counts
