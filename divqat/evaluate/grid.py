"""The settings of an evaluation: each field is a flag of ``divqat evaluate`` and a key under
``evaluate:`` in the YAML file of a study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from divqat import models
from divqat._util.settings import ConfigError, option
from divqat.attacks import ATTACKS, Attack
from divqat.attacks.attacker import Attacker
from divqat.attacks.clone_settings import CloneSettings
from divqat.data import Splits
from divqat.defenses import DEFENSES
from divqat.evaluate.specs import UNDEFENDED, make_attack, make_defense, owns, steals

UNLIMITED = 2**31  # a budget that is enough for any attack, where the query set decides it
SPEC = "name or name:setting=value,setting=value"


@dataclass(frozen=True, kw_only=True)
class Grid(Attacker):
    """Every defense with every attack, query budget and clone.

    Raises:
        ConfigError: a value has a wrong type or is out of range; an unknown attack or defense.
    """

    attacks: tuple[str, ...] = option(
        ("knockoff", "knockoff:reading=label"),
        f"{SPEC}; one of {', '.join(ATTACKS)}.",
        group="what is tried",
    )
    defenses: tuple[str, ...] = option(
        (UNDEFENDED,),
        f"{SPEC}; one of {', '.join([UNDEFENDED, *DEFENSES])}. l1=0.5 sets the strength so that "
        "the released answers to the queries have this mean L1 distance from the clean ones.",
        group="what is tried",
    )
    budgets: tuple[int, ...] | None = option(
        None,
        "Query budgets of each attack; several give a curve. None: the size of the query set.",
        group="what is tried", least=1,
    )  # fmt: skip
    clones: tuple[str, ...] = option(
        ("vgg_small",),
        "Architectures that the attacker trains.",
        group="what is tried",
        choices=models.names(),
        foreign=True,
    )
    seeds: int = option(
        3, "Runs of each attack, with seeds 0, 1 ...", group="what is tried", least=1
    )

    split: str = option(
        "test", "Images on which accuracies are measured; validation: every second one of that "
        "split, while attackers own some of the others; this tunes a defense without the test set.",
        group="what is tried", choices=("test", "validation"),
    )  # fmt: skip

    query_limit: int | None = option(
        None, "Images of the query set; None: all.", group="attacker", least=1
    )
    holdout: int = option(
        200, "Labeled images of the victim's kind, from the validation split, on which the "
        "attacker chooses its best clone.",
        group="attacker", least=1,
    )  # fmt: skip
    labeled: int = option(
        200, "Other labeled images of the victim's kind, from the validation split, for the "
        "attacks that train on some.",
        group="attacker", least=1,
    )  # fmt: skip
    epsilons: tuple[float, ...] = option(
        (8 / 255,), "How far FGSM and PGD may move each pixel of a test image, as a fraction of "
        "its range (8/255 = 0.0314 is 8 grey levels); an empty list: robustness is not measured.",
        group="side effects", above=0, most=1, empty=True,
    )  # fmt: skip
    adversarial_images: int = option(
        1000,
        "Number of test images, the first ones, for FGSM and PGD.",
        group="side effects",
        least=1,
    )
    surrogate: str = option(
        "lenet", "Network of the defenses that need one.",
        group="owner", choices=models.names(), foreign=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for attack in self.attacks:
            self.attack(attack, min(self.budgets or (UNLIMITED,)), 0)
        for defense in self.defenses:
            make_defense(defense)
        for name in ("attacks", "defenses", "budgets", "clones", "epsilons"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise ConfigError(
                    f"{name}: wanted no duplicates, got {', '.join(map(str, values))}"
                )

    def attack(self, text: str, budget: int, seed: int) -> Attack:
        """The attack of a spec; :func:`make_attack` says what fills in missing settings."""
        defaults = {name: getattr(self, name) for name in CloneSettings.names()}
        return make_attack(text, {**defaults, "query_budget": budget, "seed": seed})

    def attacker(self, queries: int, defense: str) -> Iterator[tuple[str, int, str]]:
        """Attack, query budget and clone of every cell of a victim behind ``defense``.

        Controls and attacks without queries run only where there is no defense, as it would make
        no difference to them."""
        for budget in self.budgets or (queries,):
            for clone in self.clones:
                for attack in self.attacks:
                    if defense == UNDEFENDED or steals(attack):
                        yield attack, budget, clone

    def check(self, splits: Splits, queries: int) -> None:
        """Check that there are enough labeled images for the attacker, and enough ``queries`` for
        the budgets.

        Raises:
            ConfigError: the validation split has too few images for an attack that uses some, or
                a budget is larger than an attack can use.
        """
        for budget in self.budgets or ():
            for attack in self.attacks:
                try:
                    self.attack(attack, budget, 0).check(queries)
                except ValueError as error:
                    raise ConfigError(f"attack {attack}, budget {budget}: {error}") from None
        available = len(self.measured(splits).validation)
        if any(map(owns, self.attacks)) and self.holdout + self.labeled > available:
            raise ConfigError(
                f"holdout, labeled: wanted at most {available} together, the validation images of "
                f"{splits.name} on which nothing is measured, got {self.holdout} and "
                f"{self.labeled}; lower them, or leave out the attacks that own labeled images"
            )

    def measured(self, splits: Splits) -> Splits:
        """The data with the images of ``split`` in place of the test set."""
        if self.split == "test":
            return splits
        validation = splits.validation
        test, rest = validation.subset(slice(0, None, 2)), validation.subset(slice(1, None, 2))
        return replace(splits, test=test, validation=rest)

    def queries(self, splits: Splits) -> Tensor:
        """The query set, uint8 [N, C, H, W]; the same for every seed."""
        return self.load_queries(self.measured(splits), self.query_limit)
