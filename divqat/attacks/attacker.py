"""The settings of an attacker with a query set, which several commands share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from divqat._util.settings import option
from divqat.attacks.clone_settings import CloneSettings
from divqat.data import Splits, transfer_names, transfer_set

OWN = "own"  # not a transfer set: it comes with the victim's data
FOLDER = "folder"


@dataclass(frozen=True, kw_only=True)
class Attacker(CloneSettings):
    """The query set, and the training of a clone on the answers.

    Raises:
        ConfigError: a value has a wrong type or is out of range.
    """

    query_set: str = option(
        "photos",
        f"Images that the attacker queries; {OWN}: the victim's validation split, for an attacker "
        "who has unlabeled images of the victim's kind.",
        group="attacker",
        choices=(*transfer_names(), OWN),
    )
    query_root: str | None = option(
        None, "Folder with these images, if they are not found automatically.", group="attacker"
    )
    device: str = option("auto", "Where networks train: cpu, cuda ...", group="running")
    threads: int | None = option(None, "CPU threads; None: all.", group="running", least=1)

    @property
    def places(self) -> set[str]:
        """Settings of locations, which do not change results. (The content of a query set that is
        a folder depends on ``query_root``.)"""
        return {"device"} if self.query_set == FOLDER else {"device", "query_root"}

    def load_queries(self, splits: Splits, limit: int | None) -> Tensor:
        """The query set, uint8 [N, C, H, W]; the same for every seed."""
        if self.query_set == OWN:
            return splits.validation.subset(slice(limit)).images
        return transfer_set(
            self.query_set,
            channels=splits.channels,
            image_size=splits.image_size,
            data_root=self.query_root,
            limit=limit,
        )
