"""The report of a whole job: ``report.md``, ``report.html`` and plots.

It reads ``OUT/result.json`` (its schema is :class:`divqat.evaluate.result.Result`) and, where
they exist, ``OUT/seed<n>/<victim>/metrics.csv`` (columns ``epoch`` and those of
:data:`divqat.evaluate.plots.CURVES`: ``validation_accuracy`` as a fraction, ``ce``,
``divergence``, ``top_probability``, ``misled``), ``OUT/seed<n>/<victim>/layers.json``
(``divqat.summary(...).to_dict()``: ``rows`` with ``layer`` and ``sqnr_db``) and
``OUT/seed<n>/<victim>/summary.json`` (``warnings``, a list of sentences).
"""

from __future__ import annotations

import math
from pathlib import Path

from divqat.bounds import check_tree
from divqat.evaluate import plots, tables
from divqat.evaluate.audits import audits
from divqat.evaluate.page import Section, write_page
from divqat.evaluate.result import Result
from divqat.evaluate.tables import Table
from divqat.files import read_json
from divqat.names import check_name


def write_report(run_dir: str | Path) -> Path:
    """Write the report of a finished (or partly finished) job into its folder.

    Args:
        run_dir: the folder OUT that ``divqat run`` made.

    Returns:
        ``OUT/report.html``: one file that needs nothing else. ``OUT/report.md`` says the same and
        shows ``OUT/plots/*.png``.

    Raises:
        FileNotFoundError: there is no ``result.json``.
        ValueError: it is not a result, or a file beside it cannot be read.
        ImportError: matplotlib is missing.
    """
    run_dir = Path(run_dir)
    check_tree(run_dir)
    result = Result.load(run_dir / "result.json")
    sections = _sections(result, run_dir)
    title = f"Extraction of int8 models on {result.dataset}"
    return write_page(run_dir, title, sections)


def _sections(result: Result, run_dir: Path) -> list[Section]:
    folder = run_dir / "plots"
    metrics = _seed_files(run_dir, result, "metrics.csv", extra=("fp",))
    layers = {
        name: _sqnr(files[0]) if files else []
        for name, files in _seed_files(run_dir, result, "layers.json").items()
    }
    main = (
        f"{result.attack} ({tables.settings_text(result.attack_settings)}) trains a {result.clone} "
        f"on {result.query_budget} answers to {result.query_set}. Percent on the test set, mean ± "
        "standard deviation over the seeds. Soft: the clone learns from probabilities; hard: from "
        "labels; best: the best clone of each seed. Fidelity: same top-1 as the deployed victim. "
        f"{tables.floor_line(result)}"
    )
    warnings = _warnings(run_dir, result)
    sections = [Section("Warnings", table=warnings)] if warnings.rows else []
    sections += [
        Section("Results", main, tables.main_table(result)),
        Section("Victims and clones", plot=plots.clone_bars(result, folder / "clones.png")),
        Section("Audits", audits=tuple(audits(result))),
        Section("All attacks", "Percent.", tables.attacks_table(result)),
        Section(
            "Confidence of the victims",
            "The victim as it is deployed, on test images and on the attacker's queries.",
            tables.confidence_table(result),
            plots.confidence_histograms(result, folder / "confidence.png"),
        ),
        Section("Deployment", "Percent and counts.", tables.deployment_table(result)),
    ]
    curves = plots.training_curves(metrics, folder / "training.png")
    if curves:
        text = "Mean over the seeds; the band spans the smallest and the largest."
        sections.append(Section("Training", text, plot=curves))
    noise = plots.layer_sqnr(layers, folder / "layers.png")
    if noise:
        sections.append(Section("Quantization noise per layer", "First seed.", plot=noise))
    return [*sections, Section("How this was made", table=_provenance(result))]


def _seed_files(
    run_dir: Path, result: Result, name: str, *, extra: tuple[str, ...] = ()
) -> dict[str, list[Path]]:
    """The files of that name that exist, by victim.

    A victim without any keeps its place, and so its color is the same in all plots.
    """
    seeds = dict.fromkeys([*result.seeds, *(v.seed for v in result.victims)])
    found: dict[str, list[Path]] = {}
    for victim in dict.fromkeys([*result.by_victim, *extra]):
        place = check_name("victims", victim)  # which the file may say as it likes
        files = (run_dir / check_name("seeds", f"seed{seed}") / place / name for seed in seeds)
        found[victim] = [file for file in files if file.is_file()]
    return found


def _warnings(run_dir: Path, result: Result) -> Table:
    """What the trainings warned of."""
    rows = [
        [name, file.parent.parent.name, str(warning)]
        for name, files in _seed_files(run_dir, result, "summary.json", extra=("fp",)).items()
        for file in files
        for warning in read_json(file).get("warnings", [])
    ]
    return Table(["Training", "Folder", "Warning"], rows, text_columns=3)


def _sqnr(path: Path) -> list[tuple[str, float]]:
    try:
        rows = read_json(path)["rows"]
        known = [(row["layer"], row["sqnr_db"]) for row in rows if row.get("sqnr_db") is not None]
        return [(str(layer), value) for layer, value in known if math.isfinite(value)]
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is no summary of layers: {error!r}") from error


def _provenance(result: Result) -> Table:
    rows = [
        ["Command", result.command],
        ["Date", f"{result.date}, {result.seconds:.0f} s"],
        ["Seeds", ", ".join(map(str, result.seeds))],
        ["Data", f"{result.dataset}, {result.num_classes} classes; queries: {result.query_set}"],
        ["Versions", ", ".join(f"{name} {number}" for name, number in result.versions.items())],
        ["Hardware", result.hardware],
    ]
    return Table(["What", "Value"], rows, text_columns=2)
