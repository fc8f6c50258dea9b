"""The test of one suspect against the secret of one run."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from divqat._util.seeds import derived_seed
from divqat.data import Splits
from divqat.data.batches import batches, to_float, to_uint8
from divqat.data.proxies import PROXIES
from divqat.nn.decoy import Decoy, coarse_picture
from divqat.nn.misdirection import sample_size
from divqat.nn.proxies import ProxySource
from divqat.ownership.null import (
    LOOKS,
    REDRAWS,
    corrected,
    decoy_classes,
    excess_agreement,
    p_values,
    redrawn_rows,
)
from divqat.train import Run, TrainConfig, load_run
from divqat.train.proxies import fit_misdirection
from divqat.victim import Victim

ALPHA = 1e-3
NONCE = re.compile(r"[0-9a-f]{8,128}")


class Look(NamedTuple):
    """What was seen after some queries.

    Attributes:
        queries: the number of queries so far.
        agreement: the suspect's mean answer for the decoy's class; with labels only, the share of
            queries to which suspect and decoy give the same class.
        excess: T, the agreement above that of unrelated answers with the same frequencies.
        p: of this look alone.
    """

    queries: int
    agreement: float
    excess: float
    p: float


@dataclass(frozen=True)
class Verdict:
    """The result of :func:`check`.

    Attributes:
        p: for all looks together: the false-alarm rate at which the suspect would just be accused.
        alpha: the false-alarm rate at which it is accused.
        looks: one for each number of queries that was tried.
        null: T of the other keys at the last look, float64 [m].
        nonce: of the queries and the other keys.
        answer: what the suspect released.
        keyed: whether the decoy has a key; otherwise its W depends on the training's seed.
    """

    p: float
    alpha: float
    looks: tuple[Look, ...]
    null: Tensor
    nonce: str
    answer: str
    keyed: bool

    @property
    def copied(self) -> bool:
        """Whether the suspect is accused."""
        return self.p <= self.alpha

    @property
    def queries(self) -> int:
        """The number of queries."""
        return self.looks[-1].queries

    @property
    def agreement(self) -> float:
        """See :class:`Look`."""
        return self.looks[-1].agreement


def check(
    suspect: Any,
    secret: str | Path | Run,
    *,
    nonce: str | None = None,
    alpha: float = ALPHA,
    data_root: str | None = None,
) -> Verdict:
    """Test whether a suspect learned the decoy of a run.

    It answers proxies of foreign images (:mod:`divqat.data.proxies`), which are made of the run's
    test images and depend on the nonce. T is its agreement with the decoy. T of 9,999 other keys,
    each with its own W, is the null. After 50, 100, 200 and 500 queries the test stops if p is at
    most alpha / 4. So an independent suspect is accused with a probability of at most alpha, over
    keys; given one key, this probability may be higher or lower.

    Args:
        suspect: a :class:`divqat.victim.Victim`, with any kind of answer, or any model that it
            takes; images as those of the run, and as many classes.
        secret: the run, or its folder; it was trained with ``misdirect`` and ``misdirect_target``
            ``decoy``.
        nonce: 8 to 128 lower-case hexadecimal digits that the claimant could not choose; None: new
            ones.
        alpha: the false-alarm rate, at least 4e-4.
        data_root: the folder of the run's data set.

    Raises:
        ValueError: the run has no decoy, a wrong nonce or alpha, or the suspect has another number
            of classes.
        Others: see :func:`divqat.train.load_run`, :class:`divqat.victim.Victim`.
    """
    nonce = secrets.token_hex(16) if nonce is None else nonce
    if not NONCE.fullmatch(nonce):
        raise ValueError(f"nonce: wanted 8 to 128 lower-case hexadecimal digits, got {nonce!r}")
    if not len(LOOKS) / (REDRAWS + 1) <= alpha < 1:
        least = len(LOOKS) / (REDRAWS + 1)
        raise ValueError(f"alpha: wanted at least {least:g} and below 1, got {alpha}")
    run = secret if isinstance(secret, Run) else load_run(secret)
    check_marked(run.config)
    splits = run.splits(data_root)
    victim = suspect if isinstance(suspect, Victim) else Victim(suspect)
    decoy = decoy_of(run.config, splits)
    queries = draw_queries(run.config, splits, nonce)
    looks, null = take_looks(victim, decoy, queries, nonce, alpha)
    p = float(corrected([torch.tensor(look.p, dtype=torch.float64) for look in looks]))
    keyed = run.config.decoy_key is not None
    return Verdict(p, alpha, looks, null, nonce, victim.answer, keyed)


def check_marked(config: TrainConfig) -> None:
    """Check that a training learned a decoy; ValueError if not."""
    if not config.misdirect or config.misdirect_target != "decoy":
        got = f"misdirect = {config.misdirect:g}, misdirect_target {config.misdirect_target}"
        raise ValueError(
            f"secret: wanted a run with misdirect above 0 and misdirect_target decoy, got {got}"
        )


def decoy_of(config: TrainConfig, splits: Splits) -> Decoy:
    """The decoy of a training, computed again from its settings and data."""
    decoy = fit_misdirection(config, config.seed, splits.num_classes, splits.train).decoy
    assert decoy is not None
    return decoy


def draw_queries(config: TrainConfig, splits: Splits, nonce: str, count: int = LOOKS[-1]) -> Tensor:
    """Proxies of the run's kinds that depend on the nonce and not on the key, float32
    [count, C, H, W]."""
    seed = derived_seed(int(nonce, 16), "ownership")
    shape, generator = splits.test.image_shape, Generator().manual_seed(seed)
    source = ProxySource(config.proxies or PROXIES, shape, folder=config.proxy_root, seed=seed)
    size = min(sample_size(shape), len(splits.test))
    images, labels = next(iter(batches(splits.test, size, generator=generator)))
    return to_float(source(to_uint8(images), generator, count, labels))


def take_looks(
    victim: Victim, decoy: Decoy, queries: Tensor, nonce: str, alpha: float
) -> tuple[tuple[Look, ...], Tensor]:
    """Query until the decoy is recognized, or all queries are used; the looks, and T of the other
    keys at the last one, float64 [m]."""
    num_classes = len(decoy.rows)
    rows = torch.cat([decoy.rows[None].double(), redrawn_rows(nonce, num_classes)])
    answers, classes = torch.empty(0, num_classes).double(), torch.empty(len(rows), 0).long()
    looks: list[Look] = []
    for total in LOOKS:
        asked = queries[len(answers) : total]
        answered = victim(asked).double()
        if answered.shape[1] != num_classes:
            raise ValueError(
                f"suspect: wanted {num_classes} classes, as the run has, got {answered.shape[1]}"
            )
        answers = torch.cat([answers, answered])
        classes = torch.cat([classes, decoy_classes(components(decoy, asked), rows)], 1)
        excess = excess_agreement(answers, classes)
        p = float(p_values(excess[:1], excess[1:]))
        agreement = float(answers[torch.arange(total), classes[0]].mean())
        looks.append(Look(total, agreement, float(excess[0]), p))
        if p <= alpha / len(LOOKS):
            break
    return tuple(looks), excess[1:]


def components(decoy: Decoy, images: Tensor) -> Tensor:
    """z(x) of float32 images [M, C, H, W], float64 [M, 4]."""
    return (coarse_picture(images).double() - decoy.mean.double()) @ decoy.basis
