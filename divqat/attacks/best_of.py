"""Several attacks, from which the attacker keeps the best clone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from divqat._util.names import check_name
from divqat.attacks.attack import Attack, Extraction, Watch
from divqat.data.sets import ImageSet
from divqat.metrics import accuracy, predict
from divqat.victim import Victim


@dataclass(frozen=True, eq=False)
class BestExtraction(Extraction):
    """The extraction of the best attack, but with the ``queries`` of all attacks together."""

    name: str  # of the best attack
    accuracies: dict[str, float]  # by attack: accuracy of its clone on the holdout, in [0, 1]
    extractions: dict[str, Extraction]  # by attack


@dataclass(frozen=True, eq=False)
class BestOf:
    """Run several attacks and keep the clone that is most accurate on the attacker's own images.

    A defense is only as good as it is against the best attack, and an attacker with a few labeled
    images can choose that attack without the test set. Ties go to the earlier attack.

    Args:
        attacks: by name; the name is also that of a folder in ``resume_dir``.
        holdout: labeled images that the attacker has besides the query set. They cost no query.

    Raises:
        ValueError: no attacks, no images, or a name that cannot be the name of a folder.

    Example:
        >>> from divqat.attacks import KnockoffNets
        >>> soft, label = KnockoffNets(), KnockoffNets(reading="label")
        >>> BestOf({"soft": soft, "label": label}, holdout)  # doctest: +SKIP
    """

    attacks: Mapping[str, Attack]
    holdout: ImageSet

    def __post_init__(self) -> None:
        if not self.attacks or not len(self.holdout):
            raise ValueError(
                "attacks, holdout: wanted at least one attack and one image, got "
                f"{len(self.attacks)} and {len(self.holdout)}"
            )
        for name in self.attacks:
            check_name("attacks", name)

    def __call__(
        self,
        victim: Victim,
        query_set: Tensor,  # uint8 [N, C, H, W]
        clone: nn.Module,
        *,
        resume_dir: str | Path | None = None,
        watch: Watch = lambda *_: None,
    ) -> BestExtraction:
        """Run the attacks one after another, each from ``clone`` and with its own queries.

        Arguments and errors are those of :meth:`Attack.__call__`. ``watch`` sees the clones of all
        attacks. If the remaining query budget is too small for an attack, it raises before its
        first query; the results of earlier attacks are in ``resume_dir``.
        """
        extractions = {
            name: attack(
                victim,
                query_set,
                clone,
                resume_dir=None if resume_dir is None else Path(resume_dir) / name,
                watch=watch,
            )
            for name, attack in self.attacks.items()
        }
        accuracies = {
            name: accuracy(predict(extraction.clone, self.holdout.images), self.holdout.labels)
            for name, extraction in extractions.items()
        }
        name = max(accuracies, key=accuracies.__getitem__)  # the first of equals
        best = extractions[name]
        queries = sum(extraction.queries for extraction in extractions.values())
        return BestExtraction(best.clone, best.transfer_set, queries, name, accuracies, extractions)
