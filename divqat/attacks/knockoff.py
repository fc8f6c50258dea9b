"""KnockoffNets with the random strategy (Orekondy, Schiele, Fritz, CVPR 2019)."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from divqat.data.batches import augment, batches, to_float
from divqat.data.sets import ImageSet
from divqat.files import load_checkpoint, save_checkpoint
from divqat.progress import progress
from divqat.victim import QueryBudgetExceeded, Victim

# Answers are stored after this many: what a killed run has to ask again at most.
QUERIES_PER_SAVE = 4096


@dataclass(frozen=True, eq=False)
class Extraction:
    """What an attack ends with."""

    clone: nn.Module  # after the last epoch, in eval mode
    transfer_set: tuple[Tensor, Tensor]  # images uint8 [N, C, H, W], answers float32 [N, classes]
    queries: int  # images answered for this attack, those before an interruption included


@dataclass(frozen=True, kw_only=True)
class KnockoffNets:
    """Ask once about each of ``query_budget`` random images and train a clone on the answers.

    The clone minimizes -sum_k a_k log softmax(f(x))_k, the mean over the transfer set, where ``a``
    is the victim's answer scaled to sum 1: one formula for probabilities, labels (one-hot rows),
    top-k and rounded answers. A row of zeros, which rounding can leave, counts as uniform.
    SGD with Nesterov momentum; the learning rate falls to 0 along a cosine, step by step. The
    clone of the last epoch is the result, not the best one: choosing would need test data.

    Args:
        query_budget: images drawn from the query set without replacement; None: all of them.
        epochs: passes over the transfer set.
        batch_size: images per step.
        lr: first learning rate.
        momentum: of SGD, in [0, 1).
        weight_decay: of SGD.
        pad: shift the queries at random by up to so many pixels while training (0: no).
        flip: mirror them at random as well. The answers stay those to the unchanged image.
        seed: of the draw, the order of the batches, the augmentation and dropout.

    Raises:
        ValueError: an argument out of its range.
    """

    query_budget: int | None = None
    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    pad: int = 0
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("weight_decay", 0), ("pad", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: wanted at least {least}, got {getattr(self, name)}")
        if self.query_budget is not None and self.query_budget < 1:
            raise ValueError(f"query_budget: wanted None or at least 1, got {self.query_budget}")
        if not self.lr > 0:
            raise ValueError(f"lr: wanted more than 0, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: wanted it in [0, 1), got {self.momentum}")

    def __call__(
        self,
        victim: Victim,
        query_set: Tensor,  # uint8 [N, C, H, W]
        clone: nn.Module,
        *,
        resume_dir: str | Path | None = None,
    ) -> Extraction:
        """Run the attack.

        Args:
            victim: the black box.
            query_set: images the attacker owns, of the size that victim and clone take.
            clone: initial weights and architecture; it is copied and stays as it was. The copy
                trains on the device of ``clone``.
            resume_dir: keeps ``transfer.pt`` (answers) and ``clone.pt`` (every epoch). A run that
                was killed goes on from there, ends with the same bits as one that was not, and
                asks nothing twice. One folder belongs to one victim.

        Raises:
            QueryBudgetExceeded: before the first query, when the victim's budget is too small.
            TypeError, ValueError: wrong kind of argument, a budget larger than the query set, a
                clone with other classes than the victim, a ``resume_dir`` of other settings.
            FloatingPointError: the clone's loss is no longer finite.
        """
        if not isinstance(victim, Victim):
            raise TypeError(f"victim: wanted a divqat.Victim, got {type(victim).__name__}")
        if query_set.dtype != torch.uint8 or query_set.dim() != 4:
            raise ValueError(
                f"query_set: wanted uint8 [N, C, H, W], got {query_set.dtype} "
                f"{list(query_set.shape)}"
            )
        budget = len(query_set) if self.query_budget is None else self.query_budget
        if not 1 <= budget <= len(query_set):
            raise ValueError(
                f"query_budget: wanted 1 to {len(query_set)}, the size of the query set, "
                f"got {budget}"
            )
        clone = copy.deepcopy(clone).to(  # type: ignore[call-overload]
            memory_format=torch.channels_last  # the faster one for convolutions
        )
        classes = _classes(clone, query_set[:1])  # a clone that does not fit must cost no query
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(query_set), generator=generator)[:budget]
        seeds = torch.randint(2**62, (self.epochs,), generator=generator).tolist()
        folder = _Folder(resume_dir, self._settings(victim, query_set, clone))

        optimizer = torch.optim.SGD(
            clone.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
        )
        state = folder.load("clone.pt")
        if state is None:  # before the first query, so that every later run has these weights
            state = _state(0, clone, optimizer)
            folder.save("clone.pt", state)
        images = query_set[chosen]
        answers = self._query(victim, images, folder)
        if answers.shape[1] != classes:
            raise ValueError(
                f"clone: wanted {answers.shape[1]} classes like the victim, got {classes}"
            )
        clone.load_state_dict(state["clone"])
        optimizer.load_state_dict(state["optimizer"])
        device = next(clone.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for epoch in range(state["epoch"], self.epochs):
                self._epoch(epoch, seeds[epoch], clone, optimizer, images, answers)
                folder.save("clone.pt", _state(epoch + 1, clone, optimizer))
        return Extraction(clone.eval(), (images, answers), len(answers))

    def _query(self, victim: Victim, images: Tensor, folder: _Folder) -> Tensor:
        stored = folder.load("transfer.pt")
        parts = [] if stored is None else [stored["answers"]]
        done = sum(map(len, parts))
        if victim.remaining is not None and len(images) - done > victim.remaining:
            raise QueryBudgetExceeded(
                f"the attack needs {len(images) - done} queries, the victim allows "
                f"{victim.remaining} more"
            )
        chunks = images[done:].split(QUERIES_PER_SAVE) if done < len(images) else ()
        for chunk in progress(chunks, "queries", total=len(chunks), unit="chunk"):
            parts.append(victim(to_float(chunk)))
            folder.save("transfer.pt", {"answers": torch.cat(parts)})
        return torch.cat(parts)

    def _epoch(
        self,
        epoch: int,
        seed: int,
        clone: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,  # uint8 [N, C, H, W]
        answers: Tensor,  # float32 [N, num_classes]
    ) -> None:
        torch.manual_seed(seed)  # dropout
        device = next(clone.parameters()).device
        targets = _targets(answers).to(device)
        data = ImageSet(images.to(device), torch.arange(len(images), device=device))
        # Batch norm cannot train on a single image.
        drop_last = len(data) > self.batch_size and len(data) % self.batch_size == 1
        steps = len(data) // self.batch_size if drop_last else -(-len(data) // self.batch_size)
        loader = batches(
            data,
            self.batch_size,
            generator=torch.Generator().manual_seed(seed),
            augment=partial(augment, pad=self.pad, flip=self.flip),
            drop_last=drop_last,
        )
        clone.train()
        total = torch.zeros((), device=device)
        named = progress(loader, f"clone {epoch + 1}/{self.epochs}", total=steps, unit="batch")
        for step, (x, index) in enumerate(named, start=epoch * steps):
            # lr_t = lr / 2 * (1 + cos(pi * t / T))
            lr = self.lr / 2 * (1 + math.cos(math.pi * step / (steps * self.epochs)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = F.cross_entropy(clone(x), targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        if not total.isfinite():
            raise FloatingPointError(
                f"the clone's loss is {total.item()} in epoch {epoch + 1}; lower lr ({self.lr})"
            )

    def _settings(self, victim: Victim, query_set: Tensor, clone: nn.Module) -> dict[str, Any]:
        shapes = {name: list(value.shape) for name, value in clone.state_dict().items()}
        return {
            **asdict(self),
            "answer": victim.answer,
            "query_set": hashlib.sha256(query_set.cpu().numpy().tobytes()).hexdigest()[:16],
            "clone": hashlib.sha256(f"{clone} {shapes}".encode()).hexdigest()[:16],
        }


class _Folder:
    """Where a run keeps what it has done, with the settings beside it; None keeps nothing."""

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings = settings

    def save(self, name: str, state: dict[str, Any]) -> None:
        if self.path is not None:
            save_checkpoint(self.path / name, {"settings": self.settings, **state})

    def load(self, name: str) -> dict[str, Any] | None:
        if self.path is None or not (self.path / name).exists():
            return None
        state = load_checkpoint(self.path / name)
        there = state.get("settings", {})
        for key, here in self.settings.items():
            if there.get(key) != here:
                raise ValueError(
                    f"resume_dir: {self.path / name} belongs to other settings: "
                    f"{key} is {there.get(key)} there, {here} here"
                )
        return state


def _state(epoch: int, clone: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"epoch": epoch, "clone": clone.state_dict(), "optimizer": optimizer.state_dict()}


def _targets(answers: Tensor) -> Tensor:  # [N, num_classes] -> rows of sum 1
    total = answers.sum(1, keepdim=True)
    return torch.where(total > 0, answers / total, 1 / answers.shape[1])


def _classes(clone: nn.Module, images: Tensor) -> int:
    clone.eval()
    with torch.no_grad():
        return clone(to_float(images).to(next(clone.parameters()).device)).shape[1]
