import math

import pytest
import torch
from torch import nn
from toys import QUERIES, TEST_IMAGES, TEST_LABELS, toy_model, toy_victim

from divqat.attacks import KnockoffNets
from divqat.attacks.attack import Task
from divqat.attacks.folder import Folder
from divqat.attacks.skeptical import SkepticalStudent
from divqat.data import to_float
from divqat.metrics import accuracy, predict
from divqat.models import build, names
from divqat.victim import Victim

TARGETS = torch.tensor([[0.81, 0.16, 0.02, 0.01], [0.0, 0.0, 1.0, 0.0]])
SECTIONS = {
    "lenet": ("features.0", "features.2", [6, 16, 16]),
    "vgg_small": ("features.0", "features.3", [24, 48, 96]),
    "resnet20": ("blocks.2", "blocks.5", [16, 32, 64]),
    "mobilenetv2_small": ("blocks.0", "blocks.2", [16, 24, 64]),
}


def network(name="lenet", seed=1):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return build(name, in_channels=1, num_classes=4, image_size=8)


def task(clone):
    folder = Folder(None, {})
    return Task(Victim(toy_victim()), QUERIES, clone.eval(), 4, folder, lambda clone, count: None)


def by_hand(logits, a, b, alpha, beta, t):
    """The loss of one image, number by number."""

    def softmax(row, t=1.0):
        parts = [math.exp(x / t) for x in row]
        return [x / sum(parts) for x in parts]

    def kl(p, q):
        return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)

    total = 0.0
    for row, f, one, two in zip(TARGETS.tolist(), logits, a, b, strict=True):
        label = row.index(max(row))
        soft = [x ** (1 / t) for x in row]
        soft = [x / sum(soft) for x in soft]
        total -= math.log(softmax(f)[label])
        total += alpha * t * t * kl(soft, softmax(one, t))
        total -= (1 - alpha) * math.log(softmax(one)[label])
        total += beta * kl(softmax(f, t), softmax(two, t))
        total -= (1 - beta) * math.log(softmax(two)[label])
    return total / len(TARGETS)


@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_loss_by_hand(delay):
    clone, images = network(), to_float(QUERIES[:2])
    settings = SkepticalStudent(alpha=0.7, beta=0.2, temperature=2.0, delay=delay)
    loss = settings._loss(task(clone)).eval()
    with torch.no_grad():
        first = clone.features[0](images)
        last = clone.features[2](clone.features[1](first))
        rows = [x.tolist() for x in (clone(images), loss.shallow(first), loss.deep(last))]
        value = float(loss(clone, images, TARGETS, 0.6))
        early = float(loss(clone, images, TARGETS, 0.4))
        label_only = float(nn.functional.cross_entropy(clone(images), TARGETS.argmax(1)))
    assert value == pytest.approx(by_hand(*rows, 0.7, 0.2, 2.0), rel=1e-5)
    assert early == pytest.approx(value if delay == 0 else label_only, rel=1e-5)


def test_probabilities_reach_only_the_first_section():
    """The same labels with other probabilities: only what is up to the first section can tell."""
    clone, images = network(), to_float(QUERIES[:2])
    loss = SkepticalStudent(delay=0.0)._loss(task(clone)).eval()
    found = []
    for targets in (TARGETS, torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.1, 0.1, 0.7, 0.1]])):
        clone.zero_grad()
        loss(clone, images, targets, 0.0).backward()
        found.append({name: p.grad.clone() for name, p in clone.named_parameters()})
    for name, gradient in found[0].items():
        same = torch.allclose(gradient, found[1][name], atol=1e-7)
        assert same != name.startswith("features.0."), name


def test_own_answer_is_a_teacher_not_a_student():
    """No gradient of KL(f || b) goes to the clone's classifier."""
    clone, images = network(), to_float(QUERIES[:2])
    gradients = []
    for beta in (0.0, 1.0):
        clone.zero_grad()
        torch.manual_seed(0)
        loss = SkepticalStudent(delay=0.0, beta=beta)._loss(task(clone)).eval()
        loss(clone, images, TARGETS, 0.0).backward()
        gradients.append(clone.classifier[-1].weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", names())
def test_sections_of_every_network_of_the_package(name):
    clone = network(name)
    loss = SkepticalStudent(delay=0.0)._loss(task(clone))
    first, last, widths = SECTIONS[name]
    assert (loss.first, loss.last) == (first, last)
    assert loss.shallow[-1].in_features == loss.deep[-1].in_features == widths[-1]
    assert loss.shallow[0][0].in_channels == widths[0]
    assert loss.deep[0][0].in_channels == widths[1]
    assert loss(clone.train(), to_float(QUERIES[:4]), TARGETS.repeat(2, 1), 0.5).isfinite()


def test_two_sections_are_enough():
    clone = nn.Sequential()
    clone.features = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 5, 3, stride=2))
    clone.flatten, clone.linear = nn.Flatten(), nn.Linear(45, 4)
    loss = SkepticalStudent()._loss(task(clone))
    assert loss.first == loss.last == "features.0"


@pytest.mark.parametrize("clone", [toy_model(), nn.Sequential(nn.Flatten(), nn.Linear(64, 4))])
def test_other_networks_are_an_error_before_any_query(clone):
    victim = Victim(toy_victim())
    with pytest.raises(ValueError, match=r"features or blocks with at least 2 .* got 0 in Seq"):
        SkepticalStudent()(victim, QUERIES, clone)
    assert victim.queries == 0


@pytest.mark.slow
def test_misleading_probabilities_mislead_it_less():
    """A teacher in the manner of Nasty: the label stays, the other probabilities say nonsense."""

    def nasty(probs, images):
        label = probs.argmax(1)
        wrong = (label + 1 + (images.flatten(1).sum(1) > 0)) % 4
        one_hot = torch.eye(4)
        return 0.505 * one_hot[label] + 0.495 * one_hot[wrong]

    scores = []
    for attack in (SkepticalStudent, KnockoffNets):
        clone = attack(epochs=8, batch_size=16, query_budget=300)(
            Victim(toy_victim(), defense=nasty), QUERIES, network()
        ).clone
        scores.append(accuracy(predict(clone, TEST_IMAGES), TEST_LABELS))
    assert scores[0] > scores[1]
