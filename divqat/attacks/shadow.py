"""Shadow victims: train networks with the victim's defense, and learn from them to undo it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from divqat._util.settings import option
from divqat.attacks.answers import READINGS, reading
from divqat.attacks.attack import Extraction, Task
from divqat.attacks.controlled import Controlled
from divqat.attacks.ddae import recovery_network, reinitialized, train
from divqat.attacks.labeled import learn_labels
from divqat.attacks.training import Loss
from divqat.data.batches import to_float, to_uint8
from divqat.data.proxies import PROXIES, proxy_batch
from divqat.data.sets import ImageSet
from divqat.metrics import predict, softmax
from divqat.nn.decoy import Decoy, Sample, coarse_picture

USUAL, CONTROL = "standardized2", "shuffled"  # values of ``reading``
BATCHES, BATCH = 8, 256  # of proxies that a decoy is fitted to: as many as for a victim


@dataclass(frozen=True, kw_only=True)
class Shadow(Controlled):
    """KnockoffNets whose clone learns answers from which the misdirection is removed.

    Ours, against :class:`divqat.nn.MisdirectionLoss`, by an attacker who knows everything about it
    but its seed; shadow models come from D-DAE, see :class:`divqat.attacks.DDAE`. Each shadow
    victim has the clone's architecture with new weights. It first learns the labeled images; its
    answers to the queries are then the *clean* ones. It is trained further like the victim,

        L = CE(f(x), y) + w CE(f(x~), t(x~)),

    with proxies x~ of the labeled images and a decoy t, with its own seed, that is fitted to such
    proxies. Its answers are now the *defended* ones, in the victim's format. D-DAE's network learns
    to recover clean from defended answers, over all shadows, and is applied to the victim's.

    A shadow stays in full precision: rounding to int8 changes its answers much less than the
    misdirection does. The network may learn from coarse pictures alone what the shadows know about
    the labeled images. Hence only the accuracy beyond the control ``reading="shuffled"`` is due to
    the victim. The attack makes the answers of an undefended victim worse.

    Args:
        shadow_pad: largest shift of the labeled images; ``flip`` also applies to them.
        misdirect: w.
        proxy_share: proxies per labeled image of a step; more than for the victim, as few images
            make few steps.
        pictures: the network also sees the coarse picture of the query, which the decoy uses.
        pairs: maximum number of pairs of defended and clean answers, at random from all shadows.
        reading: how a *recovered* answer becomes the clone's target. Estimates differ little, hence
            ``standardized2``. ``shuffled`` recovers answers to other images, then also uses
            ``standardized2``.

    Raises:
        FloatingPointError: the loss of the clone or of a shadow is no longer finite.
        Others: see :class:`LabeledAttack`.
    """

    shadows: int = option(4, "Number of shadow victims.", least=1)
    shadow_epochs: int = option(
        120, "Passes over the labeled images, without the defense and once more with it.", least=1
    )
    shadow_lr: float = option(0.05, "Initial learning rate of a shadow.", above=0)
    shadow_batch_size: int = option(50, "Labeled images per step of a shadow.", least=1)
    shadow_pad: int = option(2, "Largest random shift of the labeled images, in pixels.", least=0)
    misdirect: float = option(0.3, "Weight of the shadows' misdirection.", above=0)
    proxy_share: float = option(2.0, "Proxies per labeled image of a step.", above=0)
    pictures: bool = option(True, "Also use the query's coarse picture to recover an answer.")
    pairs: int = option(100_000, "Pairs of defended and clean answers to learn from.", least=1)
    recovery_epochs: int = option(20, "Epochs of the network that recovers answers.", least=1)
    reading: str = option(
        USUAL,
        f"How a recovered answer becomes the clone's target: {READINGS} (recovers answers to other "
        "images).",
    )

    def _extract(self, task: Task) -> Extraction:
        self._labeled(task)  # images that do not fit must fail before the first query
        return super()._extract(task) if self.victim else self._alone(task)

    def _targets(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        control = self.reading == CONTROL
        stored = task.folder.load("recovered.pt")
        if stored is None:
            released = reading(CONTROL)(answers) if control else answers
            stored = {"answers": self._recover(task, images, released)}
            task.folder.save("recovered.pt", stored)
        return images, reading(USUAL if control else self.reading)(stored["answers"])

    def _recover(self, task: Task, images: Tensor, answers: Tensor) -> Tensor:
        """Estimates of the clean answers, float32 [Q, num_classes] on the CPU.

        Args:
            task: the task.
            images: the queries, uint8 [Q, C, H, W].
            answers: the released answers, float32 [Q, num_classes].
        """
        seen = self._inputs(images, as_released(answers, task.victim.answer))
        inputs, clean = self._pairs(task, images)
        torch.manual_seed(self.seed)  # independent of the random numbers that the shadows took
        network = recovery_network(task.classes, seen.shape[1]).to(task.device)
        train(network, inputs.to(task.device), clean.to(task.device), self.recovery_epochs)
        network.eval()
        with torch.no_grad():
            return network(seen.to(task.device)).cpu()

    def _pairs(self, task: Task, images: Tensor) -> tuple[Tensor, Tensor]:
        """Training data of the network: inputs [M, D], see :meth:`_inputs`, and clean answers
        [M, num_classes], both float32 on the CPU."""
        generator = Generator().manual_seed(self.seed)
        seeds = torch.randint(2**62, (self.shadows,), generator=generator).tolist()
        answered = [self._shadow(task, images, number, seed) for number, seed in enumerate(seeds)]
        chosen = torch.randperm(self.shadows * len(images), generator=generator)[: self.pairs]
        inputs = torch.cat([self._inputs(images, defended) for _, defended in answered])
        return inputs[chosen], torch.cat([clean for clean, _ in answered])[chosen]

    def _inputs(self, images: Tensor, answers: Tensor) -> Tensor:
        """Answers [N, num_classes]; with ``pictures`` followed by the coarse pictures of their
        ``images``, [N, num_classes + 64 C]."""
        return (
            torch.cat([answers, coarse_picture(to_float(images))], 1) if self.pictures else answers
        )

    def _shadow(
        self, task: Task, images: Tensor, number: int, seed: int
    ) -> tuple[Tensor, Tensor]:  # float32 [Q, num_classes] each
        """Clean and defended answers of a shadow to ``images``."""
        labeled = self._labeled(task)
        learning = replace(
            self,
            epochs=self.shadow_epochs,
            lr=self.shadow_lr,
            batch_size=self.shadow_batch_size,
            pad=self.shadow_pad,
            seed=seed,
        )
        # A shadow is no result, so ``watch`` does not get it.
        part = replace(task, clone=reinitialized(task.clone, seed), watch=lambda *_: None)
        try:
            network = learn_labels(learning, part, labeled, f"shadow{number}.pt")
            clean = softmax(predict(network, images))
            defense = misdirection_loss(
                fit_decoy(labeled, task.classes, seed).to(task.device),
                self.misdirect,
                self.proxy_share,
            )
            name = f"shadow{number}-defended.pt"
            network = learn_labels(learning, part, labeled, name, defense)
        except FloatingPointError as error:  # the message says lr, but here it is shadow_lr
            raise FloatingPointError(f"shadow {number}, whose lr is shadow_lr: {error}") from error
        return clean, as_released(softmax(predict(network, images)), task.victim.answer)


def as_released(
    probs: Tensor,  # [N, num_classes]
    answer: str,
) -> Tensor:  # [N, num_classes], rows of sum 1
    """The answers of a victim with this :attr:`divqat.victim.Victim.answer`."""
    return reading("as_given" if answer == "probs" else answer)(probs)


def fit_decoy(labeled: ImageSet, classes: int, seed: int) -> Decoy:
    """A decoy, on the CPU, that is fitted to what varies between proxies of labeled images but not
    between the labeled images themselves."""
    decoy = Decoy(classes, labeled.image_shape[0], seed)
    generator, images = Generator().manual_seed(seed), labeled.images.cpu()
    batches = (to_float(proxy_batch(PROXIES, images, generator, BATCH)) for _ in range(BATCHES))
    known = to_float(images), labeled.labels.cpu()
    decoy.fit(Sample(batch, *known) for batch in batches)
    return decoy


def misdirection_loss(decoy: nn.Module, weight: float, share: float) -> Loss:
    """L = CE(f(x), y) + w mean CE(f(x~), t(x~)), x and x~ in one batch, as for the victim.

    Args:
        decoy: t, from float images [M, C, H, W] to answers [M, num_classes], rows of sum 1.
        weight: w.
        share: proxies x~ per image x, at least one in all, of the default kinds, made from the
            batch. Random numbers come from torch's global generator.
    """

    def loss(network: nn.Module, images: Tensor, targets: Tensor, done: float) -> Tensor:
        # On every device the seed comes from the CPU's global generator, seeded in every epoch.
        seed = int(torch.randint(2**62, ()))
        generator = Generator(images.device).manual_seed(seed)
        count = max(1, round(share * len(images)))
        proxies = to_float(proxy_batch(PROXIES, to_uint8(images), generator, count))
        logits = network(torch.cat([images, proxies]))
        known, foreign = logits[: len(images)], logits[len(images) :]
        return F.cross_entropy(known, targets) + weight * F.cross_entropy(foreign, decoy(proxies))

    return loss
