"""The tracer of prepare: what it refuses by name, and constructs that no table of networks has."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from testing import randn
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import divqat
from divqat.nn import FakeQuantize
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


class OwnNorm(Head):
    """BatchNorm of tensors with names of one's own, used twice in two places."""

    def __init__(self):
        super().__init__()
        for which in "ab":
            self.register_parameter(f"gamma_{which}", nn.Parameter(1 + randn(4, seed=1) / 10))
            self.register_parameter(f"beta_{which}", nn.Parameter(randn(4, seed=2)))
            self.register_buffer(f"mean_{which}", torch.zeros(4))
            self.register_buffer(f"var_{which}", torch.ones(4))

    def norm(self, y, which):
        tensors = (getattr(self, f"{name}_{which}") for name in ("mean", "var", "gamma", "beta"))
        return F.batch_norm(y, *tensors, self.training, 0.2)

    def middle(self, y):
        return self.norm(torch.relu(self.norm(y, "a")), "b")


def test_a_batchnorm_of_tensors_with_other_names_keeps_its_keys():
    torch.manual_seed(0)
    x, net = randn(4, 3, 6, 6), OwnNorm()
    model = divqat.prepare(net, "x86", x, strict=True)
    keys = {key for key in model.state_dict() if "fake_quantize" not in key}
    assert {*net.state_dict()} <= keys
    model.load_state_dict(OwnNorm().state_dict(), strict=True)
    model(x)
    assert model.state_dict()["mean_a"].abs().sum() > 0  # it learns its statistics
    traced = graph_of(net, x)
    for mode in (True, False):
        got, wanted = (copy.deepcopy(m).train(mode)(x) for m in (traced, net))
        torch.testing.assert_close(got, wanted)


def test_tensors_of_a_batchnorm_that_are_used_elsewhere_are_refused_by_name():
    class Net(OwnNorm):
        def middle(self, y):
            return self.norm(y, "a") * self.gamma_a[:, None, None]

    with pytest.raises(Untraceable, match="gamma_a belongs to a BatchNorm and is used elsewhere"):
        capture(Net(), randn(2, 3, 6, 6))


def test_forward_pre_hooks_of_a_block_run():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(64, 2))
    net[0].register_forward_pre_hook(lambda module, args: args[0] * 2)
    net[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    net[0].register_forward_pre_hook(lambda module, args: None)
    handle = net[0].register_forward_hook(lambda module, args, y: y - 3)
    x = randn(2, 3, 6, 6)
    traced = graph_of(net, x)
    torch.testing.assert_close(traced(x), net(x))
    changed = traced(x)
    handle.remove()
    assert not torch.equal(traced(x), net(x) - 3) and changed.shape == (2, 2)


class Batch(Head):
    """A result that depends on the number of images of the example."""

    def middle(self, y):
        return y * int(y.shape[0])


class Extra(Head):
    def forward(self, x, **options):
        return super().forward(x) * options["factor"]


class Bare(Head):
    """Its forward fails in training mode."""

    def middle(self, y):
        if self.training:
            raise RuntimeError("for inference")
        return y


class State(Head):
    """Its result depends on the number of calls."""

    calls = 0

    def middle(self, y):
        State.calls += 1
        return y + State.calls


def test_results_that_a_graph_does_not_have_are_refused():
    x = randn(3, 3, 6, 6)
    for net, message in (
        (Batch(), "depends on the number of images"),
        (State(), "other results in eval mode"),
    ):
        with pytest.raises(Untraceable, match=message):
            capture(net, x)
    with pytest.raises(Untraceable, match=r"takes \*\*options"):
        capture(Extra(), {"x": x, "factor": 2.0})
    with pytest.raises(RuntimeError, match="for inference"):
        capture(Bare(), x)


class Scaled(Head):
    def forward(self, x, factor=1.0):
        return super().forward(x) * factor

    def middle(self, y):
        return y


def test_a_constant_argument_that_changes_is_an_error():
    x = randn(2, 3, 6, 6)
    model = divqat.prepare(Scaled(), "x86", (x, 2.0))
    assert model(x, 2.0).shape == (2, 2)
    with pytest.raises(ValueError, match=r"factor: wanted 2\.0, as in the example_input"):
        model(x, 3.0)


class Answers(OrderedDict):
    """A dictionary with a class of its own."""


def test_outputs_in_dictionaries_with_classes():
    class Net(Head):
        def forward(self, x):
            y = self.conv(x)
            return Answers(logits=self.head(y.mean((2, 3))), features=y)

    x, net = randn(2, 3, 6, 6), Net()
    traced = graph_of(net, x)
    got, wanted = traced(x), net(x)
    assert type(got) is Answers and list(got) == ["logits", "features"]
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value)


def test_checkpointing_with_reentry_runs_its_function():
    class Net(Head):
        def middle(self, y):
            return checkpoint(torch.tanh, y, use_reentrant=True)

    x, net = randn(2, 3, 6, 6), Net()
    with pytest.warns(UserWarning, match=r"keep activation checkpointing at \S+test_tracing\.py:"):
        traced = graph_of(net, x)
    torch.testing.assert_close(traced(x), net(x))


def test_regions_that_are_not_kept_are_named():
    class Net(Head):
        def middle(self, y):
            with torch.autocast(device_type=y.device.type, enabled=False):
                y = y.float()
            return checkpoint(torch.tanh, y, use_reentrant=False)

    wanted = r"the autocast region at .+:\d+ .+, activation checkpointing at .+:\d+ "
    with pytest.warns(UserWarning, match=wanted) as caught:
        model = divqat.prepare(Net(), "x86", randn(2, 3, 6, 6))
    assert caught[0].filename == __file__
    model(randn(2, 3, 6, 6)).sum().backward()


@pytest.mark.parametrize("convert", [int, float])
def test_a_number_from_contents_is_refused_with_its_line(convert):
    class Net(Head):
        def middle(self, y):
            return y * convert(y.sum())

    with pytest.raises(Untraceable, match=rf"test_tracing\.py:\d+ .*{convert.__name__}|convert"):
        capture(Net(), randn(2, 3, 6, 6))


@pytest.mark.parametrize("options", [{"kdim": 6, "vdim": 5}, {}], ids=["own widths", "alike"])
@pytest.mark.parametrize("batched", [True, False])
def test_attention_of_other_values(options, batched):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
            self.key = nn.Linear(8, options.get("kdim", 8))
            self.value = nn.Linear(8, options.get("vdim", 8))

        def forward(self, x):
            x = x if batched else x[0]
            mask = torch.full((4, 4), -1.0, device=x.device).triu(1)  # added to the scores
            return self.attention(x, self.key(x), self.value(x), attn_mask=mask)

    torch.manual_seed(0)
    x, net = randn(3, 4, 8), Net()
    for got, wanted in zip(graph_of(net, x)(x), net(x), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("layer", "call", "reason"),
    [
        (nn.Bilinear(6, 6, 4), lambda layer, x: layer(x, x), "a product of two inputs"),
        (
            nn.MultiheadAttention(6, 2, add_bias_kv=True),
            lambda layer, x: layer(x[None], x[None], x[None])[0][0],
            "with bias_k, bias_v or add_zero_attn",
        ),
    ],
)
def test_modules_that_stay_in_float_have_a_reason(layer, call, reason):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(6, 6), layer

        def forward(self, x):
            return call(self.layer, self.first(x))

    with pytest.warns(UserWarning, match=rf"layer \({type(layer).__name__}\): {reason}"):
        divqat.prepare(Net(), "x86", randn(3, 6))


class Noisy(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x):
        return F.linear(x.clone(), self.weight, self.bias)


def test_a_subclass_with_a_forward_of_its_own_becomes_the_layer_unless_it_is_skipped():
    net = nn.Sequential(nn.Linear(6, 6), Noisy(6, 4))
    model = divqat.prepare(net, "x86", randn(3, 6), strict=True)
    assert isinstance(model.get_submodule("1"), divqat.nn.QuantLinear)
    config = divqat.QuantConfig(skip=("1",))
    model = divqat.prepare(net, config, randn(3, 6), strict=True)
    assert [row.layer for row in divqat.summary(model).rows if row.kind == "weight"] == ["0"]


class StochasticDepth(nn.Module):
    """Drops samples in training mode, and returns its input in eval mode."""

    def forward(self, x):
        return x * torch.rand(len(x), 1, 1, 1).round() if self.training else x


class Overwrites(nn.Module):
    """Returns its input in eval mode, too, but with other values in it."""

    def forward(self, x):
        return x if self.training else x.mul_(2)


class Added(Head):
    def __init__(self, drop):
        super().__init__()
        self.drop = drop

    def middle(self, y):
        return self.drop(y) + y


@pytest.mark.parametrize(
    ("drop", "grids"),
    [(nn.Identity(), 4), (nn.Dropout(), 4), (StochasticDepth(), 4), (Overwrites(), 5)],
)
def test_a_module_that_passes_its_input_on_in_eval_mode_adds_no_grid(drop, grids):
    x = randn(4, 3, 8, 8)
    model = divqat.prepare(Added(drop), "x86", x)
    for prepared in (model, pickle.loads(pickle.dumps(model))):
        counted = [m for m in prepared.modules() if isinstance(m, FakeQuantize)]
        assert len(counted) == grids
    model(x)
    converted = divqat.convert(model.eval())
    torch.testing.assert_close(converted(x), model(x))
