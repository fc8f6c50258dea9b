"""Answers to foreign images that have nothing to do with the task."""

import pytest
import torch
from torch.nn import functional as F

from divqat.data.batches import to_float
from divqat.nn.decoy import Decoy, Sample


def test_a_decoy_tells_where_a_picture_is_light_and_each_class_as_often():
    images, own = random_images(4000, seed=0), random_images(50, seed=1)
    decoy = Decoy(5, 3, seed=1)
    decoy.fit(Sample(part, own, torch.arange(50) % 5) for part in images.split(1000))
    probs = decoy(images)
    found = probs.argmax(1)
    # z has covariance 1, so W z has W W^T, whatever the signs in z
    logits = (coarse_by_hand(images) - coarse_by_hand(images).mean(0)) @ decoy.directions.double()
    rows = decoy.rows.double()
    torch.testing.assert_close(logits.T.cov(), rows @ rows.T, rtol=0, atol=1e-3)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5).double())
    assert (logits.argmax(1) == found).double().mean() > 0.999
    torch.testing.assert_close(probs, (4 * logits).softmax(1).float(), rtol=0, atol=1e-4)
    assert found.bincount(minlength=5).min() > 400
    darker = to_float(((images + 1) * 50).to(torch.uint8))  # of 100 shades, without bright ones
    assert (decoy(darker).argmax(1) == found).double().mean() > 0.9
    other = Decoy(5, 3, seed=2)
    other.fit([Sample(images, own, torch.arange(50) % 5)])
    assert (other(images).argmax(1) == found).double().mean() < 0.5


# 40 classes leave no direction of 64 that no two of them differ in: half of them are left out
@pytest.mark.parametrize(("classes", "channels", "left"), [(7, 3, 1e-8), (40, 1, 0.3)])
def test_a_decoy_does_not_tell_the_means_of_the_classes(classes, channels, left):
    labels = torch.arange(2000) % classes
    lit = 3 * random_images(classes, seed=0)[:, :channels][labels]  # each class has its own lights
    images = (lit + random_images(2000, seed=1)[:, :channels]) / 4
    proxies = random_images(2000, seed=2)[:, :channels]

    def told(known):
        """The share of the variance of W z that is between the classes, where ``known`` are."""
        decoy = Decoy(classes, channels, seed=1)
        decoy.fit(Sample(proxies[i::2], images[i::2], known[i::2]) for i in range(2))
        logits = coarse_by_hand(images) @ decoy.directions.double()
        means = torch.stack([logits[labels == label].mean(0) for label in range(classes)])
        return means.var(0).mean() / logits.var(0).mean()

    assert told(labels) < left
    assert told(torch.zeros_like(labels)) > 0.6


def random_images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return to_float(torch.randint(256, (count, 3, 9, 12), generator=generator).to(torch.uint8))


def coarse_by_hand(images):
    coarse = F.adaptive_avg_pool2d(images.double(), 8).flatten(1)
    coarse = coarse - coarse.mean(1, keepdim=True)
    return coarse / coarse.norm(dim=1, keepdim=True)
