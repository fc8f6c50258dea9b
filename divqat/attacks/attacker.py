"""The settings of an attacker with a query set, which several commands share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from divqat._util.settings import option
from divqat.attacks.clone_settings import CloneSettings
from divqat.attacks.query_set import FOLDER, NAMES, OWN, load_query_set, parse_query_set
from divqat.data import Splits


@dataclass(frozen=True, kw_only=True)
class Attacker(CloneSettings):
    """The query set, and the training of a clone on the answers.

    Raises:
        ConfigError: a value has a wrong type or is out of range.
    """

    query_set: str = option(
        "photos",
        f"Images that the attacker queries: one of {', '.join(NAMES)}, each with :COUNT or not, or "
        f"several joined by +, like {OWN}:1500+openclipart. {OWN}: the victim's validation split, "
        "for an attacker who has unlabeled images of the victim's kind.",
        group="attacker",
    )
    query_root: str | None = option(
        None, "Folder with these images, if they are not found automatically.", group="attacker"
    )
    device: str = option("auto", "Where networks train: cpu, cuda ...", group="running")
    threads: int | None = option(None, "CPU threads; None: all.", group="running", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_query_set(self.query_set)

    @property
    def places(self) -> set[str]:
        """Settings of locations, which do not change results. (The content of a query set that is
        a folder depends on ``query_root``.)"""
        folder = any(part.name == FOLDER for part in parse_query_set(self.query_set))
        return {"device"} if folder else {"device", "query_root"}

    def load_queries(self, splits: Splits, limit: int | None) -> Tensor:
        """The query set, uint8 [N, C, H, W]; the same for every seed.

        Raises:
            See :func:`divqat.attacks.query_set.load_query_set`.
        """
        return load_query_set(self.query_set, splits, self.query_root, limit)
