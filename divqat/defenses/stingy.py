"""Stingy Teacher (Ma et al., ICLR 2022 workshop)."""

from __future__ import annotations

from dataclasses import dataclass

from divqat._util.settings import option
from divqat.defenses.keep import TopK


@dataclass(frozen=True, kw_only=True)
class Stingy(TopK):
    """The unchanged logits of the ``k`` most probable classes, and no others.

    Ma, Huang, Tang, You, Kong, Xie: "Sparse Logits Suffice to Fail Knowledge Distillation",
    PAIR²Struct workshop at ICLR 2022, also known as "Stingy Teacher". The other classes get
    *probability* zero, at any temperature of the student, not the logit 0. As

        softmax over S of z  =  y_k / sum of y over S,

    this is :class:`TopK` under its name in the literature on distillation. The share of classes
    that the authors keep depends on the data set; the default here is ours, the smallest number
    that reveals more than the label.
    """

    k: int = option(2, "Number of classes that keep their logit.", least=1)
