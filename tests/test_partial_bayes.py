import pytest
import torch

from divqat.attacks import partial_bayes
from divqat.attacks.partial_bayes import look_up

CLEAN = torch.tensor([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.7, 0, 0.3], [0.2, 0.8, 0]])
RELEASED = torch.tensor([[0.6, 0.4, 0], [0.602, 0.398, 0], [0.6, 0.2, 0.2], [0.497, 0.503, 0]])


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ([0.6, 0.4, 0], [0.85, 0.15, 0]),  # 0 and 0.004 away: their mean
        ([0.608, 0.392, 0], [0.8, 0.2, 0]),  # 0.016 and 0.012 away: the nearest
        ([0.59, 0.2, 0.21], [0.7, 0, 0.3]),  # 0.02 away, the others much farther
        ([0.501, 0.499, 0], [0.9, 0.1, 0]),  # 0.008 from the last, but of another top-1 class
        ([0.1, 0.1, 0.8], [0.1, 0.1, 0.8]),  # no such top-1 class: as it was
    ],
)
def test_look_up_by_hand(answer, wanted):
    got = look_up(torch.tensor([answer]), CLEAN, RELEASED, 0.01)
    torch.testing.assert_close(got, torch.tensor([wanted]))


@pytest.mark.parametrize("distances", [1, 50, 2**24])
def test_look_up_agrees_with_brute_force(monkeypatch, distances):
    monkeypatch.setattr(partial_bayes, "DISTANCES", distances)
    torch.manual_seed(0)
    answers, released, clean = (torch.rand(n, 3, dtype=torch.float64) for n in (40, 60, 60))
    wanted = []
    for answer in answers:
        pairs = [
            ((answer - there).abs().sum(), y)
            for there, y in zip(released, clean, strict=True)
            if there.argmax() == answer.argmax()
        ]
        reach = max(0.3, min(far for far, _ in pairs))
        wanted.append(torch.stack([y for far, y in pairs if far <= reach]).mean(0))
    got = look_up(answers.float(), clean.float(), released.float(), 0.3)
    torch.testing.assert_close(got, torch.stack(wanted).float())
