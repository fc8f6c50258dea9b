"""Settings of misdirection, which gives misleading answers to foreign images."""

from __future__ import annotations

from dataclasses import dataclass

from divqat._util.settings import Options, option
from divqat.data.proxies import NAMES, PROXIES
from divqat.nn.misdirection_targets import TARGETS

MISDIRECT = 0.8  # with an accuracy budget


@dataclass(frozen=True, kw_only=True)
class MisdirectionSettings(Options):
    """Proxies of a thief's images, and their targets."""

    misdirect: float | None = option(
        None, "Weight of misdirection: the int8 model learns misleading answers to proxies of a "
        f"thief's images; 0: none. None: {MISDIRECT} with an accuracy budget, else 0.",
        group="misdirection", least=0,
    )  # fmt: skip
    proxies: tuple[str, ...] | None = option(
        None, "Kinds of proxies for misdirect, ini and misleader, equally many of each; rotated: "
        "by 60 degrees or more; augmented: as in MISLEADER. None: augmented for misleader, else "
        f"{', '.join(PROXIES)}.",
        group="misdirection", choices=NAMES,
    )  # fmt: skip
    proxy_share: float = option(
        0.5, "Proxies per training image of a step; a step takes longer by this fraction.",
        group="misdirection", above=0,
    )  # fmt: skip
    proxy_root: str | None = option(
        None, "Image folder for the proxies 'folder'.", group="misdirection"
    )
    misdirect_target: str = option(
        "decoy",
        "Answer to a proxy that the int8 model learns. reject: none of the classes, so that all "
        "logits are 0; decoy: probabilities computed from its "
        "coarse brightness; permuted: the teacher's class, permuted; per_image: a class other than "
        "the teacher's, chosen by a hash of the image; least_likely, second: the teacher's least "
        "or second most likely class; divergence: any with the largest Jensen-Shannon divergence "
        "from the teacher's.",
        group="misdirection",
        choices=TARGETS,
    )
    decoy_key: str | None = option(
        None, "Draw the decoy of misdirect_target decoy from this key of 64 hexadecimal digits, so "
        "that divqat ownership can recognize a copy. Keep it secret. None: from the seed.",
        group="misdirection",
    )  # fmt: skip
    proxy_confidence: float | None = option(
        None, "Proxies with a top probability p of the teacher above this get the weight 1 - p, as "
        "they resemble training images. None: all weigh 1.",
        group="misdirection", above=0, below=1,
    )  # fmt: skip

    def proxy_count(self, images: int) -> int:
        """Number of proxies in a step with ``images`` training images."""
        return round(self.proxy_share * images)
