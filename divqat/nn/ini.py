"""InI: training against a simulated thief."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InI:
    """L = CE(y, V(x)) + γ d(V(x̃), S(x̃)) + δ cos(∇KL(V(x)‖S(x)), ∇CE(y, S(x)))
    + ε |∇KL(V(x̃)‖S(x̃))|, the terms after the first.

    V is the victim, which learns; x are training images and x̃ proxies of a thief's
    (:mod:`divqat.data.proxies`). S stands for the thief's clone, with random weights that stay.
    ∇ is the gradient with respect to all of these, as one vector: δ turns what a thief learns from
    V's answers away from what would teach it the task, and ε makes what it learns from foreign
    images small, by the mean of the absolute values. γ brings V's answers to foreign images near
    those of S, which knows nothing: d is the mean absolute difference of S's logits and V's centred
    log-probabilities, log p − mean log p over the classes. :func:`without_conflicts` says what
    becomes of the terms' gradients.

    Guo et al., "Isolation and Induction: Training robust deep neural networks against model
    stealing attacks", ACM MM 2023, arXiv 2308.00958; by the authors' published code
    (DIG-Beihang/InI-Model-Stealing-Defense), as its script for CIFAR-10 runs it: γ = 0.3, δ = 1,
    ε = 1000, S of V's architecture, in eval mode and untrained. As ε's is a mean over S's weights,
    1000 is a number for a ResNet-18. Otherwise than there:

    - x̃ are proxies, where it takes another data set, and as many as proxy_share says, there 1;
    - x̃ share a batch with x, and so V's BatchNorm statistics, where each has its own there;
    - what it offers besides and that script leaves off is not here: −β d(V(x), S(x)), an S that was
      trained, −entropy of V(x̃) in the place of d, and the plain sum of the gradients, of norm at
      most 10.

    Args:
        student: S, to logits [N, num_classes]; is put into eval mode. Differentiated twice.
        gamma, delta, epsilon: γ, δ, ε, at least 0. A term that counts 0 is not computed.
    """

    def __init__(self, student: nn.Module, gamma: float, delta: float, epsilon: float) -> None:
        self.student = student.eval()
        self.gamma, self.delta, self.epsilon = gamma, delta, epsilon

    def __call__(
        self,
        logits: Tensor,  # float [n + m, num_classes], V's
        labels: Tensor,  # int64 [n]
        images: Tensor,  # float [n + m, C, H, W]: n training images, then m proxies
    ) -> list[Tensor]:  # [] each
        """The terms that count, with their weights and their gradients to ``logits`` only."""
        asked = logits.detach().requires_grad_()
        # By themselves: a backward pass from the loss would go on into S.
        terms = [
            (term.detach(), *torch.autograd.grad(term, asked))
            for term in self._terms(asked, labels, images)
        ]
        moved = logits - asked.detach()  # 0, with the gradient 1
        return [value + (moved * gradient).sum() for value, gradient in terms]

    def _terms(self, logits: Tensor, labels: Tensor, images: Tensor) -> Iterator[Tensor]:
        """Each that counts, with its weight."""
        n = len(labels)
        if self.delta:
            own = self.student(images[:n])
            learned = self._gradient(_distillation(own, logits[:n]), create_graph=True)
            task = self._gradient(F.cross_entropy(own, labels))
            yield self.delta * F.cosine_similarity(learned, task, dim=0)
        if len(images) > n:
            own, theirs = self.student(images[n:]), logits[n:]
            if self.gamma:
                centred = theirs - theirs.mean(1, keepdim=True)  # log-probabilities' are the same
                yield self.gamma * (own.detach() - centred).abs().mean()
            if self.epsilon:
                learned = self._gradient(_distillation(own, theirs), create_graph=True)
                yield self.epsilon * learned.abs().mean()

    def _gradient(self, loss: Tensor, *, create_graph: bool = False) -> Tensor:
        """Of S's parameters, [number of them]."""
        parts = torch.autograd.grad(
            loss, list(self.student.parameters()), retain_graph=True, create_graph=create_graph
        )
        return torch.cat([part.flatten() for part in parts])


def _distillation(student: Tensor, victim: Tensor) -> Tensor:
    """mean KL(V‖S) but for V's entropy, which has no gradient in S; of logits [N, num_classes]."""
    return F.cross_entropy(student, victim.softmax(1))


def without_conflicts(
    losses: list[Tensor],  # float32 [] each
    parameters: list[nn.Parameter],
) -> Tensor:  # []
    """A weighted sum of the losses whose gradient is what PCGrad makes of theirs; of a single one,
    itself.

    Of each gradient g_i what points against another g_j is taken away, one j after another in
    random order: g_i ← g_i − (g_i · g_j) g_j / |g_j|² where g_i · g_j < 0. The mean of the results
    is a sum of the g_j, with weights that follow from the products of the g_j.

    Yu et al., "Gradient surgery for multi-task learning", NeurIPS 2020, arXiv 2001.06782,
    algorithm 1, there with the sum of the results; the mean is that of InI's code.
    """
    if len(losses) == 1:
        return losses[0]
    parts = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    gradients = torch.stack([torch.cat([g.flatten() for g in part]) for part in parts])
    products = gradients @ gradients.T
    left = torch.eye(len(losses), device=products.device)  # row i: g_i as a sum of the g_j
    own = torch.arange(len(losses), device=products.device)[:, None]
    for other in torch.rand_like(left).argsort(1).split(1, dim=1):
        along = (left @ products).gather(1, other)
        against = (along < 0) & (other != own)
        share = torch.where(against, along / products.diagonal()[other], 0.0)
        left = left.scatter_add(1, other, -share)
    return left.mean(0) @ torch.stack(losses)
