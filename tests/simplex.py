"""Rows of probabilities of every kind, for the properties of defenses."""

import torch
from hypothesis import strategies as st
from testing import seeded

ROWS = 6
KINDS = ["soft", "confident", "one-hot", "uniform", "tied", "tiny"]


@st.composite
def answers(draw, kinds=KINDS, most=1000):
    """Probabilities float32 [ROWS, 2 to most] and images [ROWS, 1, 2, 2]."""
    kind = draw(st.sampled_from(kinds))
    classes = draw(st.sampled_from([n for n in (2, 3, 4, 10, 100, 1000) if n <= most]))
    generator = seeded(draw(st.integers(0, 2**32)))
    shape = ROWS, classes
    logits = torch.randn(shape, generator=generator)
    images = torch.rand(ROWS, 1, 2, 2, generator=generator) * 2 - 1
    if kind == "one-hot":
        probs = torch.eye(classes)[logits.argmax(1)]
    elif kind == "uniform":
        probs = torch.full(shape, 1 / classes)
    elif kind == "tied":
        weights = torch.randint(3, shape, generator=generator).float()
        weights[:, 0] += 1  # no row without mass
        probs = weights / weights.sum(1, keepdim=True)
    else:
        probs = (logits * {"soft": 1, "confident": 8, "tiny": 60}[kind]).softmax(1)
    return probs, images


def is_simplex(rows):
    """Whether float32 rows are finite, not negative, and sum to 1."""
    return (
        rows.dtype == torch.float32
        and bool(rows.isfinite().all())
        and bool((rows >= 0).all())
        and bool(((rows.double().sum(1) - 1).abs() < 1e-5).all())
    )


def top_stays(released, probs, slack=0.0):
    """Whether each row's most probable class is still one of the largest, up to ``slack``."""
    kept = released.gather(1, probs.argmax(1, keepdim=True))[:, 0]
    return bool((kept >= released.amax(1) - slack).all())
