"""D-DAE and D-DAE+: a network that inverts the known defense."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from divqat._util.progress import progress
from divqat._util.settings import option
from divqat.attacks.attack import Task
from divqat.attacks.recovery import Recovery
from divqat.attacks.training import Training
from divqat.metrics import predict, softmax

BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class _Generative(Recovery):
    """Train a network from released to clean answers, and apply it to the victim's answers.

    The source uses 10^6 pairs, with which 200 epochs take an hour on a CPU; here there are fewer.
    """

    pairs: int = option(100_000, "Pairs of clean and released answers to make.", least=1)
    recovery_epochs: int = option(200, "Epochs of the network that recovers answers.", least=1)

    def _recover(self, task: Task, images: Tensor, answers: Tensor) -> Tensor:
        clean, rows = self._prior(task, images, answers)
        released = self._release(clean, images, rows, answers)
        torch.manual_seed(self.seed)  # independent of the random numbers that the pairs took
        network = recovery_network(answers.shape[1]).to(task.device)
        train(network, released.to(task.device), clean.to(task.device), self.recovery_epochs)
        network.eval()
        with torch.no_grad():
            return network(answers.to(task.device)).cpu()

    @abstractmethod
    def _prior(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Simulated clean answers [M, num_classes], and for each the row of its image."""


@dataclass(frozen=True, kw_only=True)
class DDAE(_Generative):
    """D-DAE (Chen et al., "D-DAE: Defense-Penetrating Model Extraction Attacks", IEEE S&P 2023) in
    the form of ModelGuard (Tang et al., USENIX Security 2024): the clean answers for training are
    those of shadow models.

    There the shadows are AlexNets, each trained on other classes of a public labeled set, and
    answer the transfer set. This attacker has only the transfer set, and splits it: a shadow has
    the clone's architecture with new weights (layers without ``reset_parameters`` keep those of the
    clone), learns the released labels of one random half, and answers the other half, which is as
    foreign to it as the query set is to the victim. It trains like the clone, for
    ``shadow_epochs``. The default shadows cost as much as 50 epochs of the clone.
    """

    shadows: int = option(20, "Number of shadow models.", least=1)
    shadow_epochs: int = option(5, "Epochs of each.", least=1)

    def _prior(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        labels = nn.functional.one_hot(answers.argmax(1), answers.shape[1]).float()
        clean, rows = [], []
        for number in range(self.shadows):
            order = torch.randperm(len(images), generator=generator)
            half, other = order[: len(order) // 2], order[len(order) // 2 :]
            seeds = torch.randint(2**62, (self.shadow_epochs + 1,), generator=generator).tolist()
            shadow = reinitialized(task.clone, seeds.pop())
            part = replace(task, clone=shadow, watch=lambda *_: None)  # a shadow is no result
            training = Training(self, part, seeds, name=f"shadow{number}.pt")
            network = training.run(images[half], labels[half])
            clean.append(softmax(predict(network, images[other])))
            rows.append(other)
        chosen = torch.randperm(sum(map(len, rows)), generator=generator)[: self.pairs]
        return torch.cat(clean)[chosen], torch.cat(rows)[chosen]


@dataclass(frozen=True, kw_only=True)
class DDAEPlus(_Generative):
    """D-DAE+ (Tang et al., ModelGuard, USENIX Security 2024): the clean answers for training are
    drawn from Dirichlet distributions, see :meth:`Recovery._dirichlet`; there are no shadows."""

    def _prior(self, task: Task, images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        return self._dirichlet(answers)


def reinitialized(network: nn.Module, seed: int) -> nn.Module:
    """A copy of ``network`` with new initial weights."""
    network = copy.deepcopy(network)
    torch.manual_seed(seed)
    for module in network.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return network


def recovery_network(classes: int, inputs: int | None = None) -> nn.Module:
    """ModelGuard's network from released to clean answers.

    The first hidden layer has the width of the published table (128, 512, 1024, 2048 and 2048 for
    10, 43, 100, 200 and 256 classes), the second half of it.

    Args:
        classes: number of classes.
        inputs: width of the input; None: ``classes``.
    """
    width = min(2048, 2 ** math.ceil(math.log2(10 * classes)))
    widths = (classes if inputs is None else inputs, width, width // 2, classes)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Softmax(1))


def train(network: nn.Module, released: Tensor, clean: Tensor, epochs: int) -> None:
    """Minimize the L1 distance of ``network(released)`` to ``clean`` [M, num_classes].

    SGD with the settings of the published code: learning rate 0.01, halved every 100 epochs,
    momentum 0.9, L2 penalty 1e-4. The published code recovers answers with batch norm in training
    mode, so that an estimate depends on its batch; here it does not.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=100, gamma=0.5)
    network.train()
    for _ in progress(range(epochs), "recovery", total=epochs, unit="epoch"):
        for rows in torch.randperm(len(clean)).split(BATCH):
            if len(rows) > 1:  # batch norm cannot train on a single row
                # L = mean over the pairs of |r(y') - y|_1
                loss = (network(released[rows]) - clean[rows]).abs().sum(1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        scheduler.step()
