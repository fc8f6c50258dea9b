"""How shadow victims teach a network to recover the clean answers."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import QUERIES, toy_images, toy_model, toy_victim

from divqat.attacks import Shadow, attack
from divqat.attacks.ddae import recovery_network
from divqat.attacks.folder import Folder
from divqat.attacks.shadow import as_released, fit_decoy, misdirection_loss
from divqat.data import ImageSet, to_float
from divqat.data.proxies import PROXIES, proxy_batch
from divqat.metrics import predict, softmax
from divqat.nn.decoy import coarse_picture
from divqat.victim import Victim

pytestmark = pytest.mark.usefixtures("one_thread")

CLONE = toy_model(seed=1, dropout=0.3)
OWNED = ImageSet(*toy_images(60, seed=6))
MODEL = toy_victim()


def test_pairs_are_rows_of_one_shadow_and_one_image(monkeypatch):
    """Each input is a shadow's defended answer and the image's coarse picture, each target the
    clean answer of the same shadow to the same image."""

    def answered(self, task, images, number, seed):
        key = images.double().mean((1, 2, 3)).float()  # tells the images apart
        return torch.stack([key, key + number], 1), torch.stack([-key, -key - number], 1)

    monkeypatch.setattr(Shadow, "_shadow", answered)
    images = QUERIES[:30]
    run = Shadow(shadows=3, pairs=50)
    inputs, clean = run._pairs(None, images)
    assert inputs.shape == (50, 2 + 64) and clean.shape == (50, 2)
    assert torch.equal(inputs[:, :2], -clean)
    shades = {
        key.item(): row
        for key, row in zip(
            images.double().mean((1, 2, 3)).float(), coarse_picture(to_float(images)), strict=True
        )
    }
    drawn = [(key.item(), round((both - key).item())) for key, both in clean]
    assert len(set(drawn)) == 50 and {number for _, number in drawn} == {0, 1, 2}
    for (key, _), row in zip(drawn, inputs, strict=True):
        assert torch.equal(row[2:], shades[key])
    every, _ = replace(run, pairs=1000)._pairs(None, images)
    alone, _ = replace(run, pictures=False, pairs=1000)._pairs(None, images)
    assert every.shape == (90, 66) and torch.equal(every[:, :2], alone)
    other, _ = replace(run, seed=1)._pairs(None, images)
    assert not torch.equal(other, inputs)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("probs", [0.52, 0.26, 0.22]),
        ("label", [1.0, 0.0, 0.0]),
        ("top2", [0.52 / 0.78, 0.26 / 0.78, 0]),
        ("rounded1", [0.5, 0.3, 0.2]),
    ],
)
def test_shadows_show_what_the_victim_shows(answer, wanted):
    probs = torch.tensor([[0.52, 0.26, 0.22]])
    torch.testing.assert_close(as_released(probs, answer), torch.tensor([wanted]))
    torch.testing.assert_close(
        as_released(as_released(probs, answer), answer), torch.tensor([wanted])
    )


def distance(a, b):
    return (a - b).abs().sum(1).mean().item()


def misdirected(model, weight):
    """``model`` trained on as a victim is, with a decoy and images that the thief has not."""
    images, labels = toy_images(800, seed=1)
    model, targets = copy.deepcopy(model), F.one_hot(labels, 4).float()
    loss = misdirection_loss(fit_decoy(ImageSet(images, labels), 4, 77), weight, 1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model, to_float(images), targets, 0.0).backward()
        optimizer.step()
    return model.eval()


# the toys are noise around patterns; these are what a thief asks about
FOREIGN = proxy_batch(PROXIES, QUERIES, torch.Generator().manual_seed(5), 300)


def task_of(victim, images):
    return attack.Task(victim, images, CLONE, 4, Folder(None, {}), lambda *_: None)


@pytest.mark.slow
def test_recovered_answers_are_nearer_to_the_clean_ones():
    victim = Victim(misdirected(MODEL, 1.0))
    clean, released = softmax(predict(MODEL, FOREIGN)), victim(to_float(FOREIGN))
    run = Shadow(
        shadows=3, shadow_epochs=20, shadow_batch_size=20, shadow_pad=0, misdirect=1.0,
        recovery_epochs=60,
    ).owning(OWNED)  # fmt: skip
    estimate = run._recover(task_of(victim, FOREIGN), FOREIGN, released)
    torch.testing.assert_close(estimate.sum(1), torch.ones(300))
    assert distance(released, clean) > 0.5
    # Six starts that differ in the last bit: 0.73922 ± 0.00001 of it.
    assert distance(estimate, clean) < 0.95 * distance(released, clean)


def test_a_decoy_that_mixes_is_undone(monkeypatch):
    """y' = (y + t(x)) / 2 with the same t for all: with the picture, y can be told."""
    decoy = fit_decoy(OWNED, 4, 5)

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(300, 4, generator=generator).mul(2).softmax(1)

    def mixed(clean, images):
        return (clean + decoy(to_float(images))) / 2

    def answered(self, task, images, number, seed):
        clean = drawn(seed)
        return clean, mixed(clean, images)

    monkeypatch.setattr(Shadow, "_shadow", answered)
    clean = drawn(3)
    released = mixed(clean, FOREIGN)
    task = task_of(Victim(MODEL), FOREIGN)
    estimate = Shadow(shadows=8, recovery_epochs=60)._recover(task, FOREIGN, released)
    assert distance(estimate, clean) < 0.6 * distance(released, clean)  # 0.35 in place of 0.72


def test_restorer_reads_more_than_answers():
    network = recovery_network(10, 26).eval()
    assert [m.in_features for m in network if isinstance(m, nn.Linear)] == [26, 128, 64]
    assert network(torch.rand(3, 26)).shape == (3, 10)
