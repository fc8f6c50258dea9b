"""What a prepared network has to be able to do besides its answers."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import divqat
from bench import architectures
from bench.command import first_line
from bench.network_training import expect_finite, gradients_of, training_checks


def checks(model: nn.Module, prepared: nn.Module, images: Tensor, training: bool) -> dict[str, str]:
    """Name → ``passed``, or the first line of what went wrong.

    Args:
        model: the float network, in eval mode.
        prepared: calibrated, in eval mode; neither changes.
        images: [N, 3, H, W], N of at least 2.
        training: also what :mod:`bench.network_training` checks, which takes minutes.
    """
    with torch.no_grad():
        wanted = architectures.tensor_of(prepared(images))

    def loads() -> None:
        copy.deepcopy(prepared).load_state_dict(model.state_dict(), strict=True)

    def copies() -> None:
        _expect_same(copy.deepcopy(prepared), images, wanted)

    def pickles() -> None:
        _expect_same(pickle.loads(pickle.dumps(prepared)), images, wanted)

    def modes() -> None:
        for training in (True, False):
            other = copy.deepcopy(model).train(training)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                other = divqat.prepare(other, "x86", images)
            other.load_state_dict(prepared.state_dict(), strict=True)
            _expect_same(other.eval(), images, wanted)

    def trains() -> None:
        expect_finite(gradients_of(copy.deepcopy(prepared).train(), images))

    def compiled() -> None:
        torch._dynamo.reset()
        network = copy.deepcopy(prepared).train()
        call = torch.compile(network, fullgraph=True, backend="aot_eager")
        expect_finite(gradients_of(network, images, call))

    todo: dict[str, Callable[[], None]] = {
        "float checkpoint": loads,
        "deepcopy": copies,
        "pickle": pickles,
        "prepared in train and eval mode": modes,
        "backward": trains,
        "compiled": compiled,
    }
    if training:
        todo |= training_checks(prepared, images)
    return {name: _outcome(check) for name, check in todo.items()}


def _outcome(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as error:  # whatever it raises is the result
        return first_line(error)[:200]
    return "passed"


def _expect_same(network: nn.Module, images: Tensor, wanted: Tensor) -> None:
    with torch.no_grad():
        got = architectures.tensor_of(network(images))
    if not torch.equal(got, wanted):
        raise ValueError(f"other outputs, by up to {float((got - wanted).abs().max()):.3g}")
