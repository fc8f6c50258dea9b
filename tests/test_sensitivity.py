"""sensitivity: float means the float model's bits, oracles in float64, and nothing changes."""

import copy
import functools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import HAND_WRITTEN, build, images, settle
from testing import randn, tensor
from torch import nn
from torch.nn import functional as F

import divqat
from divqat.nn import FakeQuantize, LearnedStepFakeQuantize, QuantConv2d, QuantLinear, QuantSpec
from divqat.nn._layer import QuantLayer
from divqat.quantize import group_weights, observe_first, ungroup_weights
from divqat.quantize.bypass import Switches, unchanged

DATA = [(images(8, seed), torch.arange(8) % 5) for seed in (1, 2)]


def prepared(name="residual", config="x86", batches=3):
    return settle(divqat.prepare(build(name), config, images()), batches)


@functools.cache
def ready():
    """A prepared model that no test changes."""
    return prepared(batches=1)


def everything(model):
    """All state of a model that a call could change, copied."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = []
    for name, module in model.named_modules():
        attributes = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, str, QuantSpec, type(None)))
        }
        children = {key: id(child) for key, child in module._modules.items()}
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        flags.append((name, attributes, children, hooks))
    return tensors, flags


def assert_same(before, after):
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_all_float_has_the_bits_of_the_float_model(name):
    float_model = build(name).eval()
    # BatchNorm's statistics must be the same in both
    model = divqat.prepare(float_model, "x86", images())
    observe_first(model, [images()])
    with unchanged(model):
        Switches(model).apply({}, ())
        got = model(images())
    with torch.no_grad():
        assert torch.equal(got, float_model(images()))


@pytest.mark.parametrize("learned", [False, True])
def test_all_quantized_is_the_model_as_it_is(learned):
    config = divqat.preset("x86", weight_bits=4, activation_bits=4)
    if learned:
        weight, activation = (replace(s, learned=True) for s in (config.weight, config.activation))
        config = replace(config, weight=weight, activation=activation)
    model = prepared(config=config, batches=1)
    result = divqat.sensitivity(model, DATA)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in DATA]).double()
    labels = torch.cat([y for _, y in DATA])
    assert result.quantized.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-9)
    assert result.quantized.accuracy == float((logits.argmax(1) == labels).double().mean())
    assert result.images == 16
    assert (result.floating.agreement, result.floating.divergence) == (1, 0)
    assert result.floating.sqnr_db is None  # no noise


def two_layers():
    """Two linear layers without bias, whose quantization is known by hand."""
    weight = QuantSpec(bits=3, per_channel=False, narrow_range=True)
    model = nn.Sequential(
        QuantLinear(2, 2, bias=False, weight_spec=weight, input_spec=None),
        FakeQuantize(QuantSpec(bits=2, signed=False, symmetric=False)),
        QuantLinear(2, 2, bias=False, weight_spec=weight, input_spec=None),
    )
    with torch.no_grad():
        model[0].weight.copy_(tensor([[3.0, 0.6], [-1.2, 2.2]]))  # codes 3 1 -1 2, scale 1
        model[2].weight.copy_(tensor([[1.5, 0.3], [0.9, -0.6]]))  # scale 1/2: 1.5 0.5 1 -0.5
    model[1](tensor([[0.0, 6.0]]))  # scale 2: 0 2 4 6
    return model


def numbers(logits, reference, labels):
    """The definitions, in numpy and float64."""

    def probabilities(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p, q = probabilities(reference), probabilities(logits)
    noise = ((reference - logits) ** 2).sum()
    return {
        "loss": -np.log(q[np.arange(len(q)), labels]).mean(),
        "accuracy": (q.argmax(1) == labels).mean(),
        "agreement": (q.argmax(1) == p.argmax(1)).mean(),
        "divergence": (p * np.log(p / q)).sum(1).mean(),
        "sqnr_db": 10 * math.log10((reference**2).sum() / noise) if noise else None,
    }


def test_numbers_worked_by_hand():
    first, second = (np.array(w) for w in ([[3, 0.6], [-1.2, 2.2]], [[1.5, 0.3], [0.9, -0.6]]))
    first_3, second_3 = np.array([[3, 1], [-1, 2.0]]), np.array([[1.5, 0.5], [1, -0.5]])
    second_2 = np.array([[1.5, 0], [1.5, 0]])  # 2 bits: codes -1, 0, 1 and scale 1.5
    x = np.array([[1.0, 0.5], [0.25, 1.0], [0.1, 0.3]])
    y = np.array([0, 1, 1])

    def answer(w, v, rounded):
        hidden = x @ w.T
        return (2 * np.clip(np.round(hidden / 2), 0, 3) if rounded else hidden) @ v.T

    plain = answer(first, second, False)
    batches = [(tensor(x[:2].tolist()), torch.tensor(y[:2])), (tensor(x[2:].tolist()), torch.tensor(y[2:]))]  # noqa: E501  # fmt: skip
    result = divqat.sensitivity(two_layers(), batches, bits=[2])
    assert [layer.name for layer in result.layers] == [
        "0",
        "2",
        "1",
    ]  # no layer is traced to read 1
    for got, wanted in {
        result.floating: plain,
        result.quantized: answer(first_3, second_3, True),
        result.layers[0].alone: answer(first_3, second, False),
        result.layers[0].others: answer(first, second_3, True),
        result.layers[1].alone: answer(first, second_3, False),
        result.layers[1].others: answer(first_3, second, True),
        result.layers[1].at[2]: answer(first, second_2, False),
        result.layers[2].alone: answer(first, second, True),
        result.layers[2].others: answer(first_3, second_3, False),
    }.items():
        for name, value in numbers(wanted, plain, y).items():
            assert getattr(got, name) == (
                value if value is None else pytest.approx(value, abs=1e-5)
            )
    weights = divqat.sensitivity(two_layers(), batches, what="weights")
    assert [layer.name for layer in weights.layers] == ["0", "2"]
    assert weights.quantized.loss == pytest.approx(
        numbers(answer(first_3, second_3, False), plain, y)["loss"], abs=1e-5
    )
    activations = divqat.sensitivity(two_layers(), batches, what="activations")
    assert [layer.name for layer in activations.layers] == ["1"]
    assert activations.layers[0].alone == activations.quantized == result.layers[2].alone


def test_at_a_width_equals_a_model_prepared_with_it():
    model = prepared()
    result = divqat.sensitivity(model, DATA, bits=[3, 7])
    for layer in result.layers[1:3]:
        assert layer.at[7] == layer.alone  # its own width
        config = replace(divqat.preset("x86"), layer_bits={layer.name: 3})
        other = divqat.prepare(build("residual"), config, images())
        other.load_state_dict(model.state_dict())
        by_name = {row.name: row for row in divqat.sensitivity(other, DATA).layers}
        assert by_name[layer.name].bits == 3
        assert by_name[layer.name].alone == layer.at[3]


@pytest.mark.parametrize(
    ("what", "learned"), [("both", True), ("weights", False), ("activations", False)]
)
def test_the_model_is_as_before(what, learned):
    config = divqat.preset("x86", weight_bits=4)
    if learned:
        config = replace(config, weight=replace(config.weight, learned=True))
    model = prepared("concat_hardswish", config, 1)
    model.conv1.bn.eval()
    before = everything(copy.deepcopy(model))[0], everything(model)[1]
    states = torch.get_rng_state(), random.getstate()
    divqat.sensitivity(model, DATA, what=what, bits=[3] if what != "activations" else ())
    assert_same(before, everything(model))
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    # and it still trains as if nothing had been measured
    twin = prepared("concat_hardswish", config, 1)
    twin.conv1.bn.eval()
    assert torch.equal(model(images()), twin(images()))


def test_the_model_is_as_before_after_an_error():
    model = prepared()

    def batches():
        yield DATA[0]
        raise KeyboardInterrupt

    before, state = everything(model), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        divqat.sensitivity(model, batches())
    with pytest.raises(RuntimeError):
        divqat.sensitivity(model, [torch.zeros(2, 4, 12, 12)])  # 4 channels
    assert_same(before, everything(model))
    assert torch.equal(state, torch.get_rng_state())


def test_groups_of_weights_make_no_difference():
    model = prepared()
    grouped = divqat.sensitivity(model, DATA, what="weights", bits=[3])
    for change in (ungroup_weights, lambda m: group_weights(m, 1e-4)):
        assert divqat.sensitivity(change(model), DATA, what="weights", bits=[3]) == grouped


def test_a_layer_that_is_called_twice_is_one_layer_with_two_inputs():
    model = prepared("shared")
    result = divqat.sensitivity(model, DATA)
    (row,) = (row for row in result.layers if row.name == "conv")
    assert len(row.activation_bits) == 2
    with unchanged(model):
        switches = Switches(model)
        (unit,) = (unit for unit in switches.units if unit.name == "conv")
        switches.apply({unit.layer: 7}, unit.quantizers)
        x = DATA[0][0]
        logits = model(x)
        # by hand, with the same modules
        stem, conv = model.stem, model.conv
        y = F.relu(F.conv2d(x, stem.weight, stem.bias, padding=1))
        weight = conv.quantize_weight(conv.weight)
        for quantizer in unit.quantizers:
            scale, zero = quantizer.calculate_qparams()
            code = ((y * scale.reciprocal()).round() + zero).clamp(0, 255)
            y = F.conv2d((code - zero) * scale, weight, conv.bias, padding=1)
            y = F.relu(model.bn(y))
        wanted = model.head(y.mean([-1, -2]))
    assert torch.allclose(logits, wanted, atol=1e-4)


def test_a_module_with_two_names_is_one_layer():
    layer = QuantConv2d(3, 3, 3, padding=1)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Flatten(), QuantLinear(3 * 144, 5))
    settle(model, 2)
    result = divqat.sensitivity(model, DATA)
    assert [row.name for row in result.layers] == ["0", "4"]


def test_a_model_prepared_by_module_swap():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

        def forward(self, x):
            if x.sum() > 1e9:
                return x
            return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))

    float_model = Untraceable().eval()
    with pytest.warns(UserWarning, match="not traced"):
        model = divqat.prepare(float_model, "x86", images())
    observe_first(model, [images()])
    result = divqat.sensitivity(model, DATA)
    assert [(row.name, row.bits, row.activation_bits) for row in result.layers] == [
        ("conv", 7, (8,)),
        ("head", 7, (8,)),
    ]
    with unchanged(model):
        Switches(model).apply({}, ())
        assert torch.equal(model(images()), float_model(images()))


def test_a_learned_scale_keeps_its_range():
    layer = QuantLinear(4, 3, weight_spec=QuantSpec(bits=5, learned=True, per_channel=True))
    model = nn.Sequential(layer)
    model(randn(6, 4))
    model.eval()
    before = layer.weight_fake_quantize.scale.detach().clone()
    with unchanged(model):
        Switches(model).apply({layer: 3}, ())
        assert torch.allclose(layer.weight_fake_quantize.scale * 3, before * 15)
        levels = layer.quantized_weight()[0] / layer.weight_fake_quantize.scale[:, None]
        assert levels.round().abs().max() <= 4
    assert torch.equal(layer.weight_fake_quantize.scale, before)


def test_a_quantizer_that_was_off_stays_off():
    model = prepared()
    fakes = [m for m in model.modules() if isinstance(m, (FakeQuantize, LearnedStepFakeQuantize))]
    for fake in fakes:
        fake.fake_quant_enabled = False
    result = divqat.sensitivity(model, DATA, what="activations")
    assert result.quantized == result.floating
    assert not any(fake.fake_quant_enabled for fake in fakes)


def test_one_pass_over_the_data_and_the_same_noise_for_each_setting():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = prepared()

        def forward(self, x):
            return self.net(x) + torch.rand(len(x), 5)

    read = []

    def batches():
        for batch in DATA:
            read.append(len(batch))
            yield batch

    result = divqat.sensitivity(Noisy(), batches())
    assert len(read) == len(DATA)
    quiet = divqat.sensitivity(prepared(), DATA)
    assert result.quantized.sqnr_db > quiet.quantized.sqnr_db - 1  # the noise is no error


def test_without_labels_there_is_no_loss():
    result = divqat.sensitivity(ready(), [x for x, _ in DATA])
    labeled = divqat.sensitivity(ready(), DATA)
    for row, other in zip(result.layers, labeled.layers, strict=True):
        assert row.alone.loss is row.alone.accuracy is None
        assert replace(other.alone, loss=None, accuracy=None) == row.alone
    json.dumps(result.to_dict(), allow_nan=False)
    assert len(str(result).splitlines()) == 4 + len(result.layers)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = ready()

    def forward(self, x):
        return self.net(x), x


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(what="weight"), ValueError, "what: wanted one of both, .*, got 'weight'"),
        (dict(bits=[9]), ValueError, "bits: wanted whole numbers from 2 to 8, got 9"),
        (dict(bits=[4], what="activations"), ValueError, "bits: wanted none with what"),
        (dict(batches=[]), ValueError, "batches: wanted at least one image, got none"),
        (dict(batches=3), TypeError, "batches: wanted an iterable .*, got int"),
        (dict(batches=images()), TypeError, "batches: wanted an iterable .*, got Tensor"),
        (dict(batches=["x"]), TypeError, "batches: wanted images or .*, got <class 'str'>"),
        (dict(batches=[(1, 2, 3)]), TypeError, "batches: wanted images or .*, got 3 parts"),
        (dict(batches=[images().byte()]), TypeError, "wanted float images, got torch.uint8"),
        (dict(batches=[DATA[0], DATA[1][0]]), ValueError, "labels in all batches or in none"),
        (
            dict(batches=[(images(), torch.full((8,), 5))]),
            ValueError,
            "batches: wanted labels 0 to 4, got 5 to 5",
        ),
        (
            dict(batches=[(images(), torch.zeros(7))]),
            ValueError,
            r"batches: wanted labels int64 \[8\], got torch.float32 \[7\]",
        ),
        (dict(batches=[images() * torch.nan]), FloatingPointError, "got NaN or Inf"),
        (dict(model=3), TypeError, "model: wanted an nn.Module, got int"),
        (dict(model=build("residual")), ValueError, "model: wanted a model made by divqat.prepare"),
        (dict(model=Pair()), TypeError, "model: wanted one tensor of logits .*, got tuple"),
        (
            dict(model=divqat.prepare(build("residual"), "x86", images())),
            ValueError,
            "quantizers have all seen a batch in training mode, got fake_quantize",
        ),
        (
            dict(model=nn.Sequential(ready(), nn.Flatten(0))),
            ValueError,
            r"model: wanted one tensor of logits .*, got torch.float32 \[40\] for 8 images",
        ),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        divqat.sensitivity(**{"model": ready(), "batches": DATA, **arguments})


def test_every_quantizer_of_every_network_is_in_some_unit():
    for name in HAND_WRITTEN:
        model = prepared(name, batches=1)
        units = Switches(model).units
        covered = {q for unit in units for q in unit.quantizers}
        covered |= {unit.layer for unit in units}
        kinds = (QuantLayer, FakeQuantize)
        assert {m for m in model.modules() if isinstance(m, kinds)} <= covered
