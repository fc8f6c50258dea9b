"""Stingy Teacher (Ma et al., ICLR 2022 workshop)."""

from __future__ import annotations

from dataclasses import dataclass

from divqat._util.settings import option
from divqat.defenses.keep import TopK


@dataclass(frozen=True, kw_only=True)
class Stingy(TopK):
    """The logits of the ``k`` most probable classes as they are, nothing of the others.

    Ma, Huang, Tang, You, Kong, Xie: "Sparse Logits Suffice to Fail Knowledge Distillation",
    PAIR²Struct workshop at ICLR 2022, also known as "Stingy Teacher". What a class outside the top
    gets is zero *probability*, at any temperature of the student's, not the logit 0. As

        softmax over S of z  =  y_k / sum of y over S,

    that is :class:`TopK` under the name it has in the literature on distillation. The share of the
    classes that the authors keep depends on the data set; the default here is ours, the least that
    says more than the label.
    """

    k: int = option(2, "How many classes keep their logit.", least=1)
