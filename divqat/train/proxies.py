"""The proxies of a thief's images that are added to training batches."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import islice

from torch import Generator, Tensor

from divqat._util.seeds import derived_seed
from divqat.data import LabeledImages
from divqat.data.batches import augment, batches, to_float, to_uint8
from divqat.data.proxies import PROXIES
from divqat.nn import MisdirectionLoss
from divqat.nn.misdirection import SAMPLE, sample_size
from divqat.nn.proxies import ProxySource
from divqat.train.distributed import World
from divqat.train.settings import DataSettings, MisdirectionSettings


def fit_misdirection(
    settings: MisdirectionSettings, seed: int, num_classes: int, train_set: LabeledImages
) -> MisdirectionLoss:
    """The misdirection of a training, on the CPU, with its decoy fitted to proxies of the training
    images. It is the same in every process."""
    generator = _sample_generator(seed)
    batch_size = min(sample_size(train_set.image_shape), len(train_set))
    return MisdirectionLoss(
        batches(train_set, batch_size, generator=generator),
        num_classes,
        seed=seed,
        kinds=settings.proxies or PROXIES,
        folder=settings.proxy_root,
        target=settings.misdirect_target,
        confidence=settings.proxy_confidence,
        decoy_key=settings.decoy_key,
        generator=generator,
    )


def _sample_generator(seed: int) -> Generator:
    return Generator().manual_seed(derived_seed(seed, "proxies"))


class Proxies:
    """Draws the proxies of each step.

    Each process draws its own from its own images, so another number of processes gives other
    proxies of the same kinds.

    Args:
        source: what they are drawn from, on the device of ``world``.
        seed: of the training.
        world: this process, its device and the number of processes.
        pad, flip: the augmentation of the training images, which proxies get, too. Otherwise its
            black edges would distinguish them, and the model would learn to recognize these.
    """

    def __init__(
        self, source: ProxySource, seed: int, world: World, *, pad: int = 0, flip: bool = False
    ) -> None:
        self.source, self.seed, self.world = source, seed, world
        self.pad, self.flip = pad, flip
        self.generator, self.shifts = Generator(world.device), Generator()

    @classmethod
    def from_settings(
        cls,
        settings: MisdirectionSettings,
        data: DataSettings,
        seed: int,
        misdirection: MisdirectionLoss | None,
        train_set: LabeledImages,
        world: World,
    ) -> Proxies:
        """The proxies of a training, from the source of its misdirection if it has one."""
        if misdirection is not None:
            source = misdirection.source
        else:
            shape, folder = train_set.image_shape, settings.proxy_root
            source = ProxySource(settings.proxies or PROXIES, shape, folder=folder, seed=seed)
        return cls(source.to(world.device), seed, world, pad=data.pad, flip=data.flip)

    def start(self, epoch: int) -> None:
        """Seed the generators for ``epoch``, counted from 1."""
        self.generator.manual_seed(derived_seed(self.seed, "proxies", epoch, self.world.rank))
        self.shifts.manual_seed(derived_seed(self.seed, "proxy shifts", epoch, self.world.rank))

    def sample(self, train_set: LabeledImages) -> Iterator[Tensor]:
        """About 2048 proxies on the CPU, in batches of float32 [M, C, H, W]; the same in every
        process and on every device."""
        generator, count = _sample_generator(self.seed), sample_size(train_set.image_shape)
        loader = batches(train_set, min(count, len(train_set)), generator=generator)
        on_cpu = self.world.device.type == "cpu"
        source = self.source if on_cpu else deepcopy(self.source).cpu()
        for images, labels in islice(loader, -(-SAMPLE // count)):
            yield to_float(source(to_uint8(images).cpu(), generator, count, labels.cpu()))

    def __call__(
        self,
        images: Tensor,  # float32 [n, C, H, W], a batch of training images
        labels: Tensor,  # int64 [n]
        total: int,  # proxies of the step, in all processes
    ) -> Tensor:  # float32 [m, C, H, W]
        count = len(range(self.world.rank, total, self.world.size))
        proxies = to_float(self.source(to_uint8(images), self.generator, count, labels))
        if not (self.pad or self.flip):
            return proxies
        return augment(proxies, self.shifts, pad=self.pad, flip=self.flip)
