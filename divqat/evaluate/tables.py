"""Tables of an evaluation, in percent, mean ± standard deviation over the seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from statistics import mean
from typing import Any

from divqat.evaluate.results import (
    HARD,
    SOFT,
    Cell,
    Evaluation,
    Released,
    best_alone,
    best_of,
    epsilon_text,
    reads,
)
from divqat.evaluate.specs import UNDEFENDED, control_of, is_alone
from divqat.evaluate.table import ABSENT, Table, percent, spread

NOT_MEASURED = "not measured"
CLEAN = ("accuracy", "ece", "top_probability")  # fields of SideEffects on unchanged images


def main_table(result: Evaluation) -> Table:
    """One row per victim and defense: accuracy that it costs, and accuracy of the clones."""
    header = (
        "Victim|Defense|Victim acc|Released acc|L1 queries|Clone soft|Clone hard|Best of all|"
        "Fidelity|Best attack"
    )
    rows = []
    for victim, defense in result.pairs():
        released = result.select(result.released, victim=victim, defense=defense)
        soft, hard, best = (
            result.per_seed(victim, defense, pick) for pick in (reads(SOFT), reads(HARD), best_of)
        )
        unreachable = any(row.unreachable for row in released)
        rows.append(
            [
                victim,
                f"{defense} (out of reach)" if unreachable else defense,
                percent(row.accuracy for row in released),
                percent(row.released_accuracy for row in released),
                _spread(released, "l1_queries", 2),
                *(percent(cell.accuracy for cell in cells) for cells in (soft, hard, best)),
                percent(cell.fidelity for cell in best),
                _most_frequent(cell.attack for cell in best),
            ]
        )
    return Table(header.split("|"), rows, text_columns=2)


def defenses_table(result: Evaluation) -> Table:
    """One row per defense; for each victim the accuracy of its released answers and of the best
    clone."""
    victims = list(dict.fromkeys(row.victim for row in result.released))
    rows = []
    for defense in dict.fromkeys(row.defense for row in result.released):
        row = [defense]
        for victim in victims:
            released = result.select(result.released, victim=victim, defense=defense)
            best = result.per_seed(victim, defense, best_of)
            row += [
                percent(r.released_accuracy for r in released),
                percent(r.top1_kept_queries for r in released),
                percent(cell.accuracy for cell in best),
            ]
        rows.append(
            [*row, _spread(result.select(result.released, defense=defense), "microseconds", 0)]
        )
    columns = [
        f"{v}: {what}" for v in victims for what in ("released acc", "top-1 kept", "best clone")
    ]
    return Table(["Defense", *columns, "µs per query"], rows)


def budgets_table(result: Evaluation, victim: str) -> Table:
    """One row per attack on an undefended victim, one column per clone and budget."""
    cells = result.select(result.cells, victim=victim, defense=UNDEFENDED)
    columns = list(dict.fromkeys((cell.clone, cell.budget) for cell in cells))
    rows = []
    for attack in dict.fromkeys(cell.attack for cell in cells):
        row = [attack]
        for clone, budget in columns:
            seeds = result.select(cells, attack=attack, clone=clone, budget=budget)
            row.append(percent(cell.accuracy for cell in seeds))
        largest = result.select(cells, attack=attack, clone=columns[0][0], budget=result.budget)
        rows.append([*row, spread((cell.seconds for cell in largest), digits=0)])
    header = [f"{clone}, {budget}" for clone, budget in columns]
    return Table(["Attack", *header, "Seconds"], rows)


def floor(result: Evaluation) -> float | None:
    """Label-only floor: mean accuracy of hard-label clones of the undefended control; None if it
    was not measured."""
    control = result.control
    cells = [] if control is None else result.per_seed(control, "none", reads(HARD))
    return mean(cell.accuracy for cell in cells) if cells else None


def attacks_table(result: Evaluation) -> Table:
    """Clone accuracy of every attack, clone and budget: one column for each victim."""
    victims = list(dict.fromkeys(row.victim for row in result.released))
    keys = list(dict.fromkeys((c.defense, c.attack, c.clone, c.budget) for c in result.cells))
    rows = []
    for defense, attack, clone, budget in keys:
        same = result.select(
            result.cells, defense=defense, attack=attack, clone=clone, budget=budget
        )
        cells = [result.select(same, victim=victim) for victim in victims]
        rows.append(
            [
                defense,
                attack,
                clone,
                str(max(cell.queries for cell in same)),
                *(percent(cell.accuracy for cell in seeds) for seeds in cells),
                _gain(same),
                spread((cell.seconds for cell in same), digits=0),
            ]
        )
    header = ["Defense", "Attack", "Clone", "Queries", *victims, "Best epoch", "Seconds"]
    return Table(header, rows, text_columns=3)


def controls_table(result: Evaluation) -> Table | None:
    """What the victim adds to each attack with labeled images: for each victim the accuracy of the
    clone, that of its control, and their difference seed by seed, in points; None if there is no
    control. The last row of a defense compares the best of all attacks with the best attacker
    without the victim."""
    victims = list(dict.fromkeys(row.victim for row in result.released))
    tried = list(dict.fromkeys(cell.attack for cell in result.cells))
    keys = list(dict.fromkeys((c.defense, c.attack, c.clone, c.budget) for c in result.cells))
    rows = []
    for defense in dict.fromkeys(defense for defense, *_ in keys):
        for _, attack, clone, budget in (key for key in keys if key[0] == defense):
            control = control_of(attack, tried)
            if control is not None:
                row = [defense, attack, control, clone, str(budget)]
                for victim in victims:
                    cells = result.select(result.cells, victim=victim, clone=clone, budget=budget)
                    asked = result.select(cells, defense=defense, attack=attack)
                    row += _added(asked, result.select(cells, attack=control))
                rows.append(row)
        if any(map(is_alone, tried)):
            row = [defense, "best of all", "best without the victim", "any", str(result.budget)]
            for victim in victims:
                asked = result.per_seed(victim, defense, best_of)
                row += _added(asked, result.per_seed(victim, UNDEFENDED, best_alone))
            rows.append(row)
    columns = [f"{v}: {what}" for v in victims for what in ("clone", "control", "victim adds")]
    header = ["Defense", "Attack", "Control", "Clone", "Budget", *columns]
    return Table(header, rows, text_columns=4) if rows else None


def _added(asked: list[Cell], alone: list[Cell]) -> list[str]:
    """Accuracies of clones with and without the victim, and their differences seed by seed."""
    with_it, without = ({cell.seed: cell.accuracy for cell in cells} for cells in (asked, alone))
    added = (with_it[seed] - without[seed] for seed in with_it if seed in without)
    return [percent(with_it.values()), percent(without.values()), percent(added)]


def released_table(result: Evaluation) -> Table:
    """How each defense changes the answers, and the time that it takes."""
    header = (
        "Victim|Defense|Top-1 kept, test|Top-1 kept, queries|L1 test|L1 queries|Top prob. test|"
        "Top prob. queries|Entropy test (nats)|Entropy queries (nats)|µs per query"
    )
    rows = []
    for victim, defense in result.pairs():
        released = result.select(result.released, victim=victim, defense=defense)
        answers = [[getattr(row, name) for row in released] for name in ("test", "queries")]
        answers = [[c for c in confidences if c is not None] for confidences in answers]
        rows.append(
            [
                victim,
                _settings(released) or defense,
                percent(row.top1_kept for row in released),
                percent(row.top1_kept_queries for row in released),
                _spread(released, "l1_test", 2),
                _spread(released, "l1_queries", 2),
                *(spread((c.top_probability for c in seeds), digits=3) for seeds in answers),
                *(spread((c.entropy for c in seeds), digits=2) for seeds in answers),
                _spread(released, "microseconds", 1),
            ]
        )
    return Table(header.split("|"), rows, text_columns=2)


def side_effects_table(result: Evaluation) -> Table:
    """One row per victim: calibration and robustness of the deployed model."""
    everything = result.side_effects
    epsilons = sorted({row.epsilon for run in everything for row in run.adversarial})
    rows = []
    for victim in dict.fromkeys(run.victim for run in everything):
        runs = result.select(everything, victim=victim)
        rows.append([victim, *(_measured(getattr(run, name) for run in runs) for name in CLEAN)])
        for epsilon in epsilons or (None,):
            attacked = [row for run in runs for row in run.adversarial if row.epsilon == epsilon]
            for name in ("fgsm", "pgd"):
                rows[-1].append(_measured(getattr(row, name) for row in attacked))
    header = ["Victim", "Accuracy", "ECE", "Top prob."]
    for text in map(epsilon_text, epsilons) if epsilons else ("",):
        header += [f"FGSM {text}".strip(), f"PGD {text}".strip()]
    return Table(header, rows)


def _measured(values: Iterable[float]) -> str:
    known = list(values)
    return percent(known) if known else NOT_MEASURED


def _settings(released: list[Released]) -> str:
    """The settings of a defense; with ``l1=`` they differ from seed to seed."""
    return released[0].settings + (" …" if len({row.settings for row in released}) > 1 else "")


def _spread(rows: Iterable[Any], name: str, digits: int) -> str:
    return spread((getattr(row, name) for row in rows), digits=digits)


def _gain(cells: list[Cell]) -> str:
    """How much better the best epoch is than the last, in points."""
    return f"+{100 * mean(cell.gain for cell in cells):.1f}"


def _most_frequent(names: Iterable[str]) -> str:
    counts = Counter(names).most_common()
    return " / ".join(f"{name} ({n})" if len(counts) > 1 else name for name, n in counts) or ABSENT
