import copy

import pytest
import torch
from torch import nn
from toys import QUERIES, TEST_IMAGES, same_bits, toy_model, toy_victim

from divqat._util.files import load_checkpoint
from divqat.attacks import KnockoffNets
from divqat.attacks.attack import Task
from divqat.attacks.folder import Folder
from divqat.attacks.s4l import S4L
from divqat.data import to_float
from divqat.models import build, names
from divqat.victim import Victim

QUICK = {"epochs": 2, "batch_size": 32}
TARGETS = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0, 0, 1, 0]])


def task(clone, query_set=QUERIES):
    folder = Folder(None, {})
    return Task(Victim(toy_victim()), query_set, clone.eval(), 4, folder, lambda clone, count: None)


def still(seed=1):
    """A clone that treats each image by itself."""
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))


def test_loss_by_hand():
    clone = still()
    loss = S4L(weight=0.5, query_budget=len(QUERIES))._loss(task(clone))
    images = to_float(QUERIES[:2])
    label_loss = -(TARGETS * clone(images).log_softmax(1)).sum(1).mean()
    turns = []
    for image in images:
        for turn in range(4):
            features = clone[:3](torch.rot90(image, turn, (1, 2))[None])
            turns.append(-(features @ loss.head.weight.T + loss.head.bias)[0].log_softmax(0)[turn])
    wanted = label_loss + 0.5 * torch.stack(turns).mean()
    torch.testing.assert_close(loss(clone, images, TARGETS, 0.0), wanted)


def test_images_never_asked_are_turned_too():
    settings, seen = S4L(query_budget=490), []
    clone = still()
    clone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    loss = settings._loss(task(clone))
    assert len(loss.unlabeled.images) == 10
    seen.clear()
    loss(clone, to_float(QUERIES[:2]), TARGETS, 0.0)
    assert len(seen[0]) == 4 * (2 + 2)
    chosen = settings._draw(task(clone), torch.Generator().manual_seed(0))
    asked = {QUERIES[row].numpy().tobytes() for row in chosen}
    unlabeled = {to_float(image).numpy().tobytes() for image in loss.unlabeled.images.images}
    assert not asked & {image.numpy().tobytes() for image in loss.unlabeled.images.images}
    assert all(image.numpy().tobytes() in unlabeled for image in seen[0][2:4])
    assert all(torch.equal(seen[0][4 + i], seen[0][i].rot90(1, (1, 2))) for i in range(4))


def test_without_unlabeled_images_only_asked_ones_are_turned():
    for settings in (S4L(query_budget=100, unlabeled=False), S4L()):
        assert not len(settings._loss(task(still())).unlabeled.images)


def test_weight_zero_without_batch_norm_is_knockoff_nets():
    a = S4L(weight=0.0, **QUICK)(Victim(toy_victim()), QUERIES, clone := still())
    b = KnockoffNets(**QUICK)(Victim(toy_victim()), QUERIES, clone)
    for x, y in zip(a.clone.parameters(), b.clone.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_head_learns_to_tell_turns_apart(tmp_path):
    settings = S4L(epochs=8, batch_size=32, query_budget=200)
    victim = Victim(toy_victim())
    clone = settings(victim, QUERIES, toy_model(seed=1), resume_dir=tmp_path).clone
    kept = load_checkpoint(tmp_path / "clone.pt")["modules"]
    right = []
    for turn in range(4):
        features = clone[:5](to_float(TEST_IMAGES.rot90(turn, (2, 3))))
        told = features @ kept["1.head.weight"].T + kept["1.head.bias"]
        right.append((told.argmax(1) == turn).float().mean())
    assert sum(right) / 4 > 0.6, right  # chance: 1/4


@pytest.mark.parametrize("name", names())
def test_features_of_every_network_of_the_package(name):
    clone = build(name, in_channels=1, num_classes=4, image_size=8)
    loss = S4L(query_budget=100)._loss(task(clone))
    last = [layer for layer in clone.modules() if isinstance(layer, nn.Linear)][-1]
    assert loss.head.in_features == last.in_features


def test_convolutional_classifier():
    pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    clone = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1), pool)
    loss = S4L()._loss(task(clone))
    assert loss.head.in_features == 5
    assert loss(clone, to_float(QUERIES[:2]), TARGETS, 0.0).isfinite()


def test_head_is_seeded_and_trains():
    a, b = (S4L(**QUICK)(Victim(toy_victim()), QUERIES, toy_model(seed=1)).clone for _ in range(2))
    assert same_bits(a, b)
    settings, clone = S4L(epochs=1), toy_model(seed=1)
    loss = settings._loss(task(clone))
    before = copy.deepcopy(loss)
    loss(clone.train(), to_float(QUERIES[:2]), TARGETS, 0.0).backward()
    assert loss.head.weight.grad.abs().sum() > 0 and same_bits(loss, before)


def test_what_does_not_fit_is_an_error_before_any_query():
    victim = Victim(toy_victim())
    with pytest.raises(ValueError, match="query_set: wanted square images to rotate, got 8x7"):
        S4L()(victim, QUERIES[..., :7], nn.Sequential(nn.Flatten(), nn.Linear(56, 4)))
    tail = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Unflatten(1, (4, 2)), nn.MaxPool1d(2))
    with pytest.raises(ValueError, match=r"linear or convolutional layer that gives the 4 logits"):
        S4L()(victim, QUERIES, tail.append(nn.Flatten()))
    with pytest.raises(ValueError, match="got none"):
        S4L()(victim, QUERIES, Fixed())
    assert victim.queries == 0


class Fixed(nn.Module):
    """Without a layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, images):
        return images.flatten(1)[:, :4] * self.scale
