"""Checks that an evaluation has to pass before its numbers mean anything."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from divqat.evaluate.results import HARD, SOFT, Cell, Evaluation, Released, best_of, reads
from divqat.evaluate.specs import (
    CONTROL,
    UNDEFENDED,
    control_of,
    is_control,
    owns,
    steals,
    without_victim,
)
from divqat.evaluate.tables import floor

ACCURACY_LOSS = 0.005  # a defense that costs more accuracy is flagged
AGREEMENT = 0.99  # least argmax agreement of the fake-quantized and the exported model
ABOVE_CHANCE = 0.1  # an attack that gains less on plain QAT is too weak to test a defense
SEEDS = 3
NEAR_CHANCE = 0.1  # a clone of shuffled answers may be at most this much better than chance


@dataclass(frozen=True)
class Audit:
    """One check: what it asserts, whether that holds, and the numbers behind it."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok   ' if self.ok else 'CHECK'} {self.name}: {self.detail}"


def audits(result: Evaluation) -> list[Audit]:
    """All audits of an evaluation; a check whose numbers were not measured is not ok."""
    done = [row for row in result.released if not row.unreachable]
    checks = [
        _seeds(result),
        _control(result),
        _attacks(result),
        _effective(result),
        _chance(result),
    ]
    checks += _labels_alone(result)
    for field, name, good in (
        ("deterministic", "victims are deterministic, in eval mode", "same images, same answers"),
        ("distributions", "answers are distributions", "non-negative, sum 1"),
    ):
        bad = [row for row in done if getattr(row, field) is not True]
        checks.append(Audit(name, bool(done) and not bad, f"not {_names(bad)}" if bad else good))
    checks += [_deployed(result), _budget(result), _overlap(result), _epochs(result)]
    return checks + _costs(result) + _floors(result)


def _seeds(result: Evaluation) -> Audit:
    counts = [len(_seeds_of(result, *pair)) for pair in result.pairs()]
    least = min(counts, default=0)
    return Audit("seeds", least >= SEEDS, f"at least {least}; a spread needs {SEEDS}")


def _seeds_of(result: Evaluation, victim: str, defense: str) -> set[int]:
    return {c.seed for c in result.select(result.cells, victim=victim, defense=defense)}


def _control(result: Evaluation) -> Audit:
    controls = result.select(result.released, victim=result.control, defense=UNDEFENDED)
    name = "a control without a defense is in the table"
    detail = _names(controls) if controls else "no victim of method qat"
    return Audit(name, bool(controls), detail)


def _attacks(result: Evaluation) -> Audit:
    bad = [
        f"{victim} behind {defense}"
        for victim, defense in result.pairs()
        if not (
            result.per_seed(victim, defense, reads(SOFT))
            and result.per_seed(victim, defense, reads(HARD))
        )
        and not any(
            row.unreachable
            for row in result.select(result.released, victim=victim, defense=defense)
        )
    ]
    detail = f"not {', '.join(bad)}" if bad else "answers as given and their labels"
    return Audit("attacked from soft and from hard answers", not bad and bool(result.cells), detail)


def _effective(result: Evaluation) -> Audit:
    best = [
        cell
        for victim in dict.fromkeys(row.victim for row in result.released)
        for cell in result.per_seed(victim, UNDEFENDED, _best_without_labels)
    ]
    name = "the attack works on an undefended victim"
    if not best:
        return Audit(name, False, f"not tried; chance is {result.chance:.1%}")
    accuracy = max(cell.accuracy for cell in best)
    detail = f"best clone {accuracy:.1%}, chance {result.chance:.1%}"
    return Audit(name, accuracy >= result.chance + ABOVE_CHANCE, detail)


def _best_without_labels(cells: list[Cell]) -> Cell | None:
    """The best attack without labeled images: with them, a clone may owe its accuracy to labels."""
    return best_of([cell for cell in cells if not owns(cell.attack)])


def _labels_alone(result: Evaluation) -> list[Audit]:
    """Whether the accuracy that an attacker's labeled images give without the victim is known."""
    attacks = list(dict.fromkeys(cell.attack for cell in result.cells))
    controls = {text: control_of(text, attacks) for text in attacks if steals(text) and owns(text)}
    if not controls:
        return []
    missing = dict.fromkeys(without_victim(text) for text, control in controls.items()
                            if control is None)  # fmt: skip
    alone = {control: [cell.accuracy for cell in result.cells if cell.attack == control]
             for control in controls.values() if control is not None}  # fmt: skip
    known = [f"{control} {mean(values):.1%}" for control, values in alone.items()]
    best = max(cell.accuracy for cell in result.cells if cell.attack in controls)
    detail = "; ".join([*known, *([f"not tried: add {', '.join(missing)}"] if missing else [])])
    name = "the baseline without the victim is known"
    return [Audit(name, not missing, f"{detail}; best clone that starts from them {best:.1%}")]


def _chance(result: Evaluation) -> Audit:
    controls = [cell for cell in result.cells if is_control(cell.attack)]
    values = [cell.accuracy for cell in controls if not owns(cell.attack)]  # labels alone teach
    name = "answers to other images teach nothing"
    if not values:
        detail = f"not tried: add the attack knockoff:reading={CONTROL}"
        return Audit(name, False, detail)
    detail = f"clones of shuffled answers {mean(values):.1%}, chance {result.chance:.1%}"
    return Audit(name, mean(values) <= result.chance + NEAR_CHANCE, detail)


def _deployed(result: Evaluation) -> Audit:
    known = [row.agreement for row in result.released if row.agreement is not None]
    name = "the deployed model is the trained one"
    if not known or len(known) < len(result.released):
        return Audit(name, False, f"attacked: {result.deployed}; agreement not measured for all")
    detail = f"attacked: {result.deployed}; argmax agreement at least {min(known):.2%}"
    return Audit(name, min(known) >= AGREEMENT, detail)


def _budget(result: Evaluation) -> Audit:
    over = [cell for cell in result.cells if cell.queries > cell.budget]
    most = max((cell.queries for cell in result.cells), default=0)
    detail = f"exceeded in {len(over)} attacks" if over else f"at most {most} queries"
    return Audit("query budgets are respected", bool(result.cells) and not over, detail)


def _overlap(result: Evaluation) -> Audit:
    detail = ", ".join(f"{count} {name}" for name, count in result.overlap.items()) or "not checked"
    owned = any(owns(cell.attack) for cell in result.cells)
    sets = ("queries", "validation") if owned else ("queries",)  # that clones were trained on
    counts = {name: count for name, count in result.overlap.items() if name.startswith(sets)}
    unknown = {"queries in train", "queries in test"} - set(result.overlap)
    if unknown:
        detail += f"; not compared, as the set is streamed: {', '.join(sorted(unknown))}"
    ok = not unknown and not any(counts.values())
    return Audit("queries are not the victim's images", ok, detail)


def _epochs(result: Evaluation) -> Audit:
    if not result.cells:
        return Audit("clones are those of the last epoch", False, "no clone")
    gain = 100 * mean(cell.gain for cell in result.cells)
    detail = f"choosing the best epoch with the test set would add {gain:.1f} points on average"
    return Audit("clones are those of the last epoch", True, detail)


def _costs(result: Evaluation) -> list[Audit]:
    """Whether each victim behind each defense keeps the accuracy of the undefended control,
    compared seed by seed."""
    control = {
        row.seed: row.accuracy
        for row in result.select(result.released, victim=result.control, defense=UNDEFENDED)
        if row.accuracy is not None
    }
    checks = []
    for victim, defense in result.pairs():
        rows = result.select(result.released, victim=victim, defense=defense)
        losses = [
            control[row.seed] - row.released_accuracy
            for row in rows
            if row.released_accuracy is not None and row.seed in control
        ]
        if losses and (victim, defense) != (result.control, UNDEFENDED):
            detail = f"{-100 * mean(losses):+.2f} points, -{100 * ACCURACY_LOSS} allowed"
            name = f"{victim} behind {defense} keeps the accuracy of {result.control}"
            checks.append(Audit(name, mean(losses) <= ACCURACY_LOSS, detail))
    return checks


def _floors(result: Evaluation) -> list[Audit]:
    lowest = floor(result)
    checks = []
    for victim, defense in result.pairs():
        best = result.per_seed(victim, defense, best_of)
        if lowest is not None and best and (victim, defense) != (result.control, UNDEFENDED):
            accuracy = mean(cell.accuracy for cell in best)
            detail = f"best of all attacks {accuracy:.1%}, floor {lowest:.1%}"
            name = f"{victim} behind {defense} beats showing labels only"
            checks.append(Audit(name, accuracy < lowest, detail))
    return checks


def _names(rows: list[Released]) -> str:
    return ", ".join(dict.fromkeys(f"{row.victim} behind {row.defense}" for row in rows))
