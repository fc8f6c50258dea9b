"""A toy problem that a model learns, and an attack clones, within a second; killed attacks."""

import torch
from torch import nn

from divqat.attacks import folder
from divqat.data import ImageSet, Splits, to_float

CLASSES = 4


def toy_images(n, seed):
    """Noisy uint8 images of four fixed patterns, and the pattern of each as its label."""
    patterns = torch.randint(
        90, 166, (CLASSES, 1, 8, 8), generator=torch.Generator().manual_seed(0)
    )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    noise = torch.randint(-80, 81, (n, 1, 8, 8), generator=generator)
    return (patterns[labels] + noise).to(torch.uint8), labels


def toy_model(seed=0, classes=CLASSES, dropout=0.0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(8 * 36, classes),
        )


TEST_IMAGES, TEST_LABELS = toy_images(400, seed=2)
QUERIES = toy_images(500, seed=3)[0]


def toy_splits():
    train, validation = (ImageSet(*toy_images(n, seed)) for n, seed in ((200, 4), (100, 5)))
    return Splits("toys", tuple("abcd"), train, validation, ImageSet(TEST_IMAGES, TEST_LABELS))


def toy_victim():
    """A toy model trained on its images, in eval mode."""
    images, labels = toy_images(800, seed=1)
    model = toy_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(to_float(images)), labels).backward()
        optimizer.step()
    return model.eval()


def same_bits(a, b):
    """Whether two modules have the same state."""
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


class Killed(Exception):
    pass


def kill_at(monkeypatch, when):
    """Kill the run before (``when`` = n) or after (n + 0.5) it writes checkpoint n, from 0."""
    save, count = folder.save_checkpoint, [0]

    def save_or_die(path, state):
        if count[0] == when:
            raise Killed
        save(path, state)
        if count[0] + 0.5 == when:
            raise Killed
        count[0] += 1

    monkeypatch.setattr(folder, "save_checkpoint", save_or_die)
