"""``python -m bench pictures``: the pictures of README.md and docs/, light and dark.

``queries`` is drawn from the committed results, ``answers`` and ``decoy`` from networks that are
trained on scikit-learn's digits in ``--runs``, in about a minute; both show drawings of
``openclipart``, which are in the public domain.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from bench import drawings
from bench.drawings import Line, Shown
from divqat import data, nn
from divqat._util.errors import require
from divqat.data.modes import on_white, to_rgba
from divqat.data.pictures import list_pictures
from divqat.data.transfer import CLIPART_ROOT
from divqat.evaluate import Cell, Evaluation
from divqat.evaluate.specs import steals
from divqat.nn.decoy import coarse_picture
from divqat.train import TrainConfig, load_run, train
from divqat.train.proxies import fit_misdirection

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
NAMES = ("queries", "answers", "decoy", "loss")
# docs/results.md, "Misdirection": the one figure here that no evaluation.json in bench/results has.
RESIDUAL = 50.8
COMMON: dict[str, Any] = {"dataset": "digits", "model": "lenet", "threads": 1}
SEED, PICTURES = 731, 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench pictures``."""
    parser.add_argument("--only", choices=NAMES, nargs="+", default=NAMES, help="Default: all.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", metavar="DIR")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "build" / "pictures", metavar="DIR",
        help="The trainings; finished ones are kept.",
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Make the pictures."""
    shown = show(*trained(args.runs)) if {"answers", "decoy"} & set(args.only) else []
    lines, chance = best_clones()
    label = "a thief who has read the source (one seed, shorter training)"
    read = Line(label, True, [27_540], [RESIDUAL], [0])
    draws = {
        "queries": (4.3, partial(drawings.queries, lines=lines, read=read, chance=chance)),
        "answers": (6.6, partial(drawings.answers, shown=shown)),
        "decoy": (3.6, partial(drawings.decoys, shown=shown[:3])),
        "loss": (3.2, drawings.loss),
    }
    for name in args.only:
        for path in drawings.save_both(args.out, name, *draws[name]):
            print(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


def best_clones() -> tuple[list[Line], float]:
    """The best clone of each seed by the number of queries, which the thief chooses on its own
    labeled images, and the accuracy of chance, in percent."""
    lines = []
    for study, clone in (("misdirection-strong-small", "small clone"),
                         ("misdirection-strong", "clone as large as the victim")):  # fmt: skip
        result = Evaluation.load(RESULTS / study / "evaluation.json")
        cells = [c for c in result.cells if steals(c.attack)]
        for victim, word in (("qat", "plain QAT"), ("divqat", "defended")):
            budgets = sorted({c.budget for c in cells})
            seeds = sorted({c.seed for c in cells})
            best = [
                [chosen(result.select(cells, victim=victim, budget=n, seed=s)) for s in seeds]
                for n in budgets
            ]
            means, deviations = list(map(mean, best)), list(map(stdev, best))
            lines.append(Line(f"{word}, {clone}", victim == "divqat", budgets, means, deviations))
    return lines, 100 * result.chance


def chosen(cells: Sequence[Cell]) -> float:
    """The accuracy, in percent, of the clone that a thief would keep."""
    return 100 * max(cells, key=lambda cell: cell.holdout_accuracy).accuracy


def trained(runs: Path) -> tuple[Path, Path]:
    """The folders of a plain and a defended network of digits."""
    fp, qat, divqat = (str(runs / name) for name in ("fp", "qat", "divqat"))
    train(TrainConfig(**COMMON, method="fp", epochs=15, lr=0.05, pad=1), fp)
    train(TrainConfig(**COMMON, method="qat", teacher=fp, epochs=8, lr=0.01), qat)
    train(
        TrainConfig(
            **COMMON, method="divqat", teacher=fp, reference=qat, accuracy_budget=1.0, epochs=12,
            lr=0.01, seed=SEED,
        ),
        divqat,
    )  # fmt: skip
    return Path(qat), Path(divqat)


@torch.no_grad()
def show(plain: Path, defended: Path) -> list[Shown]:
    """Drawings that a fixed seed chooses, and the networks' answers."""
    run = load_run(defended)
    splits = run.splits(None)
    misdirection = fit_misdirection(run.config, run.config.seed, splits.num_classes, splits.train)
    decoy = misdirection.decoy
    assert isinstance(decoy, nn.misdirection.Decoy)
    paths = random.Random(SEED).sample(list_pictures(CLIPART_ROOT, links=False), PICTURES)
    shown = []
    for path in paths:
        seen = as_query(Path(path), splits)
        images = data.to_float(seen)
        models = load_run(plain).model.eval(), run.model.eval()
        coarse = coarse_picture(images)
        components = (coarse - decoy.mean) @ decoy.directions @ torch.linalg.pinv(decoy.rows.T)
        shown.append(
            Shown(
                thumbnail(Path(path)),
                seen[0, 0].numpy(),
                *(model(images).softmax(1)[0].tolist() for model in models),
                coarse.view(8, 8).numpy(),
                components[0].tolist(),
                decoy(images)[0].tolist(),
            )
        )
    return shown


def as_query(path: Path, splits: data.Splits) -> torch.Tensor:
    """What the query set openclipart makes of one drawing, uint8 [1, 1, H, W]."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "openclipart").mkdir()
        shutil.copy(path, Path(folder) / "openclipart")
        size = splits.image_size
        return data.transfer_set(
            "openclipart", channels=1, image_size=size, data_root=folder, limit=1
        )


def thumbnail(path: Path) -> Any:
    """A drawing on white, uint8 [96, 96, 3]."""
    image = require("PIL.Image", "data")
    with image.open(path) as opened:
        picture = on_white(to_rgba(opened))
    picture.thumbnail((96, 96))
    square = image.new("RGB", (96, 96), "white")
    square.paste(picture, ((96 - picture.width) // 2, (96 - picture.height) // 2))
    return require("numpy", "data").asarray(square)
