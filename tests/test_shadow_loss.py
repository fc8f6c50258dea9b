"""What a shadow victim learns beyond the labels: the loss, its proxies and its decoy."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import same_bits, toy_images

from divqat.attacks.shadow import fit_decoy, misdirection_loss
from divqat.data import ImageSet, to_float
from divqat.data.batches import to_uint8
from divqat.data.proxies import PROXIES, proxy_batch
from divqat.nn.decoy import Decoy, coarse_picture

pytestmark = pytest.mark.usefixtures("one_thread")

OWNED = ImageSet(*toy_images(60, seed=6))


class Dark(nn.Module):
    """A decoy for the tests: 3/4 for class 1 where the mean is above 0, else for class 0."""

    def forward(self, images):
        light = (images.mean((1, 2, 3)) > 0).float()
        return torch.stack([0.75 - 0.5 * light, 0.25 + 0.5 * light, 0 * light], 1)


class Seen(nn.Module):
    """Logits of the mean shade, and what came in."""

    def forward(self, images):
        self.images = images
        shade = images.mean((1, 2, 3))
        return torch.stack([shade, 2 * shade + 0.5, torch.zeros_like(shade)], 1)


@pytest.mark.parametrize(("share", "count"), [(0.5, 3), (2.0, 12), (0.01, 1)])
def test_the_loss_of_a_shadow_by_hand(share, count):
    images, labels = OWNED.images[:6], torch.tensor([0, 1, 2, 0, 1, 2])
    network, targets = Seen(), F.one_hot(labels, 3).float()
    torch.manual_seed(3)
    found = misdirection_loss(Dark(), 0.7, share)(network, to_float(images), targets, 0.5)
    assert torch.equal(network.images[:6], to_float(images)) and len(network.images) == 6 + count

    def cross_entropy(image, label):
        shade = image.double().mean()
        logits = torch.stack([shade, 2 * shade + 0.5, 0 * shade])
        return (logits.exp().sum().log() - logits[label]).item()

    own = [cross_entropy(*pair) for pair in zip(network.images[:6], labels, strict=True)]
    proxies = network.images[6:]
    astray = [
        0.75 * cross_entropy(image, int(image.double().mean() > 0))
        + 0.25 * cross_entropy(image, int(image.double().mean() <= 0))
        for image in proxies
    ]
    wanted = sum(own) / 6 + 0.7 * sum(astray) / count
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_the_proxies_are_those_of_the_batch_and_follow_from_the_global_seed():
    images, targets = to_float(OWNED.images[:7]), F.one_hot(OWNED.labels[:7], 4).float()
    network, loss = Seen(), misdirection_loss(Dark(), 0.2, 1.0)
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        loss(network, images, targets[:, :3], 0.0)
        seen.append(network.images[7:])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    wanted = proxy_batch(PROXIES, OWNED.images[:7], generator, 7)
    assert torch.equal(to_uint8(seen[0]), wanted)


def test_a_decoy_is_fitted_to_proxies_of_the_labeled_images_and_has_its_own_seed():
    images = to_float(proxy_batch(PROXIES, OWNED.images, torch.Generator().manual_seed(9), 4000))
    decoy, other = fit_decoy(OWNED, 4, 1), fit_decoy(OWNED, 4, 2)
    assert same_bits(decoy, fit_decoy(OWNED, 4, 1))
    assert torch.equal(decoy.rows, Decoy(4, 1, 1).rows)
    logits = (coarse_picture(images) - decoy.mean).double() @ decoy.directions.double()
    # z has mean 0 and covariance 1 over proxies, so that W z has W W^T
    rows = decoy.rows.double()
    torch.testing.assert_close(logits.T.cov(), rows @ rows.T, rtol=0, atol=0.15)
    torch.testing.assert_close(logits.mean(0), torch.zeros(4).double(), rtol=0, atol=0.1)
    assert (decoy(images).argmax(1) == other(images).argmax(1)).double().mean() < 0.6
