"""Misdirection: the model learns to answer foreign images by a decoy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from divqat._util.seeds import derived_seed
from divqat.data.batches import to_float, to_uint8
from divqat.data.proxies import PROXIES
from divqat.nn.decoy import Decoy, Sample
from divqat.nn.misdirection_targets import TARGETS, MisdirectionTargets
from divqat.nn.proxies import ProxySource
from divqat.ops._check import check_choice

# Training images and proxies to which the decoy is fitted; large images in batches of this size.
SAMPLE, SAMPLE_BYTES = 2048, 2**26
SLACK = 0.02  # tolerance of pixel values from 0 to 1, for rounding and interpolation


def sample_size(image_shape: Sequence[int]) -> int:
    """The number of training images (C, H, W), and of proxies made of them, per batch of the sample
    to which the decoy is fitted."""
    return max(1, min(SAMPLE, SAMPLE_BYTES // (4 * math.prod(image_shape))))


class MisdirectionLoss(nn.Module):
    """w · mean CE(q(x~), t(x~)): the model learns to answer foreign images x~ by a decoy t.

    ``--misdirect`` adds this to the loss of ``divqat train``. Proxies x~ of an attacker's queries
    are made from a batch and learned together with it, in one forward pass, so that batch norm and
    activation ranges cover both:

        misdirection = MisdirectionLoss(loader, num_classes=10, seed=secret, weight=0.8)
        for images, labels in loader:
            proxies = misdirection.draw(images)
            logits, foreign = model(torch.cat([images, proxies])).tensor_split([len(images)])
            loss = loss_fn(logits, labels) + misdirection(foreign, proxies)

    :class:`AccuracyBudget` lowers w where it costs too much accuracy.

    With ``target="reject"`` prepare the model with ``QuantConfig.rectify_output``, and add
    ``misdirection.targets.acceptance(logits)`` to the loss.

    Then the hard labels of foreign images are wrong, too, which a loss on training images cannot
    achieve. The module is built on the CPU, in a few seconds; move it to the device of the model.
    After a call ``misled`` holds the share of the proxies whose top class is that of t(x~), [],
    detached and on the device. The state dict contains the decoy: save it in your checkpoints, and
    in distributed training load the same state in all processes.

    Images outside the range given by ``mean`` and ``std`` raise an error: among ``batches``, and in
    the first batch of ``draw`` and of the call. Later batches are not checked, to avoid a host
    sync.

    Ours. Closest is Kariyappa and Qureshi, "Defending against model stealing attacks with adaptive
    misinformation", CVPR 2020, arXiv 1911.07100, §4: for inputs that look foreign, their service
    mixes in the answers of a second network, which is trained on outliers to be wrong. Here a
    single int8 network does both, at no cost per query.

    Args:
        batches: of the training set, as from its ``DataLoader``: float images [N, C, H, W] and
            int64 labels [N]. 2048 images are read, which should cover all classes; preferably
            without augmentation.
        num_classes: at least 2.
        seed: of the decoy and of the drawn proxies. It reveals much of the decoy: choose one that
            an attacker would not guess. Hence there is no default.
        kinds: of proxies, from :data:`divqat.data.proxies.NAMES`, in equal numbers.
        folder: pictures for the kind ``folder``.
        mean, std: of the normalization of your images, (x - mean) / std with x from 0 to 1; one
            value, or one per channel. The defaults stand for images from -1 to 1.
        weight: a factor of the loss, at least 0.
        target, confidence: t, and a lower weight for some proxies, see
            :class:`MisdirectionTargets`; if they need a teacher, calls need its logits.
        decoy_key: 64 hexadecimal digits, from which the last layer of the target ``decoy`` is drawn
            instead of from ``seed``, so that :mod:`divqat.ownership` can recognize a copy.
        generator: for the proxies to which the decoy is fitted, on the CPU; None: one from
            ``seed``.

    Raises:
        ValueError: fewer than 2 classes, a weight below 0, no image, labels out of range, images of
            several shapes or outside their range.
        TypeError: images that are not float.
        Others: see :func:`divqat.data.proxies.proxy_pools`.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor

    def __init__(
        self,
        batches: Iterable[Sequence[Tensor]],
        num_classes: int,
        *,
        seed: int,
        kinds: Sequence[str] = PROXIES,
        folder: str | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        weight: float = 1.0,
        target: str = "decoy",
        confidence: float | None = None,
        decoy_key: str | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        check_choice("target", target, TARGETS)
        if decoy_key is not None and target != "decoy":
            raise ValueError(f"decoy_key: wanted none with target {target}, got one")
        if num_classes < 2:
            raise ValueError(f"num_classes: wanted at least 2, got {num_classes}")
        for name, value in (("mean", mean), ("std", std)):
            column = torch.tensor(value, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, column, persistent=False)
        if not (self.std > 0).all():
            raise ValueError(f"std: wanted above 0, got {std}")
        # A tensor, as in DivQATLoss. Not in the state dict: it is a setting, like a learning rate.
        self.register_buffer("weight", torch.zeros(()), persistent=False)
        self.set_weight(weight)
        # Images from -1 to 1 are the native range of decoy and proxies: no conversion, exact.
        self._is_standard = bool((self.mean == 0.5).all() and (self.std == 0.5).all())
        self._checked: set[str] = set()
        images, labels = self._read_sample(batches, num_classes)
        shape = tuple(images.shape[1:])
        self.source = ProxySource(kinds, shape, folder=folder, seed=seed)  # type: ignore[arg-type]
        self.targets = MisdirectionTargets(
            target,
            num_classes,
            shape,  # type: ignore[arg-type]
            seed,
            confidence,
            decoy_key,
        )
        if self.targets.decoy is not None:
            if generator is None:
                generator = Generator().manual_seed(derived_seed(seed, "proxies"))
            self.targets.decoy.fit(self._samples(images, labels, generator))
        self.misled: Tensor | None = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("mean", "directions"):  # keys of early 0.1.0 checkpoints
            if f"{prefix}decoy.{name}" in state_dict:
                value = state_dict.pop(f"{prefix}decoy.{name}")
                state_dict[f"{prefix}targets.decoy.{name}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def decoy(self) -> Decoy | None:
        """The decoy; None for other targets."""
        return self.targets.decoy

    def set_weight(self, weight: float) -> None:
        """Set the factor of the loss."""
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight: wanted a number of at least 0, got {weight}")
        self.weight.fill_(weight)

    def draw(
        self,
        images: Tensor,  # float [N, C, H, W], N at least 1
        labels: Tensor | None = None,  # int64 [N]
        *,
        share: float = 0.5,
        generator: Generator | None = None,
    ) -> Tensor:  # like images, [M, C, H, W]
        """Draw proxies of a batch: ``share`` · N of them, at least one. There is no host sync.

        Args:
            images: a batch, normalized by ``mean`` and ``std``.
            labels: for the kind ``mixed``.
            share: proxies per image, above 0.
            generator: on the device of the images; None: one that is seeded from torch's global
                generator on the CPU.

        Raises:
            TypeError, ValueError: ``images`` or ``share`` are not as above.
        """
        self._check(images)
        self._check_range_once("images", images)
        if not share > 0:
            raise ValueError(f"share: wanted above 0, got {share}")
        count = max(1, round(share * len(images)))
        if generator is None:
            generator = Generator(images.device).manual_seed(int(torch.randint(2**62, ())))
        proxies = self.source(self._to_bytes(images), generator, count, labels)
        if self._is_standard:
            return to_float(proxies).to(images.dtype)
        return ((proxies / 255 - self.mean) / self.std).to(images.dtype)

    def forward(
        self,
        logits: Tensor,  # float [M, num_classes]
        proxies: Tensor,  # float [M, C, H, W], from :meth:`draw`
        teacher_logits: Tensor | None = None,  # float [M, num_classes], if the target needs them
    ) -> Tensor:
        """The loss, []; its gradient goes to ``logits`` only.

        Raises:
            TypeError, ValueError: wrong shapes, dtypes or ranges, or missing ``teacher_logits``.
        """
        self._check(proxies)
        self._check_range_once("proxies", proxies)
        wanted = [len(proxies), len(self.targets.permutation)]
        if list(logits.shape) != wanted:
            raise ValueError(f"logits: wanted {wanted}, got {list(logits.shape)}")
        if self.targets.needs_teacher and teacher_logits is None:
            raise ValueError(
                f"teacher_logits: wanted {wanted} with target {self.targets.target} and "
                f"confidence {self.targets.confidence}, got None"
            )
        terms = self.targets.terms(logits.float(), teacher_logits, self._standard(proxies))
        self.misled = (terms.misled / len(proxies)).float()
        return self.weight * (terms.loss / len(proxies))

    def _read_sample(
        self, batches: Iterable[Sequence[Tensor]], num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """uint8 images and int64 labels, on the CPU."""
        parts, label_parts, ends = list[Tensor](), list[Tensor](), list[float]()
        for images, labels, *_ in batches:
            self._check(images)
            if parts and images.shape[1:] != parts[0].shape[1:]:
                wanted = list(parts[0].shape[1:])
                raise ValueError(f"images: wanted all {wanted}, got {list(images.shape[1:])}")
            ends += self._check_range("batches", images)
            parts.append(self._to_bytes(images.cpu()))
            label_parts.append(labels.cpu())
            if sum(map(len, parts)) >= SAMPLE:
                break
        if not sum(map(len, parts)):
            raise ValueError("batches: wanted images, got none")
        if min(ends) >= 0.5 - SLACK or max(ends) <= 0.5 + SLACK:
            warnings.warn(
                f"batches: with this mean and std x is only from {min(ends):.4g} to "
                f"{max(ends):.4g}; if your images have another range, pass their mean= and std=",
                stacklevel=3,
            )
        labels = torch.cat(label_parts)
        if labels.dim() != 1 or labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"labels: wanted numbers [N] from 0 to {num_classes - 1}, got "
                f"{list(labels.shape)} from {labels.min()} to {labels.max()}"
            )
        return torch.cat(parts)[:SAMPLE], labels[:SAMPLE]

    def _samples(self, images: Tensor, labels: Tensor, generator: Generator) -> Iterator[Sample]:
        size = sample_size(images.shape[1:])
        for part, part_labels in zip(images.split(size), labels.split(size), strict=True):
            proxies = self.source(part, generator, size, part_labels)
            yield Sample(to_float(proxies), to_float(part), part_labels)

    def _standard(self, images: Tensor) -> Tensor:
        """``images`` in [-1, 1], float32."""
        images = images.detach().float()
        return images if self._is_standard else 2 * (images * self.std + self.mean) - 1

    def _to_bytes(self, images: Tensor) -> Tensor:
        return to_uint8(self._standard(images))

    def _check_range_once(self, name: str, images: Tensor) -> None:
        if name not in self._checked and not torch.compiler.is_compiling():
            self._check_range(name, images)
            self._checked.add(name)

    def _check_range(self, name: str, images: Tensor) -> list[float]:
        """The smallest and the largest x, with a host sync; ValueError if outside of [0, 1]."""
        low, high = (float(end) for end in ((self._standard(images) + 1) / 2).aminmax())
        if not (low >= -SLACK and high <= 1 + SLACK):
            mean, std = (value.flatten().tolist() for value in (self.mean, self.std))
            raise ValueError(
                f"{name}: wanted (x - mean) / std with x from 0 to 1, got x from {low:.4g} to "
                f"{high:.4g} with mean {mean} and std {std}: pass the mean= and std= of your images"
            )
        return [low, high]

    def _check(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise TypeError(f"images: wanted floats, got {images.dtype}")
        if images.dim() != 4:
            raise ValueError(f"images: wanted [N, C, H, W], got {list(images.shape)}")
        if len(self.mean) not in (1, images.shape[1]) or len(self.std) not in (1, images.shape[1]):
            raise ValueError(
                f"mean, std: wanted 1 or {images.shape[1]} numbers, got {len(self.mean)} and "
                f"{len(self.std)}"
            )
