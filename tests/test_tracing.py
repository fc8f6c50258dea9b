"""The tracer of prepare: what it refuses by name, and constructs that no table of networks has."""

import copy

import pytest
import torch
from testing import randn
from torch import nn
from torch.nn import functional as F

import divqat
from divqat.quantize.tracing import Untraceable, capture, split


def graph_of(net, x):
    """A traced copy of a network."""
    traced, _ = capture(copy.deepcopy(net), x)
    split(traced)
    return traced


class Doubled(torch.autograd.Function):
    """Twice its input, with a gradient of its own."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.middle(self.conv(x)).mean((2, 3)))


class Applies(Head):
    def middle(self, y):
        return Doubled.apply(y)


class Assigns(Head):
    def middle(self, y):
        self.last = y
        return y


class Unregistered(Head):
    def middle(self, y):
        return nn.ReLU()(y)


def test_an_autograd_function_keeps_its_gradient():
    torch.manual_seed(0)
    x = randn(2, 3, 6, 6)
    traced, _ = capture(Applies(), x)
    y = randn(2, 4, 4, 4).requires_grad_()
    traced.get_submodule("functions.Doubled")(y).sum().backward()
    assert torch.equal(y.grad, torch.full_like(y, 3.0))
    prepared = divqat.prepare(Applies(), "x86", x)
    prepared(x).sum().backward()
    assert prepared.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Assigns, "assigns the attribute 'last'"), (Unregistered, r"test_tracing\.py:\d+ .*ReLU")],
)
def test_what_a_graph_cannot_do_is_refused_by_name(kind, message):
    with pytest.raises(Untraceable, match=message):
        capture(kind(), randn(2, 3, 6, 6))
    with pytest.raises(ValueError, match=f"strict: .*{message}"):
        divqat.prepare(kind(), "x86", randn(2, 3, 6, 6), strict=True)


def test_hooks_with_keyword_arguments_are_refused_by_name():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(64, 2))
    net[0].register_forward_hook(lambda module, args, kwargs, y: y, with_kwargs=True)
    with pytest.raises(Untraceable, match="0 \\(Sequential\\) has hooks"):
        capture(net, randn(2, 3, 6, 6))


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "causal", "padding", "both"])
def test_attention_is_that_of_torch(masks, batch_first, weights):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x):
            length, n = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
            causal = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            padding = torch.zeros(n, length, dtype=torch.bool, device=x.device)
            padding[:, -1] = True
            given = {
                "attn_mask": causal if masks in ("causal", "both") else None,
                "key_padding_mask": padding if masks in ("padding", "both") else None,
            }
            return self.attention(x, x, x, need_weights=weights, **given)

    torch.manual_seed(0)
    x = randn(4, 4, 8)
    net = Net()
    traced = graph_of(net, x)
    for got, wanted in zip(traced.eval()(x), net.eval()(x), strict=True):
        if wanted is not None:
            torch.testing.assert_close(got, wanted)


def test_numbers_that_depend_on_the_mode():
    class Net(Head):
        def middle(self, y):
            return F.leaky_relu(y, 0.5 if self.training else 0.1)

    torch.manual_seed(0)
    x, net = randn(2, 3, 6, 6), Net()
    traced = graph_of(net, x)
    for mode in (True, False):
        assert torch.equal(traced.train(mode)(x), net.train(mode)(x))
