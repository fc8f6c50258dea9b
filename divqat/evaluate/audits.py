"""Questions that a result has to answer before its numbers mean anything."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from divqat.evaluate.result import HARD, SOFT, Result, VictimResult

ACCURACY_LOSS = 0.005  # a defense may cost so much accuracy before it is flagged
AGREEMENT = 0.99  # of the fake-quantized and the exported model
ABOVE_CHANCE = 0.1  # an attack that gains less on plain QAT is too weak to test a defense
SEEDS = 3
UNDEFENDED = ("fp", "ptq", "qat", "kd-qat")


@dataclass(frozen=True)
class Audit:
    """One question, whether the answer is the wanted one, and the numbers behind it."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok   ' if self.ok else 'CHECK'} {self.name}: {self.detail}"


def audits(result: Result) -> list[Audit]:
    """All audits of a result; what was not measured counts as not ok."""
    found = [_seeds(result), _control(result), _chance(result), _budget(result), _answers(result)]
    for field, name, good in (
        ("deterministic", "victims are deterministic", "same images, same answers"),
        ("distributions", "answers are distributions", "non-negative, sum 1"),
    ):
        bad = [v for v in result.victims if getattr(v, field) is not True]
        found.append(Audit(name, not bad, f"not shown for {_names(bad)}" if bad else good))
    found.append(_deployed(result))
    for name, runs in result.by_victim.items():
        if runs[0].method not in UNDEFENDED:
            found += _defense(result, name, runs)
    return found


def _seeds(result: Result) -> Audit:
    done = [seed for seed in result.seeds if any(v.seed == seed for v in result.victims)]
    detail = f"{len(done)} of {len(result.seeds)} planned; a spread wants at least {SEEDS}"
    return Audit("seeds", done == result.seeds and len(done) >= SEEDS, detail)


def _control(result: Result) -> Audit:
    missing = sorted({v.seed for v in result.victims} - {v.seed for v in result.control})
    if not result.control:
        return Audit("plain QAT is the control", False, "no victim of method qat")
    detail = f"missing for seeds {missing}" if missing else "trained with the same seeds"
    return Audit("plain QAT is the control", not missing, detail)


def _chance(result: Result) -> Audit:
    best = [v.best for v in result.control if v.best is not None]
    name = "the attack works on plain QAT"
    if not best:
        return Audit(name, False, f"not attacked; chance is {result.chance:.1%}")
    detail = f"best clone {mean(best):.1%}, chance {result.chance:.1%}"
    return Audit(name, mean(best) >= result.chance + ABOVE_CHANCE, detail)


def _budget(result: Result) -> Audit:
    queries = [attack.queries for v in result.victims for attack in v.attacks.values()]
    most = max(queries, default=0)
    return Audit(
        "the query budget is respected",
        bool(queries) and most <= result.query_budget,
        f"at most {most} of {result.query_budget} queries",
    )


def _answers(result: Result) -> Audit:
    attacked = [v for v in result.victims if v.attacks or v.method != "fp"]
    bad = [v for v in attacked if not {SOFT, HARD} <= v.attacks.keys()]
    return Audit(
        "attacked with soft and hard answers",
        bool(attacked) and not bad,
        f"not {_names(bad)}" if bad else "probabilities and labels",
    )


def _deployed(result: Result) -> Audit:
    quantized = [v for v in result.victims if v.method != "fp"]
    bad = [v for v in quantized if v.argmax_agreement is None or v.argmax_agreement < AGREEMENT]
    name = "the exported int8 model is what is attacked"
    if bad or not quantized:
        return Audit(name, False, f"agreement below {AGREEMENT:.0%} or unknown: {_names(bad)}")
    least = min(v.argmax_agreement for v in quantized if v.argmax_agreement is not None)
    return Audit(name, True, f"argmax agreement with the trained one at least {least:.2%}")


def _defense(result: Result, name: str, runs: list[VictimResult]) -> list[Audit]:
    control = {v.seed: v.accuracy for v in result.control}
    losses = [control[v.seed] - v.accuracy for v in runs if v.seed in control]
    best = [v.best for v in runs if v.best is not None]
    found = []
    if losses:
        detail = (
            f"{-100 * mean(losses):+.2f} points beside plain QAT, -{100 * ACCURACY_LOSS} allowed"
        )
        found.append(Audit(f"{name} keeps its accuracy", mean(losses) <= ACCURACY_LOSS, detail))
    if best and result.floor:
        detail = f"best clone {mean(best):.1%}, floor {mean(result.floor):.1%}"
        beats = mean(best) < mean(result.floor)
        found.append(Audit(f"{name} beats showing labels only", beats, detail))
    return found


def _names(victims: list[VictimResult]) -> str:
    return ", ".join(f"{v.name} (seed {v.seed})" for v in victims) or "any victim"
