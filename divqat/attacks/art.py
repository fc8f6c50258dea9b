"""A victim for the attacks of the Adversarial Robustness Toolbox (ART): ``divqat[art]``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from divqat._util.errors import require
from divqat.victim import Victim


def art_classifier(victim: Victim, *, num_classes: int, image_shape: tuple[int, int, int]) -> Any:
    """The victim as an ``art.estimators.classification.BlackBoxClassifier``.

    ART's images are float32 [N, C, H, W] arrays in [-1, 1], see :func:`divqat.data.to_float`. Each
    image counts as a query, and the query budget applies: ART passes on the victim's
    QueryBudgetExceeded. For hard labels use ``Victim(..., answer="label")``: ART's ``ClassLabels``
    gives all ones for a batch that contains all classes (release 1.20.1).

    Notes on the attacks of ART 1.20:

    - ``KnockoffNets`` and ``CopycatCNN`` learn labels only, whatever the answers are, unless
      ``use_probability=True``; the surrogate then needs ``torch.nn.CrossEntropyLoss()``. The
      adaptive strategy always learns labels.
    - Answers are probabilities, but the adaptive strategy's rewards ``loss`` and ``all`` treat them
      as logits.
    - Rounded and top-k answers do not sum to 1, and ART does not normalize them.
    - They query one image at a time unless ``batch_size_query`` is given.
    - They take no seed: seed ``numpy.random`` and torch.

    Args:
        victim: the black box; it continues to count its queries.
        num_classes: of the victim.
        image_shape: (C, H, W) of its images.

    Raises:
        TypeError: ``victim`` is not a :class:`divqat.victim.Victim`.
        ImportError: ART is not installed.
        ValueError: (at a query) images of another shape or outside [-1, 1], or a victim whose
            number of classes is not ``num_classes``.

    Example:
        >>> victim = Victim("model.onnx", query_budget=5000)  # doctest: +SKIP
        >>> classifier = art_classifier(victim, num_classes=10, image_shape=(1, 28, 28))
        ... # doctest: +SKIP
        >>> attack = KnockoffNets(classifier, nb_stolen=5000, batch_size_query=256,
        ...                       use_probability=True)  # doctest: +SKIP
    """
    if not isinstance(victim, Victim):
        raise TypeError(f"victim: wanted a divqat.Victim, got {type(victim).__name__}")
    classification = require("art.estimators.classification", "art")

    def answer(images: np.ndarray) -> np.ndarray:
        if images.shape[1:] != tuple(image_shape):
            raise ValueError(
                f"images: wanted [N, {', '.join(map(str, image_shape))}], got {list(images.shape)}"
            )
        if not (abs(images) <= 1).all():
            raise ValueError(
                f"images: wanted [-1, 1], got {images.min():g} to {images.max():g}; "
                "divqat.data.to_float makes them"
            )
        answers = victim(torch.from_numpy(np.ascontiguousarray(images, np.float32))).numpy()
        if answers.shape[1] != num_classes:
            raise ValueError(
                f"num_classes: wanted {answers.shape[1]} like the victim, got {num_classes}"
            )
        return answers

    return classification.BlackBoxClassifier(
        answer, tuple(image_shape), num_classes, clip_values=(-1.0, 1.0)
    )
