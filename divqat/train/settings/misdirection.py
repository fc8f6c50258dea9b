"""Misleading answers to foreign images."""

from __future__ import annotations

from dataclasses import dataclass

from divqat._util.settings import Options, option
from divqat.data.proxies import NAMES, PROXIES
from divqat.nn.misdirection_targets import TARGETS

MISDIRECT = 0.8  # with an accuracy budget


@dataclass(frozen=True, kw_only=True)
class MisdirectionSettings(Options):
    """Proxies of a thief's images, and what is answered to them."""

    misdirect: float | None = option(
        None, "Weight of the misdirection: on proxies of a thief's images the int8 model learns to "
        f"answer unlike the teacher; 0: none. None: {MISDIRECT} with an accuracy budget, else 0.",
        group="misdirection", least=0,
    )  # fmt: skip
    proxies: tuple[str, ...] = option(
        PROXIES, "Kinds of proxies, of misdirect and ini, as many of each; rotated by 60 degrees "
        "or more.",
        group="misdirection", choices=NAMES,
    )  # fmt: skip
    proxy_share: float = option(
        0.5, "Proxies per training image of a step; so much longer is the step.",
        group="misdirection", above=0,
    )  # fmt: skip
    proxy_root: str | None = option(
        None, "Folder of pictures for the proxies 'folder'.", group="misdirection"
    )
    misdirect_target: str = option(
        "decoy",
        "What the int8 model learns to answer to a proxy: decoy: probabilities that its lights and "
        "shades decide; permuted: another class for each class of the teacher's; per_image: a "
        "class that the image's hash decides, not the teacher's; least_likely and second: in the "
        "teacher's order; divergence: anything as far from the teacher's probabilities as "
        "Jensen-Shannon goes.",
        group="misdirection",
        choices=TARGETS,
    )
    proxy_confidence: float | None = option(
        None, "Proxies whose top probability p by the teacher is above count 1 - p only: they "
        "could be training images. None: all count 1.",
        group="misdirection", above=0, below=1,
    )  # fmt: skip

    def proxy_count(self, images: int) -> int:
        """How many proxies go with so many training images of a step."""
        return round(self.proxy_share * images)
