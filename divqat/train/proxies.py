"""The proxies that go with a training's batches."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import islice

from torch import Generator, Tensor

from divqat._util.seeds import derived_seed
from divqat.data import LabeledImages
from divqat.data.batches import batches, to_float, to_uint8
from divqat.nn import MisdirectionLoss
from divqat.nn.misdirection import SAMPLE, sample_size
from divqat.nn.proxies import ProxySource
from divqat.train.distributed import Team
from divqat.train.settings import MisdirectionSettings


def fitted_misdirection(
    settings: MisdirectionSettings, seed: int, num_classes: int, train_set: LabeledImages
) -> MisdirectionLoss:
    """The misdirection of a training, on the CPU, its decoy fitted to proxies of the training
    images; the same in every process."""
    generator = _sample_generator(seed)
    at_once = min(sample_size(train_set.image_shape), len(train_set))
    return MisdirectionLoss(
        batches(train_set, at_once, generator=generator),
        num_classes,
        seed=seed,
        kinds=settings.proxies,
        folder=settings.proxy_root,
        target=settings.misdirect_target,
        confidence=settings.proxy_confidence,
        generator=generator,
    )


def _sample_generator(seed: int) -> Generator:
    return Generator().manual_seed(derived_seed(seed, "proxies"))


class Proxies:
    """The proxies of each step.

    Each process draws its own, of its own images: with another number of processes they are
    others, of the same kinds.

    Args:
        source: what they are drawn from, on the team's device.
        seed: of the training. team: this process, of how many, and the device of its images.
    """

    def __init__(self, source: ProxySource, seed: int, team: Team) -> None:
        self.source, self.seed, self.team = source, seed, team
        self.generator = Generator(team.device)

    @classmethod
    def of(
        cls,
        settings: MisdirectionSettings,
        seed: int,
        misdirection: MisdirectionLoss | None,
        train_set: LabeledImages,
        team: Team,
    ) -> Proxies:
        """Those of a training; a misdirection has drawn what they come from."""
        if misdirection is not None:
            source = misdirection.source
        else:
            shape, folder = train_set.image_shape, settings.proxy_root
            source = ProxySource(settings.proxies, shape, folder=folder, seed=seed)
        return cls(source.to(team.device), seed, team)

    def start(self, epoch: int) -> None:
        """What follows are the proxies of this epoch."""
        self.generator.manual_seed(derived_seed(self.seed, "proxies", epoch, self.team.rank))

    def sample(self, train_set: LabeledImages) -> Iterator[Tensor]:
        """About 2048 proxies, float32 [M, C, H, W], in parts on the CPU; the same in every process
        and on every device."""
        generator, at_once = _sample_generator(self.seed), sample_size(train_set.image_shape)
        loader = batches(train_set, min(at_once, len(train_set)), generator=generator)
        on_cpu = self.team.device.type == "cpu"
        source = self.source if on_cpu else deepcopy(self.source).cpu()
        for images, labels in islice(loader, -(-SAMPLE // at_once)):
            own, of = to_uint8(images).cpu(), labels.cpu()
            yield to_float(source(own, generator, at_once, of))

    def __call__(
        self,
        images: Tensor,  # float32 [n, C, H, W], a batch of training images
        labels: Tensor,  # int64 [n]
        total: int,  # proxies of the step, of all processes
    ) -> Tensor:  # float32 [m, C, H, W]
        count = len(range(self.team.rank, total, self.team.size))
        return to_float(self.source(to_uint8(images), self.generator, count, labels))
