"""prepare's configuration, its errors, and forwards that once broke it."""

from dataclasses import replace

import pytest
import torch
from networks import SIZE, Net, build, conv, images, quantized, settle
from torch import nn
from torch.nn import functional as F

import divqat
from divqat.nn import FakeQuantize, LearnedStepFakeQuantize, QuantConvBn2d
from divqat.nn._layer import QuantLayer


def activations(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantize)}


@pytest.mark.parametrize(
    ("name", "grid", "zero_points", "per_channel", "largest"),
    [
        ("x86", (0, 255), set(range(256)), True, 63),
        ("tensorrt", (-128, 127), {0}, True, 127),
        ("qnnpack", (0, 255), set(range(256)), False, 63),
    ],
)
def test_presets(name, grid, zero_points, per_channel, largest):
    prepared = settle(divqat.prepare(build("concat_hardswish"), name, images()), 2)
    seen = activations(prepared).values()
    assert len(seen) >= 6
    for module in seen:
        assert (module.spec.quant_min, module.spec.quant_max) == grid
        assert int(module.zero_point) in zero_points
    for layer in quantized(prepared).values():
        assert layer.weight_qparams().shape == ((len(layer.weight),) if per_channel else ())
        codes = layer.quantize_weight(layer.weight) / (
            layer.weight.abs().amax((*range(1, layer.weight.dim()),), keepdim=True) / largest
            if per_channel
            else layer.weight.abs().max() / largest
        )
        assert (codes - codes.round()).abs().max() < 1e-3
        assert codes.abs().max().round() == largest


@pytest.mark.parametrize("bits", range(2, 9))
def test_widths_with_a_wide_first_and_last_layer(bits):
    edge = max(7, bits)  # seven is asked for because of the hardware
    config = divqat.preset("x86", weight_bits=bits, activation_bits=bits)
    prepared = divqat.prepare(build("concat_hardswish"), config, images())
    prepared(images())
    widths = {name: layer.weight_spec.bits for name, layer in quantized(prepared).items()}
    assert widths == {"conv1": edge, "left": bits, "right": bits, "conv2": bits, "head": edge}
    kinds = [module.spec.bits for module in activations(prepared).values()]
    of_input = 8 if bits < 7 else bits
    assert sorted(kinds) == sorted([of_input] + [bits] * (len(kinds) - 1))
    levels = prepared.left.quantize_weight(prepared.left.weight).flatten(1)
    assert max(len(row.unique()) for row in levels) <= 2**bits - 1

    as_the_rest = replace(config, first_last_bits=None, input_bits=None)
    narrow = divqat.prepare(build("concat_hardswish"), as_the_rest, images())
    assert {layer.weight_spec.bits for layer in quantized(narrow).values()} == {bits}
    assert {module.spec.bits for module in activations(narrow).values()} == {bits}


def test_first_and_last_are_those_that_are_called_so():
    net = Net(
        lambda net, x: net.ends[1](net.middle(net.ends[0](x))),
        ends=nn.ModuleList([conv(3, 8), conv(8, 2)]), middle=conv(8, 8),
    )  # fmt: skip
    prepared = divqat.prepare(net, divqat.preset("x86", weight_bits=4), images())
    widths = {name: layer.weight_spec.bits for name, layer in quantized(prepared).items()}
    assert widths == {"ends.0": 7, "middle": 4, "ends.1": 7}


def test_skip_leaves_modules_in_float():
    config = replace(divqat.preset("x86"), skip=("blocks.0", "stem.0", "classifier"))
    prepared = divqat.prepare(build("resnet20"), config, images())
    floats = [n for n, m in prepared.named_modules() if type(m) in (nn.Conv2d, nn.Linear)]
    assert floats == ["stem.0", "blocks.0.conv1.0", "blocks.0.conv2.0", "classifier.2"]
    assert len(quantized(prepared)) == 22 - 4  # resnet20 with two 1x1 shortcuts
    assert type(prepared.get_submodule("stem.1")) is nn.BatchNorm2d
    prepared.load_state_dict(build("resnet20").state_dict(), strict=True)


def test_skip_quantizes_nothing_that_only_a_skipped_operation_reads():
    class Residual(nn.Module):
        def forward(self, x):
            return torch.sigmoid(x) + x

    def activations_with(*skip):
        net = Net(
            lambda net, x: net.head(net.pool(net.block(net.conv(x))).flatten(1)),
            conv=conv(3, 8), block=Residual(), pool=nn.AdaptiveAvgPool2d(1), head=nn.Linear(8, 5),
        )  # fmt: skip
        config = replace(divqat.preset("x86"), skip=skip)
        prepared = divqat.prepare(net, config, images())
        return {name.removeprefix("fake_quantize.") for name in activations(prepared)}

    assert activations_with() == {"x", "conv", "sigmoid", "add", "pool"}
    assert activations_with("block") == {"x", "conv", "add", "pool"}  # of a convolution always
    assert activations_with("pool") == {"x", "conv", "sigmoid", "pool"}
    assert activations_with("block", "pool", "head") == {"x", "conv"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: divqat.prepare(divqat.prepare(build("residual"), "x86", images())),
            "already prepared",
        ),
        (lambda: divqat.prepare(nn.Sequential(nn.ReLU()), "x86", images()), "got none"),
        (lambda: divqat.prepare(nn.Conv2d(3, 4, 3), "x86", images()), "got a single Conv2d"),
        (lambda: divqat.prepare(build("residual"), "arm", images()), "x86, tensorrt.* got 'arm'"),
        (
            lambda: divqat.prepare(
                build("residual"), replace(divqat.preset("x86"), skip=("conv",)), images()
            ),
            "skip: wanted names of modules, got 'conv'",
        ),
        (lambda: divqat.preset("x86", weight_bits=9), "bits: wanted 2 to 8, got 9"),
        (lambda: divqat.convert(build("residual")), "got no quantized layer"),
        (lambda: divqat.summary(build("residual")), "got no quantized layer"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_modes():
    config = replace(divqat.preset("x86"), mode="delayed")
    prepared = divqat.prepare(build("residual"), config, images())
    assert {module.mode for module in activations(prepared).values()} == {"delayed"}
    first = prepared(images())
    assert torch.equal(first, divqat.prepare(build("residual"), "x86", images())(images()))


def test_learned_scales():
    base = divqat.preset("x86", weight_bits=4, activation_bits=4)
    config = replace(
        base,
        weight=replace(base.weight, learned=True),
        activation=replace(base.activation, learned=True),
    )
    prepared = divqat.prepare(build("residual"), config, images())
    settle(prepared, 1)
    assert isinstance(prepared.conv1, QuantConvBn2d)
    learned = [m for m in prepared.modules() if isinstance(m, LearnedStepFakeQuantize)]
    scales = [m.scale.detach().clone() for m in learned]
    assert len(learned) == 3 + len(list(prepared.fake_quantize.children()))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    F.cross_entropy(prepared(images()), torch.arange(8) % 5).backward()
    optimizer.step()
    assert all(not torch.equal(m.scale, old) for m, old in zip(learned, scales, strict=True))
    prepared.load_state_dict(build("residual", 2).state_dict(), strict=True)


def test_freezing(monkeypatch):
    prepared = settle(divqat.prepare(build("residual"), "x86", images()), 2)
    assert divqat.freeze_observers(prepared) is prepared
    ranges = [m.running_max.clone() for m in activations(prepared).values()]
    mean = prepared.conv1.bn.running_mean.clone()
    prepared(4 * images())
    after = [m.running_max for m in activations(prepared).values()]
    assert all(torch.equal(a, b) for a, b in zip(ranges, after, strict=True))
    assert not torch.equal(prepared.conv1.bn.running_mean, mean)

    assert divqat.freeze_batchnorm(prepared) is prepared
    mean = prepared.conv1.bn.running_mean.clone()
    frozen = prepared(4 * images())
    assert torch.equal(prepared.conv1.bn.running_mean, mean)
    # both frozen: training is eval, but for the rounding of biases
    monkeypatch.setattr(QuantLayer, "deployed_bias", lambda layer, bias: bias)
    assert torch.equal(frozen, prepared.eval()(4 * images()))


# Forwards that tracing makes hard.


def test_functional_dropout_follows_the_mode():
    """Tracing writes ``training=self.training`` down as a constant."""
    net = Net(
        lambda net, x: net.head(F.dropout(net.conv(x), 0.5, training=net.training).mean((2, 3))),
        conv=conv(3, 8),
        head=nn.Linear(8, 5),
    )
    for mode in (True, False):
        prepared = divqat.freeze_observers(
            settle(divqat.prepare(net.train(mode), "x86", images()), 2)
        )
        assert not torch.equal(prepared(images()), prepared(images()))
        prepared.eval()
        assert torch.equal(prepared(images()), prepared(images()))


def test_keyword_calls_and_a_node_named_like_a_method():
    net = Net(
        lambda net, x: net.head(input=net.bn(input=net.conv(input=x.to(torch.float32)))),
        conv=conv(3, 8),
        bn=nn.BatchNorm2d(8),
        head=conv(8, 2),
    )
    prepared = settle(divqat.prepare(net, "x86", images()))
    assert set(quantized(prepared)) == {"conv", "head"}
    assert isinstance(prepared.conv, QuantConvBn2d)
    x = images(seed=4)
    torch.testing.assert_close(
        divqat.convert(prepared)(x), prepared.eval()(x).detach(), rtol=0, atol=5e-3
    )


def test_output_stays_in_float_even_where_a_layer_reads_it():
    def forward(net, x):
        features = net.conv(x).cumsum(1)
        return features, net.head(features)

    net = Net(forward, conv=conv(3, 8), head=nn.Linear(SIZE, 200))
    read = []
    prepared = divqat.prepare(net, "x86", images())
    prepared.head.register_forward_pre_hook(lambda _m, args: read.append(args[0]))
    features, logits = prepared(images())
    assert len(read[0].unique()) <= 256
    assert len(features.unique()) > 256 and len(logits.unique()) > 256


def test_unused_module_in_the_float_checkpoint():
    net = Net(lambda net, x: net.conv(x), conv=conv(3, 8), auxiliary=nn.Linear(3, 3))
    prepared = divqat.prepare(net, "x86", images())
    prepared.load_state_dict(net.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="nonsense"):
        prepared.load_state_dict(net.state_dict() | {"nonsense": torch.ones(1)}, strict=True)


def test_functional_layer_is_quantized():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
            self.last = conv(8, 2)

        def forward(self, x):
            return self.last(F.conv2d(x, self.weight))

    prepared = divqat.prepare(Functional(), "x86", images())
    assert set(quantized(prepared)) == {"last", "functional.conv2d"}
    assert "weight" in dict(prepared.named_parameters())


def test_a_single_learned_scale_is_not_folded_into_batchnorm():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    learned = replace(divqat.preset("qnnpack").weight, learned=True)
    model = divqat.prepare(net, divqat.QuantConfig(weight=learned), images())
    assert not [m for m in model.modules() if isinstance(m, QuantConvBn2d)]
    model(images()).sum().backward()
    assert isinstance(model.get_submodule("1"), nn.BatchNorm2d)
