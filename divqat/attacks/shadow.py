"""Shadow victims: defend networks of one's own as the victim was, and learn to undo it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from divqat._util.settings import option
from divqat.attacks.answers import READINGS, reading
from divqat.attacks.attack import Extraction, Task
from divqat.attacks.ddae import renewed, restorer, train
from divqat.attacks.knockoff import KnockoffNets
from divqat.attacks.labeled import LabeledAttack, learn_labels
from divqat.attacks.training import Loss
from divqat.data.batches import to_float, to_uint8
from divqat.data.proxies import PROXIES, proxy_batch
from divqat.data.sets import ImageSet
from divqat.metrics import predict, softmax
from divqat.nn.decoy import Decoy, Sample, coarse

USUAL, CONTROL = "standardized2", "shuffled"  # of an answer's readings
PARTS, PART = 8, 256  # of the proxies that a decoy is fitted to: as many as a victim's


@dataclass(frozen=True, kw_only=True)
class Shadow(LabeledAttack, KnockoffNets):
    """KnockoffNets whose clone learns answers from which a misdirection is taken back.

    Ours, against :class:`divqat.nn.MisdirectionLoss`, by a thief who knows
    all of it but its seed; shadow models are those of D-DAE, see :class:`divqat.attacks.DDAE`. Each
    shadow victim, the clone's architecture with new weights, learns the labeled images, and its
    answers to the queries are the *clean* ones. Then it is trained on as the victim was,

        L = CE(f(x), y) + w CE(f(x~), t(x~)),

    x~ proxies of the labeled images, t a decoy with a seed of its own that is fitted to such
    proxies. Its answers are now the *defended* ones, shown as the victim shows its. D-DAE's network
    learns to get from them to the clean ones, over all shadows, and is applied to the victim's.

    A shadow stays in full precision: rounding to int8 changes its answers by much less than what is
    to be undone. The network may learn from pictures alone what the shadows know of the labeled
    images: of what the clone reaches, only what is beyond the control ``reading="shuffled"`` is the
    victim's. The answers of an undefended victim it makes worse.

    Args:
        shadow_pad: largest shift of the labeled images; ``flip`` mirrors them, too.
        misdirect: w.
        proxy_share: proxies per labeled image of a step. Few images make few steps, hence more
            than the victim has.
        pictures: the network sees the coarse picture of the query, too, which the decoy reads.
        pairs: most pairs of defended and clean answers, at random of all shadows' to all queries.
        reading: what the clone learns of the *recovered* answers; estimates differ little, hence
            ``standardized2``, as for ``shuffled``, for which answers to other images are recovered.

    Raises:
        FloatingPointError: also where a shadow's loss is no longer finite, after the queries.
        Others: see :class:`LabeledAttack`.
    """

    shadows: int = option(4, "Shadow victims.", least=1)
    shadow_epochs: int = option(
        120, "Passes over the labeled images, without the defense and once more with it.", least=1
    )
    shadow_lr: float = option(0.05, "First learning rate of a shadow.", above=0)
    shadow_batch_size: int = option(50, "Labeled images per step of a shadow.", least=1)
    shadow_pad: int = option(2, "Shift the labeled images by up to so many pixels.", least=0)
    misdirect: float = option(0.3, "Weight of the shadows' misdirection.", above=0)
    proxy_share: float = option(2.0, "Proxies per labeled image of a step.", above=0)
    pictures: bool = option(True, "Recover an answer from it and the query's coarse picture.")
    pairs: int = option(100_000, "Pairs of defended and clean answers to learn from.", least=1)
    recovery_epochs: int = option(20, "Epochs of the network that recovers answers.", least=1)
    reading: str = option(
        USUAL,
        f"What the clone learns of a recovered answer: {READINGS}, which recovers answers to other "
        "images.",
    )

    def _extract(self, task: Task) -> Extraction:
        self._labeled(task)  # here, as what does not fit must cost no query
        return super()._extract(task)

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
            images: uint8 [Q, C, H, W], what was asked.
            answers: float32 [Q, num_classes], what was released.
        """
        seen = self._seen(images, as_shown(answers, task.victim.answer))
        inputs, clean = self._pairs(task, images)
        torch.manual_seed(self.seed)  # whatever the shadows drew
        network = restorer(task.classes, seen.shape[1]).to(task.device)
        train(network, inputs.to(task.device), clean.to(task.device), self.recovery_epochs)
        network.eval()
        with torch.no_grad():
            return network(seen.to(task.device)).cpu()

    def _pairs(self, task: Task, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the network learns: inputs [M, D] as of :meth:`_seen` and clean answers
        [M, num_classes], both float32 on the CPU."""
        generator = Generator().manual_seed(self.seed)
        seeds = torch.randint(2**62, (self.shadows,), generator=generator).tolist()
        answered = [self._shadow(task, images, number, seed) for number, seed in enumerate(seeds)]
        chosen = torch.randperm(self.shadows * len(images), generator=generator)[: self.pairs]
        inputs = torch.cat([self._seen(images, defended) for _, defended in answered])
        return inputs[chosen], torch.cat([clean for clean, _ in answered])[chosen]

    def _seen(self, images: Tensor, answers: Tensor) -> Tensor:
        """Answers [N, num_classes], with ``pictures`` the coarse pictures of their ``images``
        beside them: [N, num_classes + 16 C]."""
        return torch.cat([answers, coarse(to_float(images))], 1) if self.pictures else answers

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
        # No result, so none to watch.
        own = replace(task, clone=renewed(task.clone, seed), watch=lambda *_: None)
        try:
            network = learn_labels(learning, own, labeled, f"shadow{number}.pt")
            clean = softmax(predict(network, images))
            defense = misdirecting(
                fitted(labeled, task.classes, seed).to(task.device),
                self.misdirect,
                self.proxy_share,
            )
            name = f"shadow{number}-defended.pt"
            network = learn_labels(learning, own, labeled, name, defense)
        except FloatingPointError as error:  # it names the lr of a training, which is here another
            raise FloatingPointError(f"shadow {number}, whose lr is shadow_lr: {error}") from error
        return clean, as_shown(softmax(predict(network, images)), task.victim.answer)


def as_shown(
    probs: Tensor,  # [N, num_classes]
    answer: str,
) -> Tensor:  # [N, num_classes], rows of sum 1
    """What a victim whose ``answer`` (:attr:`divqat.victim.Victim.answer`) is this shows."""
    return reading("as_given" if answer == "probs" else answer)(probs)


def fitted(labeled: ImageSet, classes: int, seed: int) -> Decoy:
    """A decoy, on the CPU, that knows what varies between proxies of labeled images and not between
    these."""
    decoy = Decoy(classes, labeled.image_shape[0], seed)
    generator, images = Generator().manual_seed(seed), labeled.images.cpu()
    parts = (to_float(proxy_batch(PROXIES, images, generator, PART)) for _ in range(PARTS))
    own = to_float(images), labeled.labels.cpu()
    decoy.fit(Sample(part, *own) for part in parts)
    return decoy


def misdirecting(decoy: nn.Module, weight: float, share: float) -> Loss:
    """L = CE(f(x), y) + w mean CE(f(x~), t(x~)), x and x~ in one batch, as the victim has them.

    Args:
        decoy: t, from float images [M, C, H, W] to answers [M, num_classes], rows of sum 1.
        weight: w.
        share: proxies x~ per image x, at least one in all; made from the batch, of the kinds that
            are the default. Chance is torch's global generator.
    """

    def loss(network: nn.Module, images: Tensor, targets: Tensor, done: float) -> Tensor:
        # On any device the global generator of the CPU decides, which an epoch starts anew.
        seed = int(torch.randint(2**62, ()))
        generator = Generator(images.device).manual_seed(seed)
        count = max(1, round(share * len(images)))
        proxies = to_float(proxy_batch(PROXIES, to_uint8(images), generator, count))
        logits = network(torch.cat([images, proxies]))
        own, foreign = logits[: len(images)], logits[len(images) :]
        return F.cross_entropy(own, targets) + weight * F.cross_entropy(foreign, decoy(proxies))

    return loss
