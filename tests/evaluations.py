"""Made-up evaluation results, for tests of tables, plots and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from testing import randn

from divqat._util.devices import hardware, versions
from divqat._util.files import write_json
from divqat.evaluate import Cell, Evaluation, Grid, Released
from divqat.metrics import Confidence


def confidence(peak: float, seed: int) -> Confidence:
    return Confidence.of((randn(2000, 10, seed=seed) * peak).softmax(1))


def released(seed: int, name: str, method: str, accuracy: float, peak: float = 2.0) -> Released:
    """A victim without a defense in front of it."""
    return Released(
        seed=seed,
        victim=name,
        method=method,
        defense="none",
        settings="none",
        accuracy=accuracy,
        released_accuracy=accuracy,
        top1_kept=1.0,
        top1_kept_queries=1.0,
        l1_test=0.0,
        l1_queries=0.0,
        microseconds=0.0,
        distributions=True,
        deterministic=True,
        agreement=0.998,
        test=confidence(2 * peak, seed),
        queries=confidence(peak, seed + 10),
    )


def cell(seed: int, name: str, attack: str, accuracy: float) -> Cell:
    """An unremarkable attack on a victim."""
    return Cell(
        seed=seed,
        victim=name,
        defense="none",
        attack=attack,
        clone="vgg_small",
        budget=1000,
        accuracy=accuracy,
        fidelity=accuracy + 0.01,
        holdout_accuracy=accuracy,
        curve=[accuracy - 0.1, accuracy],
        queries=1000,
        seconds=1.5,
    )


# name, method, accuracy, clones from soft and from hard answers
VICTIMS = [
    ("qat", "qat", 0.925, 0.72, 0.59),
    ("divqat", "divqat", 0.918, 0.412, 0.387),
    ("smooth", "qat", 0.924, 0.73, 0.6),
]


def fake_evaluation(
    victims: list[tuple[str, str, float, float, float]] = VICTIMS,
    seeds: int = 3,
    **changes: Any,
) -> Evaluation:
    """Three seeds of three victims, two attacks each."""
    attacks = ("knockoff", "knockoff:reading=label")
    grid = Grid(attacks=attacks, query_set="openclipart", epsilons=())
    rows, cells = [], []
    for seed in range(seeds):
        wobble = 0.004 * (seed - 1)
        for name, method, accuracy, *clones in victims:
            rows.append(released(seed, name, method, accuracy + wobble))
            for attack, clone in zip(attacks, clones, strict=True):
                cells.append(cell(seed, name, attack, clone + 2 * wobble))
    fields = {
        "dataset": "fashion-mnist",
        "num_classes": 10,
        "chance": 0.1,
        "query_images": 1000,
        "overlap": {"queries in train": 0, "queries in test": 0},
        "grid": grid.to_dict(),
        "deployed": "the exported int8 model in ONNX Runtime",
        "command": "divqat run --config configs/fashion.yaml",
        "date": "2026-01-01T00:00:00",
        "versions": versions(),
        "hardware": hardware(),
        "released": rows,
        "cells": cells,
    }
    return Evaluation(**{**fields, **changes})


def write_study(folder: Path, result: Evaluation) -> Path:
    """A folder as ``divqat run`` leaves it, with the files that reports read."""
    result.save(folder / "evaluation.json")
    for i, row in enumerate(result.released):
        run = folder / f"seed{row.seed}" / row.victim
        run.mkdir(parents=True)
        lines = ["epoch,ce,divergence,top_probability,validation_accuracy,seconds"]
        for epoch in range(1, 9):
            divergence = 0.1 * epoch * (row.method == "divqat")
            lines.append(
                f"{epoch},{1.5 / epoch + 0.05 * i:.4f},{divergence},{1 - 0.5 / epoch},"
                f"{(row.accuracy or 0) - 0.2 / epoch},3"
            )
        (run / "metrics.csv").write_text("\n".join(lines) + "\n")
        rows = [{"layer": f"features.{n}.conv", "sqnr_db": 40 - 2 * n + i} for n in range(8)]
        rows.append({"layer": "head", "sqnr_db": None})
        write_json(run / "layers.json", {"rows": rows})
        verified = {"accuracy_fake": 0.93, "accuracy_onnx": 0.9, "argmax_agreement": 0.95}
        precise = {"accuracy": row.accuracy, "argmax_agreement": row.agreement}
        write_json(run / "verify.json", {**verified, "precise": precise})
        write_json(run / "export.json", {"int8_layers": 9, "float_layers": 0})
        write_json(run / "summary.json", {"validation_accuracy": 0.94, "warnings": []})
    return folder
