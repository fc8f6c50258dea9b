"""Placeholder until the real one lands."""


def calibrated(defense, probs, images, l1):
    raise ValueError("none")


def l1_distance(a, b):
    return (a - b).abs().sum(1).double().mean().item()
