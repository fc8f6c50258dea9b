"""The curve of ``python -m bench rejection``, worked out by hand."""

import pytest
import torch

from bench.rejection import COSTS, curve


def test_the_curve_of_a_hundred_own_images_and_ten_foreign_ones():
    # Own image i has the largest logit i + 1; every tenth one is wrong: 10, 20, ... 100.
    own = torch.stack([torch.arange(1.0, 101), torch.zeros(100)], 1)
    labels = (torch.arange(1, 101) % 10 == 0).long()
    foreign = torch.stack([torch.full((10,), -1.0), torch.arange(10.0) + 0.5], 1)
    rows = curve(own, labels, foreign)
    assert [points for _, points, _, _ in rows] == list(COSTS)
    # Cost: accuracy, own and foreign images below the threshold: 1, 1, 2, 3, 6, 12.
    expected = [
        (0.90, 0.00, 0.1),
        (0.90, 0.00, 0.1),  # half a point is less than one image
        (0.89, 0.01, 0.2),
        (0.88, 0.02, 0.3),
        (0.85, 0.05, 0.6),
        (0.80, 0.11, 1.0),  # 10 is wrong, and costs nothing
    ]
    for (accuracy, _, of_own, of_foreign), wanted in zip(rows, expected, strict=True):
        assert (accuracy, of_own, of_foreign) == pytest.approx(wanted)


def test_a_network_that_tells_them_apart_rejects_all_foreign_images():
    own = torch.eye(3) * 5
    [free, *_] = curve(own, torch.arange(3), torch.rand(20, 3))
    assert free == (1.0, 0.0, 0.0, 1.0)
