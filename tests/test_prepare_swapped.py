"""prepare's fallback: layers are swapped where a model cannot be traced."""

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from networks import Net, build, conv, images, quantized, settle
from torch import nn
from torch.nn import functional as F

import divqat
from divqat.nn import QuantConvBn2d
from divqat.nn._layer import QuantLayer


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = conv(3, 8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        y = self.bn(self.conv(x))
        if y.mean() > -100:  # no tracer can follow this
            y = y.relu()
        return self.head(y.mean((2, 3)))


def test_untraceable_model_is_swapped_with_a_warning():
    torch.manual_seed(0)
    model = DataDependent()
    with pytest.warns(
        UserWarning,
        match=r"DataDependent was not traced \(Untraceable: .+:26 .+contents of a tensor",
    ):
        prepared = divqat.prepare(model, "x86", images())
    assert type(prepared) is DataDependent
    assert set(quantized(prepared)) == {"conv", "head"}
    assert isinstance(prepared.conv, QuantConvBn2d)
    assert {*model.state_dict()} <= {*prepared.state_dict()}
    state = settle(copy.deepcopy(model)).state_dict()
    prepared.load_state_dict(state, strict=True)

    read = {}
    settle(prepared, 1)
    for name, layer in quantized(prepared).items():
        layer.input_fake_quantize.register_forward_hook(
            lambda _m, _a, y, name=name: read.update({name: len(y.unique())})
        )
    before = [p.detach().clone() for p in prepared.parameters()]
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    F.cross_entropy(prepared(images(32)), torch.arange(32) % 5).backward()
    optimizer.step()
    assert set(read) == {"conv", "head"} and max(read.values()) <= 256
    weights = [
        (p, old) for p, old in zip(prepared.parameters(), before, strict=True) if p.dim() > 1
    ]
    assert len(weights) == 2 and all(not torch.equal(p, old) for p, old in weights)

    x = images(64, seed=9)
    converted = divqat.convert(prepared)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), prepared.eval()(x), rtol=0, atol=5e-3)


@pytest.mark.filterwarnings("ignore:.+ was not traced:UserWarning")
def test_a_swapped_layer_with_two_names_is_swapped_under_both():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(8, 8)

        def forward(self, x):
            return self.b(self.a(x))

    model = nn.Module()
    model.first = model.second = Block()
    model.head = nn.Linear(8, 2)
    prepared = divqat.prepare(model)
    layer = prepared.first.a
    assert isinstance(layer, QuantLayer) and isinstance(prepared.head, QuantLayer)
    assert prepared.first is prepared.second and prepared.first.b is layer
    prepared.load_state_dict(model.state_dict(), strict=True)


class Subclass(nn.Conv2d):
    pass


@pytest.mark.filterwarnings("ignore:.+ was not traced:UserWarning")
@pytest.mark.parametrize("traced", [True, False])
def test_weighted_layers_that_stay_in_float_are_named(traced):
    net = Net(
        lambda net, x: net.head(net.other(net.subclass(x).flatten(2).mT)[0].mean(1)),
        subclass=Subclass(3, 4, 3), other=nn.GRU(4, 4, batch_first=True), head=nn.Linear(4, 2),
    )  # fmt: skip
    with pytest.warns(UserWarning) as caught:
        prepared = divqat.prepare(net, "x86", images() if traced else None)
    told = "\n".join(str(warning.message) for warning in caught)
    assert "other (GRU): runtimes have no integer kernel for it" in told
    assert set(quantized(prepared)) == {"subclass", "head"} and "head" not in told
    wanted = r"all layers in int8, got\nother \(GRU\)" if traced else "a model that can be traced"
    with pytest.raises(ValueError, match=f"strict: wanted {wanted}"):
        divqat.prepare(net, "x86", images() if traced else None, strict=True)

    skipped = replace(divqat.preset("x86"), skip=("other",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".+ was not traced")
        divqat.prepare(net, skipped)


def test_without_an_example_the_warning_says_so():
    with pytest.warns(UserWarning, match="no example_input was given"):
        divqat.prepare(build("residual"))


def test_a_wrong_example_is_an_error_and_not_a_reason_to_swap(capfd):
    model = build("residual")
    with pytest.raises(ValueError, match=r"example_input: wanted a batch .+ RuntimeError: .+ 3 ch"):
        divqat.prepare(model, "x86", torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="example_input: wanted a batch"):
        divqat.prepare(model, "x86", images().int())
    with pytest.warns(UserWarning, match="DataDependent was not traced"):
        divqat.prepare(DataDependent(), "x86", images())
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(TypeError, match=r"model: wanted an nn\.Module, got str"):
        divqat.prepare("model.pt", "x86", images())


class Branches(DataDependent):
    """Its forward follows the mean: the usual way, without BatchNorm, or with it twice."""

    def forward(self, x):
        y = self.conv(x)
        if x.mean() < 100:
            y = self.bn(y)
        if x.mean() < -100:
            y = self.bn(y)
        return self.head(y.mean((2, 3)))


class Shortcut(DataDependent):
    def forward(self, x):
        y = self.conv(x)
        y = self.bn(y) + (y if y.mean() > -100 else 0)
        return self.head(y.mean((2, 3)))


class Rewritten(DataDependent):
    def forward(self, x):
        y = self.conv(x)
        if x.mean() > 100:
            y.mul_(2)
        return self.head(self.bn(y).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:.+ was not traced:UserWarning")
def test_a_folded_batchnorm_trains_as_one_beside_the_convolution():
    torch.manual_seed(0)
    model, x = DataDependent(), images()
    model.conv.weight.data /= model.conv.weight.abs().amax((1, 2, 3), keepdim=True)
    prepared = divqat.prepare(model, "x86", x)
    plain = copy.deepcopy(prepared)
    for layer in quantized(plain).values():
        layer.weight_quant_enabled = False
        layer.input_fake_quantize.fake_quant_enabled = False
    wanted = model.train()
    for mode in (True, False):
        torch.testing.assert_close(
            plain.train(mode)(x), wanted.train(mode)(x), rtol=1e-4, atol=1e-4
        )
    for key, value in wanted.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[key], value)
    for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(other.eval()(x), copy.deepcopy(prepared).eval()(x))


@pytest.mark.filterwarnings("ignore:.+ was not traced:UserWarning")
@pytest.mark.parametrize(
    ("kind", "shift", "message"),
    [
        (Branches, 200, "conv was called without bn, which is folded into conv"),
        (Branches, -200, "bn was called with another input"),
        (Rewritten, 200, "bn was called with another input"),
    ],
)
def test_a_call_in_another_order_is_an_error(kind, shift, message):
    prepared = divqat.prepare(kind(), "x86", images())
    assert prepared(images()).shape == (len(images()), 5)
    for model in (prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        with pytest.raises(RuntimeError, match=f"{message}.*name conv in skip"):
            model(images() + shift)
        model(images())
    skipping = divqat.prepare(kind(), divqat.QuantConfig(skip=("conv",)), images())
    assert skipping(images() + shift).isfinite().all()


@pytest.mark.filterwarnings("ignore:.+ was not traced:UserWarning")
def test_a_convolution_that_something_else_reads_is_not_folded():
    model, x = Shortcut(), images()
    prepared = divqat.prepare(model, "x86", x)
    assert type(prepared.bn) is nn.BatchNorm2d and {*model.state_dict()} <= {*prepared.state_dict()}
    prepared(x)
    signal = model.eval()(x)
    assert (prepared.eval()(x) - signal).square().mean() < 0.05 * signal.var()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.+ was not traced:UserWarning")
def test_calls_are_also_checked_in_a_compiled_model():
    torch.manual_seed(0)
    prepared = divqat.prepare(Branches(), "x86", images())
    prepared(images())
    compiled, other = torch.compile(prepared, backend="aot_eager"), copy.deepcopy(prepared)
    for mode in (True, False):
        got, wanted = (model.train(mode)(images(seed=3)) for model in (compiled, other))
        torch.testing.assert_close(got, wanted)
    with pytest.raises(RuntimeError, match="conv was called without bn"):
        compiled(images() + 200)


def test_freezing_names_a_batchnorm_of_ones_own_that_goes_on():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = DataDependent()
    model.bn = Scaled(8)
    with pytest.warns(UserWarning):
        prepared = divqat.prepare(model, "x86", images())
    with pytest.warns(UserWarning, match=r"does not freeze: bn \(Scaled\)"):
        divqat.freeze_batchnorm(prepared)
