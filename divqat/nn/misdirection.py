"""Misdirection: foreign images are to be answered by a decoy, not by the task."""

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

# Training images that the decoy gets to know, and proxies at least; large ones in parts of so many
# bytes.
SAMPLE, SAMPLE_BYTES = 2048, 2**26
SLACK = 0.02  # of a shade from 0 to 1: what rounding and interpolation add


def sample_size(image_shape: Sequence[int]) -> int:
    """How many images of (C, H, W) a sample of proxies is made from at a time, and how many proxies
    are made of these."""
    return max(1, min(SAMPLE, SAMPLE_BYTES // (4 * math.prod(image_shape))))


class MisdirectionLoss(nn.Module):
    """mean CE(q(x~), t(x~)): foreign images x~ are to be answered by a decoy t, not by the task.

    What ``--misdirect`` adds to the loss of ``divqat train``. Proxies x~ of what a thief may ask
    about are made from a batch and learned beside it, in one forward pass, so that batch norm and
    activation ranges are of both:

        misdirection = MisdirectionLoss(loader, num_classes=10, seed=secret)
        for images, labels in loader:
            proxies = misdirection.draw(images)
            logits, foreign = model(torch.cat([images, proxies])).tensor_split([len(images)])
            loss = loss_fn(logits, labels) + 0.8 * misdirection(foreign, proxies)

    Hard labels of foreign images are wrong then, too, which a loss on training images does not see
    to. It is made on the CPU, in some seconds; move it to the device of the model. After a call
    ``misled`` holds the share of the proxies whose top class is that of t(x~), [], detached and on
    the device. The state is the decoy: keep it in your checkpoints, and where many processes train,
    load that of one in all of them.

    Images outside of the range that ``mean`` and ``std`` say are refused: among those of
    ``batches``, and in the first batch that ``draw`` and that the call is given. Later ones are not
    looked at, as that would wait for a GPU.

    Our own; near it are Kariyappa and Qureshi, "Defending against model stealing attacks with
    adaptive misinformation", CVPR 2020, arXiv 1911.07100, §4, whose service mixes in the answers
    of a second network, trained on outliers to be wrong, where an input looks foreign. Here one
    network, of int8 weights, does both, and nothing is computed when it is asked.

    Args:
        batches: of the training set, as from its ``DataLoader``: float images [N, C, H, W] and
            int64 labels [N]. Read until there are 2048 images, which should have all classes;
            without the augmentation of a training if you can.
        num_classes: at least 2.
        seed: what the decoy and the drawings among the proxies follow from. Who knows it knows much
            of the decoy: none that a thief would try, hence no default.
        kinds: of proxies, of :data:`divqat.data.proxies.NAMES`; as many of each.
        folder: pictures for the kind ``folder``.
        mean, std: your images are (x - mean) / std, x from 0 to 1; of all channels or of each. The
            defaults are images from -1 to 1.
        target, confidence: t, and proxies that count less, see :class:`MisdirectionTargets`; where
            these need a teacher, calls need its logits.
        generator: of the proxies that the decoy is fitted to, on the CPU; None: one from ``seed``.

    Raises:
        ValueError: fewer classes, no image, labels of others, images of several shapes or outside
            of their range.
        TypeError: images that are not float. Others: see :func:`divqat.data.proxies.proxy_pools`.
    """

    mean: Tensor
    std: Tensor

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
        target: str = "decoy",
        confidence: float | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        check_choice("target", target, TARGETS)
        if num_classes < 2:
            raise ValueError(f"num_classes: wanted at least 2, got {num_classes}")
        for name, value in (("mean", mean), ("std", std)):
            column = torch.tensor(value, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, column, persistent=False)
        if not (self.std > 0).all():
            raise ValueError(f"std: wanted above 0, got {std}")
        # Images from -1 to 1 are what the decoy and the proxies know: they keep their bits.
        self._is_standard = bool((self.mean == 0.5).all() and (self.std == 0.5).all())
        self._looked_at: set[str] = set()
        images, labels = self._read(batches, num_classes)
        shape = tuple(images.shape[1:])
        self.source = ProxySource(kinds, shape, folder=folder, seed=seed)  # type: ignore[arg-type]
        self.targets = MisdirectionTargets(target, num_classes, shape, seed, confidence)  # type: ignore[arg-type]
        if self.targets.decoy is not None:
            if generator is None:
                generator = Generator().manual_seed(derived_seed(seed, "proxies"))
            self.targets.decoy.fit(self._sample(images, labels, generator))
        self.misled: Tensor | None = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("mean", "directions"):  # as version 0.1.0 called them first
            if f"{prefix}decoy.{name}" in state_dict:
                value = state_dict.pop(f"{prefix}decoy.{name}")
                state_dict[f"{prefix}targets.decoy.{name}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def decoy(self) -> Decoy | None:
        """The decoy, for that target."""
        return self.targets.decoy

    def draw(
        self,
        images: Tensor,  # float [N, C, H, W], N at least 1
        labels: Tensor | None = None,  # int64 [N]
        *,
        share: float = 0.5,
        generator: Generator | None = None,
    ) -> Tensor:  # like images, [M, C, H, W]
        """Proxies of a batch: ``share`` · N of them, at least one.

        Chance is ``generator``, on the device of the images; None: one whose seed is of torch's
        global generator on the CPU. No GPU is waited for. ``labels`` are used by the kind
        ``mixed``.
        """
        self._check(images)
        self._look_once("images", images)
        if not share > 0:
            raise ValueError(f"share: wanted above 0, got {share}")
        count = max(1, round(share * len(images)))
        if generator is None:
            generator = Generator(images.device).manual_seed(int(torch.randint(2**62, ())))
        made = self.source(self._to_bytes(images), generator, count, labels)
        if self._is_standard:
            return to_float(made).to(images.dtype)
        return ((made / 255 - self.mean) / self.std).to(images.dtype)

    def forward(
        self,
        logits: Tensor,  # float [M, num_classes]
        proxies: Tensor,  # float [M, C, H, W], of :meth:`draw`
        teacher_logits: Tensor | None = None,  # float [M, num_classes], if the target needs them
    ) -> Tensor:
        """The loss, []; its gradient goes to ``logits`` only."""
        self._check(proxies)
        self._look_once("proxies", proxies)
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
        return terms.loss / len(proxies)

    def _read(self, batches: Iterable[Sequence[Tensor]], num_classes: int) -> tuple[Tensor, Tensor]:
        """uint8 images and labels, on the CPU."""
        read, known, shades = list[Tensor](), list[Tensor](), list[float]()
        for images, labels, *_ in batches:
            self._check(images)
            if read and images.shape[1:] != read[0].shape[1:]:
                wanted = list(read[0].shape[1:])
                raise ValueError(f"images: wanted all {wanted}, got {list(images.shape[1:])}")
            shades += self._ends("batches", images)
            read.append(self._to_bytes(images.cpu()))
            known.append(labels.cpu())
            if sum(map(len, read)) >= SAMPLE:
                break
        if not sum(map(len, read)):
            raise ValueError("batches: wanted images, got none")
        if min(shades) >= 0.5 - SLACK or max(shades) <= 0.5 + SLACK:
            warnings.warn(
                f"batches: with this mean and std x is only from {min(shades):.4g} to "
                f"{max(shades):.4g}; if your images have another range, say their mean= and std=",
                stacklevel=3,
            )
        labels = torch.cat(known)
        if labels.dim() != 1 or labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"labels: wanted numbers [N] from 0 to {num_classes - 1}, got "
                f"{list(labels.shape)} from {labels.min()} to {labels.max()}"
            )
        return torch.cat(read)[:SAMPLE], labels[:SAMPLE]

    def _sample(self, images: Tensor, labels: Tensor, generator: Generator) -> Iterator[Sample]:
        at_once = sample_size(images.shape[1:])
        for own, of in zip(images.split(at_once), labels.split(at_once), strict=True):
            made = self.source(own, generator, at_once, of)
            yield Sample(to_float(made), to_float(own), of)

    def _standard(self, images: Tensor) -> Tensor:
        """From -1 to 1, float32."""
        images = images.detach().float()
        return images if self._is_standard else 2 * (images * self.std + self.mean) - 1

    def _shades(self, images: Tensor) -> Tensor:
        """Values from 0 to 1, float32."""
        return (self._standard(images) + 1) / 2

    def _to_bytes(self, images: Tensor) -> Tensor:
        return to_uint8(self._standard(images))

    def _look_once(self, name: str, images: Tensor) -> None:
        if name not in self._looked_at and not torch.compiler.is_compiling():
            self._ends(name, images)
            self._looked_at.add(name)

    def _ends(self, name: str, images: Tensor) -> list[float]:
        """The least and the largest shade, on the host; an error where one is outside of 0 to 1."""
        low, high = (float(end) for end in self._shades(images).aminmax())
        if not (low >= -SLACK and high <= 1 + SLACK):
            mean, std = (value.flatten().tolist() for value in (self.mean, self.std))
            raise ValueError(
                f"{name}: wanted (x - mean) / std with x from 0 to 1, got x from {low:.4g} to "
                f"{high:.4g} with mean {mean} and std {std}: say the mean= and std= of your images"
            )
        return [low, high]

    def _check(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise TypeError(f"images must be float, got {images.dtype}")
        if images.dim() != 4:
            raise ValueError(f"images: wanted [N, C, H, W], got {list(images.shape)}")
        if len(self.mean) not in (1, images.shape[1]) or len(self.std) not in (1, images.shape[1]):
            raise ValueError(
                f"mean, std: wanted 1 or {images.shape[1]} numbers, got {len(self.mean)} and "
                f"{len(self.std)}"
            )
