"""Small trained networks for the tests of the runtimes."""

import torch
from torch.nn import functional as F

import divqat
from divqat import models


def floats(images, size=16):
    return F.interpolate(images.float() / 127.5 - 1, size)


def trained(name, config, images, labels, steps=60):
    """A network after some steps of QAT, so that it has margins."""
    torch.manual_seed(0)
    net = models.build(name, in_channels=1, num_classes=10, image_size=16)
    prepared = divqat.prepare(net, config, images[:2])
    optimizer = torch.optim.Adam(prepared.parameters(), 2e-3)
    for _ in range(steps):
        part = torch.randperm(len(images))[:64]
        loss = F.cross_entropy(prepared(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prepared.eval()
