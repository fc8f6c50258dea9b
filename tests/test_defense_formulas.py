"""The formulas of the defenses, worked by hand in float64."""

import math

import pytest
import torch
from testing import tensor

from divqat.defenses.adaptive_misinformation import misinformation_loss
from divqat.defenses.dcp import DCP
from divqat.defenses.keep import LabelOnly, Rounding, TopK
from divqat.defenses.reverse_sigmoid import ClampedReverseSigmoid, ReverseSigmoid
from divqat.defenses.stingy import Stingy
from divqat.defenses.temperature import Temperature

# At gamma = 1, r = beta (y - 1/2); at gamma = 1/2, odds of 4 to 1 become 2 to 1; at gamma = 1/4 the
# lowest odds that the clamped kind knows, 1e-12, become 1e-3. Rows below are up to the sum.
TINY = 1e-3 / (1 + 1e-3)
TABLE = [
    (ReverseSigmoid(beta=0.5, gamma=1), [0.7, 0.2, 0.1], [0.6, 0.35, 0.3]),
    (ReverseSigmoid(beta=1.2, gamma=0.5), [0.8, 0.2], [0.6, 0.4]),
    (ReverseSigmoid(beta=0.5), [1.0, 0.0, 0.0], [0.75, 0.25, 0.25]),
    (ReverseSigmoid(beta=1), [1.0, 0.0, 0.0], [1, 1, 1]),
    (ReverseSigmoid(beta=3, gamma=1), [0.9, 0.1], [0, 1.3]),
    (ReverseSigmoid(beta=7), [0.5, 0.5], [1, 1]),
    (ReverseSigmoid(beta=0), [0.7, 0.2, 0.1], [0.7, 0.2, 0.1]),
    (ClampedReverseSigmoid(beta=0.5, gamma=1), [0.7, 0.2, 0.1], [0.7, 0.35, 0.3]),
    (ClampedReverseSigmoid(beta=1.2, gamma=0.5), [0.8, 0.2], [0.8, 0.4]),
    (ClampedReverseSigmoid(beta=1, gamma=0.25), [1, 0, 0], [1, 0.5 - TINY, 0.5 - TINY]),
    (DCP(beta=0.8, gamma=1), [0.7, 0.2, 0.1], [0.7, 0.44, 0.42]),  # s < beta: open
    (DCP(beta=0.8, gamma=1), [0.9, 0.1, 0.0], [0.9, 0.1, 0.0]),  # s > beta: closed
    (DCP(beta=0.7, gamma=1), [0.7, 0.2, 0.1], [0.7, 0.305, 0.24]),  # s = beta: half
    (DCP(beta=0.6, gamma=1, nu=10 * math.log(3)), [0.7, 0.3], [0.7, 0.33]),  # a = 1/(1 + 3)
    (Temperature(temperature=2), [0.64, 0.36], [0.8, 0.6]),
    (Temperature(temperature=0.5), [0.8, 0.2], [0.64, 0.04]),
    (Temperature(temperature=5), [0.0, 1.0], [0.0, 1.0]),
    (Temperature(temperature=1), [0.7, 0.2, 0.1], [0.7, 0.2, 0.1]),
    (TopK(k=2), [0.1, 0.6, 0.1, 0.2], [0, 6, 0, 2]),
    (TopK(k=2), [0.2, 0.6, 0.2], [2, 6, 0]),
    (Stingy(k=1), [0.1, 0.6, 0.3], [0, 1, 0]),
    (LabelOnly(), [0.1, 0.45, 0.45], [0, 1, 0]),
    (Rounding(decimals=1), [0.56, 0.38, 0.06], [6, 4, 1]),
    (Rounding(decimals=0), [0.4, 0.3, 0.3], [1, 1, 1]),
]


@pytest.mark.parametrize(("defense", "row", "wanted"), TABLE)
def test_formula(defense, row, wanted):
    released = defense(tensor([row], torch.float64), torch.zeros(1, 1, 2, 2))
    wanted = tensor([wanted], torch.float64)
    torch.testing.assert_close(released, wanted / wanted.sum(), rtol=0, atol=1e-11)


def test_temperature_is_that_of_the_logits():
    logits = torch.linspace(-4, 3, 12, dtype=torch.float64).view(2, 6)
    released = Temperature(temperature=3.5)(logits.softmax(1), torch.zeros(2, 1, 2, 2))
    torch.testing.assert_close(released, (logits / 3.5).softmax(1))


def test_stingy_is_the_softmax_of_the_logits_that_stay():
    logits = tensor([[1.0, -2.0, 3.0, 0.5]], torch.float64)
    released = Stingy(k=2)(logits.softmax(1), torch.zeros(1, 1, 2, 2))
    nothing = tensor([[1.0, -math.inf, 3.0, -math.inf]], torch.float64)
    torch.testing.assert_close(released, nothing.softmax(1))


def test_misinformation_loss():
    # -log(1 - 0.5) and -log(1 - 0.2)
    logits = tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], torch.float64).log()
    loss = misinformation_loss(logits, torch.tensor([0, 2]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(1.25)) / 2)


def test_misinformation_loss_and_gradient_where_the_label_is_certain():
    logits = tensor([[100.0, 0.0, 0.0]]).requires_grad_()
    loss = misinformation_loss(logits, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(100 - math.log(2))  # 1 - p = 2 exp(-100)
    torch.testing.assert_close(logits.grad, tensor([[1.0, -0.5, -0.5]]))
