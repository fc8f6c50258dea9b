"""The report of an evaluation: ``report.md``, ``report.html`` and plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from divqat._util.bounds import check_tree
from divqat.evaluate import plots, tables
from divqat.evaluate.audits import audits
from divqat.evaluate.cells import CURVE_IMAGES
from divqat.evaluate.page import Section, write_page
from divqat.evaluate.results import EVALUATION, Evaluation
from divqat.evaluate.specs import owns
from divqat.evaluate.table import Table, settings_text
from divqat.evaluate.trainings import training_sections, warning_sections


def write_report(folder: str | Path) -> Path:
    """Write the report of an evaluation into its folder.

    Returns:
        ``folder/report.html``, which is self-contained. ``folder/report.md`` has the same content
        and links ``folder/plots/*.png``.

    Raises:
        FileNotFoundError: there is no ``evaluation.json``.
        ValueError: it is not an evaluation.
        ImportError: matplotlib is missing.
    """
    folder = Path(folder)
    check_tree(folder)
    result = Evaluation.load(folder / EVALUATION)
    title = f"How extractable: {result.dataset}"
    return write_page(folder, title, _sections(result, folder))


def _measured(grid: Mapping[str, Any]) -> str:
    if grid.get("split", "test") == "test":
        return "the test set"
    return "images of the validation split, which is called the test set below"


def _sections(result: Evaluation, folder: Path) -> list[Section]:
    grid, drawn = result.grid, folder / "plots"
    training = {name: grid[name] for name in ("epochs", "batch_size", "lr", "precision")}
    main = (
        f"Attacked: {result.deployed}. Percent on {_measured(grid)}, mean ± standard deviation "
        f"over the seeds, for {result.budget} queries of {grid['query_set']}. Clones "
        f"({', '.join(grid['clones'])}) train with {settings_text(training)} unless their attack "
        "says otherwise. Soft: trained on the released probabilities; hard: on the largest entry "
        "alone; best of all: among all attacks and clones, the one that is most accurate on "
        f"{grid['holdout']} labeled images of the attacker's own.{_labeled(result)} Fidelity: "
        f"share of images with the same top-1 as the released answers. {_floor(result)}"
    )
    sections = [
        *warning_sections(result, folder),
        Section("Results", main, tables.main_table(result)),
        Section("Trade-off", "Dashed: the label-only floor, the clone that labels alone give; "
                "dotted: chance.", plot=plots.front(result, drawn / "front.png")),
        Section("Clones", plot=plots.bars(result, drawn / "clones.png")),
        Section("Audits", audits=tuple(audits(result))),
        Section(
            "All attacks",
            "Clone accuracy by victim; best epoch: points that choosing the best epoch with the "
            "test set would add; seconds per attack.",
            tables.attacks_table(result),
            plots.attacks(result, drawn / "attacks.png"),
        ),
        Section(
            "What the victim adds",
            "Clones of attackers with labeled images, beside their controls: the same labels, "
            "query set and initial clone, without the victim. The difference, in points, is taken "
            "seed by seed. Only what the best of all has beyond the best without was stolen.",
            tables.controls_table(result),
        ),
        *_side_effects(result),
        Section("More queries", plot=plots.budget_curve(result, drawn / "budget.png")),
        Section(
            "More epochs",
            f"The clones after every epoch or round, on the first {CURVE_IMAGES} test images. No "
            "clone was chosen by these: each is that of its last epoch. As the learning rate falls "
            "to 0, a flat end alone does not say that a longer training would gain nothing.",
            plot=plots.epoch_curve(result, drawn / "epochs.png"),
        ),
        Section(
            "Answers",
            "The released answers, before any attack.",
            tables.released_table(result),
            plots.answers(result, drawn / "answers.png"),
        ),
        *training_sections(result, folder),
    ]  # fmt: skip
    visible = [section for section in sections if section.table or section.plot or section.audits]
    return [*visible, Section("How this was made", table=_provenance(result))]


def _side_effects(result: Evaluation) -> list[Section]:
    if not result.side_effects:
        return []
    images = {row.images for run in result.side_effects for row in run.adversarial}
    text = (
        "The deployed model on the test set, without a defense in front, in percent. ECE: expected "
        "calibration error, 15 bins; top prob.: mean largest probability. FGSM and PGD: accuracy "
        f"on {f'the first {max(images)} ' if images else ''}test images perturbed against the "
        "trained model, each pixel by at most the given fraction of its range, with "
        "straight-through gradients. Only these two attacks measure white-box accuracy: it is an "
        "upper bound, and a model with a flat loss can hide its gradients from them and look "
        "robust."
    )
    if not images:
        text += " Not measured: no epsilons were given, or there is no model to take gradients of."
    return [Section("Side effects", text, tables.side_effects_table(result))]


def _labeled(result: Evaluation) -> str:
    names = [attack for attack in result.grid["attacks"] if owns(attack)]
    return f" {', '.join(names)}: {result.grid['labeled']} others." if names else ""


def _floor(result: Evaluation) -> str:
    lowest = tables.floor(result)
    if lowest is None:
        return (
            "Label-only floor: unknown, as no hard-label attack on an undefended control was run."
        )
    return f"Label-only floor (hard-label clone of undefended {result.control}): {lowest:.1%}."


def _provenance(result: Evaluation) -> Table:
    seeds = sorted({cell.seed for cell in result.cells})
    rows = [
        ["Command", result.command],
        ["Date", result.date],
        ["Seeds", ", ".join(map(str, seeds))],
        ["Time", f"{sum(cell.seconds for cell in result.cells) / 60:.0f} min in attacks"],
        ["Data", f"{result.dataset}, {result.num_classes} classes"],
        ["Queries", f"{result.grid['query_set']}, {result.query_images} images"],
        ["Versions", ", ".join(f"{name} {number}" for name, number in result.versions.items())],
        ["Hardware", result.hardware],
    ]
    return Table(["What", "Value"], rows, text_columns=2)
