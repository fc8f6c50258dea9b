"""FixMatch: a few labels, the victim's answers, and consistency on unlabeled images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from divqat._util.settings import option
from divqat.attacks.attack import Task
from divqat.attacks.controlled import Draws, SemiSupervised, shifted, without_labels
from divqat.attacks.training import Loss
from divqat.data.batches import to_float
from divqat.data.strong import strongly_augmented


@dataclass(frozen=True, kw_only=True)
class FixMatch(SemiSupervised):
    """A thief with labeled images who learns from the answers and by FixMatch.

    Sohn, Berthelot, Li, Zhang, Carlini, Cubuk, Kurakin, Zhang, Raffel, "FixMatch: Simplifying
    Semi-Supervised Learning with Consistency and Confidence" (NeurIPS 2020, section 2, algorithm
    1), with its tau, mu and lambda. A step has B = ``batch_size`` labeled images x, as many queried
    ones z with answers t, and mu B images u of the whole query set, queried or not:

        L = 1/B sum -log f(weak(x))_y + answers/B sum_z -sum_k t_k log f(z)_k
            + lambda/(mu B) sum_u [max q >= tau] (-log f(strong(u))_argmax q),   q = f(weak(u)),

    f the softmax of the clone; q has no gradient. Weak: shifts by up to an eighth of the side, and
    with ``flip`` mirrored; strong: :func:`divqat.data.strong.strongly_augmented`. An epoch is a
    pass over the queried images; labeled and unlabeled images are drawn with replacement.

    Deviations: the second term, as the paper has no victim; RandAugment, not CTAugment; far fewer
    steps than 2^20, with a cosine to 0; the clone is that of the last step, not an average of the
    weights. All images of a step share their batch statistics, as in the authors' code.

    Args:
        batch_size: B.
        threshold, ratio, consistency: tau, mu and lambda.
        answers: weight of the answers.
        reading: how an answer becomes t.

    Raises:
        See :class:`LabeledAttack`.
    """

    threshold: float = option(0.95, "Least confidence of a pseudo-label.", least=0, most=1)
    ratio: int = option(7, "Unlabeled images per labeled one.", least=1)
    consistency: float = option(1.0, "Weight of the consistency loss.", least=0)
    answers: float = option(1.0, "Weight of the loss of the answers.", least=0)

    def _loss(self, task: Task) -> Loss:
        labeled = Draws(task, self._labeled(task))
        unlabeled = Draws(task, without_labels(task.query_set))
        shift = round(max(task.query_set.shape[2:]) / 8)

        def loss(clone: nn.Module, images: Tensor, targets: Tensor, done: float) -> Tensor:
            x, labels = labeled(self.batch_size)
            u, _ = unlabeled(self.ratio * self.batch_size)
            x, weak = (shifted(part, shift, self.flip) for part in (x, u))
            strong = strongly_augmented(u, _generator(u))
            batch = torch.cat([images, *map(to_float, (x, weak, strong))])
            logits = clone(batch).split([len(images), len(x), len(u), len(u)])
            return (
                self.answers * F.cross_entropy(logits[0], targets)
                + F.cross_entropy(logits[1], labels)
                + self.consistency * consistency(logits[2], logits[3], self.threshold)
            )

        return loss


def consistency(
    weak: Tensor,  # logits [N, num_classes]
    strong: Tensor,  # logits [N, num_classes]
    threshold: float,
) -> Tensor:  # []
    """The mean over N of the cross-entropy of ``strong`` with the classes of ``weak``, 0 where
    their probability is below ``threshold``; only ``strong`` gets a gradient."""
    confidence, classes = weak.detach().softmax(1).max(1)
    losses = F.cross_entropy(strong, classes, reduction="none")
    return (losses * (confidence >= threshold)).mean()


def _generator(like: Tensor) -> Generator:
    """A generator on the device of ``like``, seeded by torch's global CPU generator."""
    return Generator(like.device).manual_seed(int(torch.randint(2**62, ())))
