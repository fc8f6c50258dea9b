"""Report sections about the trainings of a study and their exports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from divqat._util.files import read_json
from divqat._util.names import check_name
from divqat._util.settings import read_yaml
from divqat.evaluate.curves import layer_sqnr, training_curves
from divqat.evaluate.page import Section
from divqat.evaluate.results import Evaluation
from divqat.evaluate.table import ABSENT, Table, percent, settings_text
from divqat.export.verify import as_attacked

PATH_SETTINGS = ("teacher", "reference")  # settings whose values are folders
TEACHER = "fp"  # trained in every study, whether it is evaluated or not


def training_sections(result: Evaluation, folder: Path) -> list[Section]:
    """Deployment, curves and quantization noise of the trainings in ``folder/seed<n>/<victim>/``;
    empty if there are none.

    Raises:
        ValueError: a file cannot be read, or a name in ``result`` cannot be the name of a folder.
    """
    plots = folder / "plots"
    metrics = _files_by_victim(result, folder, "metrics.csv", TEACHER)
    layers = {
        name: _sqnr(files[0]) if files else []
        for name, files in _files_by_victim(result, folder, "layers.json").items()
    }
    sections = [
        Section("Deployment", "Percent and counts.", _deployment(result, folder)),
        Section(
            "Training",
            "Settings: only those that differ from most trainings. Curves: mean over the seeds; "
            "the band spans minimum and maximum.",
            _distinct_settings(result, folder),
            training_curves(metrics, plots / "training.png"),
        ),
        Section(
            "Quantization noise per layer",
            "First seed.",
            plot=layer_sqnr(layers, plots / "layers.png"),
        ),
    ]
    return [s for s in sections if s.plot or (s.table and s.table.rows)]


def _files_by_victim(
    result: Evaluation, folder: Path, name: str, *others: str
) -> dict[str, list[Path]]:
    """The existing files called ``name``, by victim.

    A victim without files stays in the dictionary, so that its color is the same in all plots.
    """
    seeds = dict.fromkeys(row.seed for row in result.released)
    by_victim: dict[str, list[Path]] = {}
    for victim in dict.fromkeys([*(row.victim for row in result.released), *others]):
        place = check_name("victim", victim)  # names come from evaluation.json: not trusted
        files = (folder / check_name("seed", f"seed{seed}") / place / name for seed in seeds)
        by_victim[victim] = [file for file in files if file.is_file()]
    return by_victim


def warning_sections(result: Evaluation, folder: Path) -> list[Section]:
    """The warnings of the trainings; empty if there are none."""
    rows = [
        [name, file.parent.parent.name, str(warning)]
        for name, files in _files_by_victim(result, folder, "summary.json", TEACHER).items()
        for file in files
        for warning in read_json(file).get("warnings", [])
    ]
    table = Table(["Training", "Folder", "Warning"], rows, text_columns=3)
    return [Section("Warnings", table=table)] if rows else []


def _distinct_settings(result: Evaluation, folder: Path) -> Table:
    """The settings of each training, first seed, that differ from most trainings."""
    files = _files_by_victim(result, folder, "config.yaml", TEACHER)
    settings = {name: read_yaml(found[0]) for name, found in files.items() if found}
    keys = [key for key in dict.fromkeys(chain(*settings.values())) if key not in PATH_SETTINGS]
    usual = {
        key: Counter(str(each.get(key)) for each in settings.values()).most_common(1)[0][0]
        for key in keys
    }
    rows = [
        [
            name,
            str(each.get("method")),
            settings_text(
                {
                    key: each[key]
                    for key in keys
                    if key in each and key != "method" and str(each[key]) != usual[key]
                }
            ),
        ]
        for name, each in settings.items()
    ]
    return Table(["Training", "Method", "Settings"], rows, text_columns=3)


def _deployment(result: Evaluation, folder: Path) -> Table:
    """Accuracy of each victim before and after export, and its quantized layers."""
    rows = []
    for name, files in _files_by_victim(result, folder, "verify.json").items():
        verified = [read_json(file) for file in files]
        attacked = [as_attacked(report) for report in verified]
        exports, summaries = (
            [read_json(file.with_name(part)) for file in files if file.with_name(part).is_file()]
            for part in ("export.json", "summary.json")
        )
        if files:
            rows.append(
                [
                    name,
                    percent(summary["validation_accuracy"] for summary in summaries),
                    percent(report["accuracy_fake"] for report in verified),
                    percent(accuracy for accuracy, _ in attacked),
                    percent(agreement for _, agreement in attacked),
                    _unique_text(report["int8_layers"] for report in exports),
                    _unique_text(report["float_layers"] for report in exports),
                ]
            )
    header = "Victim|Validation acc|Fake-quant acc|int8 acc|Agreement|int8 layers|Float layers"
    return Table(header.split("|"), rows)


def _unique_text(values: Iterable[Any]) -> str:
    """The distinct values as text; normally all seeds have the same."""
    return " / ".join(dict.fromkeys(map(str, values))) or ABSENT


def _sqnr(path: Path) -> list[tuple[str, float]]:
    try:
        rows = read_json(path)["rows"]
        pairs = [(row["layer"], row["sqnr_db"]) for row in rows if row.get("sqnr_db") is not None]
        return [(str(layer), value) for layer, value in pairs if math.isfinite(value)]
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is not a summary of layers: {error!r}") from error
