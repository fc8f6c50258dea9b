"""Post-training quantization: ranges, equalization, learned rounding, bias correction."""

import math

import pytest
import torch
from test_train import QUIET
from torch import nn
from toys import TEST_IMAGES, TEST_LABELS, toy_images, toy_victim
from trainings import train_interrupted

import divqat
from divqat import nn as qnn
from divqat.data import to_float
from divqat.export import export_onnx, verify
from divqat.nn import FakeQuantize, QuantSpec
from divqat.nn._layer import QuantLayer
from divqat.quantize.clip import BINS, FRACTIONS, Histogram, weight_clip
from divqat.quantize.equalize import equalize, neighbors
from divqat.quantize.ptq import _off
from divqat.quantize.round_weights import learn_rounding
from divqat.train import TrainConfig, load_run, train

UINT4 = QuantSpec(bits=4, signed=False, symmetric=False)
INT4 = QuantSpec(bits=4)
BATCHES = to_float(toy_images(128, seed=7)[0]).split(50)  # the last one is smaller


@pytest.fixture(scope="module")
def net():
    return toy_victim()


def prepared(net, config="x86", **options):
    if options:
        config = divqat.preset(config, **options)
    return divqat.prepare(net, config, BATCHES[0])


def histogram(x):
    result = Histogram(min(x.min().item(), 0.0), max(x.max().item(), 0.0))
    for part in x.split(300):
        result.add(part)
    return result


def affine_error(x, low, high, levels=15):
    """Σ (Q(x) − x)² on 0 … levels, in float64, from the definition."""
    scale = (high - low) / levels
    zero = round(-low / scale)
    q = ((x / scale).round() + zero).clamp(0, levels)
    return (((q - zero) * scale - x) ** 2).sum().item()


@pytest.mark.parametrize("positive", [False, True])
def test_the_range_of_least_squared_error_is_that_of_all_candidates(positive):
    x = torch.randn(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    x = x.relu() if positive else x
    counted = histogram(x)
    low, high = counted.range("mse", UINT4, 99)
    assert low >= counted.low and 0 < high < x.max()
    lows = [0.0] if positive else (FRACTIONS[::4] * x.min()).tolist()
    best = min(affine_error(x, a, b) for a in lows for b in (FRACTIONS * x.max()).tolist())
    # The histogram moves each value by at most half a bin, so that an error is at most that larger.
    moved = 3000**0.5 * counted.width / 2
    assert math.sqrt(affine_error(x, low, high)) <= math.sqrt(best) + 2 * moved


def test_percentiles_by_hand():
    x = torch.arange(-100, 901).double()  # 1001 values; 1 % of them are 10
    counted = histogram(x)
    low, high = counted.range("percentile", UINT4, 99.0)
    assert low == pytest.approx(-90, abs=2 * counted.width)
    assert high == pytest.approx(890, abs=2 * counted.width)
    assert counted.range("percentile", UINT4, 100.0) == pytest.approx((-100, 900))
    assert counted.range("minmax", UINT4, 99.0) == (-100, 900)
    assert histogram(x.relu()).range("percentile", UINT4, 99.0)[0] == 0.0


def entropy_by_hand(counts, levels, last):
    """KL(P‖Q) of Migacz for a range of ``last`` bins whose codes are ``levels`` (per bin)."""
    p = [*counts[:last]]
    p[-1] += sum(counts[last:])
    q = [0.0] * last
    for code in set(levels[:last]):
        bins = [i for i in range(last) if levels[i] == code]
        filled = [i for i in bins if counts[i] > 0]
        for i in filled:
            q[i] = sum(counts[j] for j in bins) / len(filled)
    total_p, total_q = sum(p), sum(q)
    return sum(
        a / total_p * math.log(a / total_p / max(b / total_q, 1e-12))
        for a, b in zip(p, q, strict=True)
        if a > 0
    )


def test_the_range_of_least_entropy_loss_agrees_with_a_loop():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1)).double().abs()
    counted = histogram(x)
    counts, centers = counted.counts.tolist(), counted.centers
    scores = []
    for fraction in FRACTIONS.tolist():
        scale = fraction * counted.high / 15
        levels = (centers / scale).round().clamp(0, 15).tolist()
        scores.append(entropy_by_hand(counts, levels, round(BINS * fraction)))
    best = FRACTIONS[scores.index(min(scores))].item()
    assert counted.range("entropy", UINT4, 99) == pytest.approx((0.0, best * counted.high))
    assert best < 1


def test_a_symmetric_grid_and_a_constant_tensor():
    x = torch.cat(
        [torch.randn(5000, generator=torch.Generator().manual_seed(2)), torch.ones(1) * 50]
    )
    low, high = histogram(x.double()).range("mse", INT4, 99)
    assert max(-low, high) < 25
    for kind in ("minmax", "percentile", "mse", "entropy"):
        assert histogram(torch.zeros(9).double()).range(kind, UINT4, 99) == (0.0, 0.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_clip_of_a_weight_has_the_least_error_of_all_candidates(bits):
    top = 2 ** (bits - 1) - 1
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(bits)) ** 3
    found = weight_clip(rows, top)
    for row, scale in zip(rows.double(), found, strict=True):
        scales = [f * row.abs().max().item() / top for f in FRACTIONS.tolist()]
        errors = [
            ((((row / s).round().clamp(-top, top)) * s - row) ** 2).sum().item() for s in scales
        ]
        assert scale.item() == pytest.approx(scales[errors.index(min(errors))], rel=1e-6)


DEEP = nn.Sequential(
    nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1, groups=2), nn.Flatten(),
    nn.Linear(4 * 9, 7), nn.ReLU(), nn.Linear(7, 3),
)  # fmt: skip


@pytest.fixture
def deep():
    torch.manual_seed(3)
    model = DEEP
    for module in model:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with torch.no_grad():
        model[1].running_var.uniform_(0.01, 4)
        model[1].weight.uniform_(0.1, 5)
        model[4].weight.mul_(torch.logspace(-2, 2, 6).view(-1, 1, 1, 1))
    return model.eval()


def test_equalization_keeps_the_float_function_and_evens_out_the_weights(deep):
    model = prepared(deep).eval()
    assert len(neighbors(model)) == 4
    with _off(model), torch.no_grad():
        before = model(BATCHES[0])
        torch.testing.assert_close(before, deep(BATCHES[0]), rtol=1e-5, atol=1e-6)
        equalize(model)
        after = model(BATCHES[0])
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
    first, second = neighbors(model)[0]
    sizes = [layer.folded()[0].flatten(1).abs().amax(1) for layer in (first, second)]
    torch.testing.assert_close(*sizes, rtol=0.05, atol=0)


def test_relu6_and_layers_that_are_read_twice_are_not_equalized():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(1, 1, 1) for _ in range(3))

        def forward(self, x):
            x = nn.functional.relu6(self.a(x))
            y = self.b(x)
            return self.c(y) + y

    assert neighbors(prepared(Twice())) == []


@pytest.mark.parametrize("scale_of", ["x86", "qnnpack"])
def test_placed_weights_are_fixed_points(net, scale_of):
    model = prepared(net, scale_of, weight_bits=3)
    divqat.ptq(model, BATCHES, weight_ranges="mse", rounding="learned", rounding_steps=20)
    model.eval()
    for layer in model.modules():
        if isinstance(layer, QuantLayer):
            weight = layer.scaled_weight()[0]
            torch.testing.assert_close(layer.quantize_weight(weight), weight, rtol=1e-5, atol=1e-7)
            assert weight.unique().numel() < net[0].weight.numel() * 40


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_learned_rounding_never_has_a_larger_error_than_nearest(kind):
    """Inputs are correlated, as those of a network: errors of several weights can cancel."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 6, generator=generator) @ torch.randn(6, 288, generator=generator)
    apply, inputs = nn.functional.conv2d, inputs.relu().view(256, 8, 6, 6)
    weight = torch.randn(8, 8, 3, 3, generator=generator)
    if kind == "linear":
        apply, inputs, weight = nn.functional.linear, inputs.flatten(1)[:, :72], weight.flatten(1)
    target = apply(inputs, weight)
    scale = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True) / 3
    nearest = (apply(inputs, (weight / scale).round() * scale) - target).square().mean().item()
    # Over five seeds 0.41 to 0.75 of the error for conv, 0.19 to 0.71 for linear.
    for steps, gain in ((1, 1 + 1e-6), (300, 0.9)):
        found = learn_rounding(
            apply, inputs, target, weight, scale, 3, steps=steps, generator=generator
        )
        codes = found / scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
        assert (codes - weight / scale).abs().max() < 1 + 1e-5 and codes.abs().max() <= 3 + 1e-5
        assert (apply(inputs, found) - target).square().mean().item() <= gain * nearest


def means(model, weights):
    found = {}
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLayer)]

    def keep(layer, args, output):
        channels = output.transpose(0, 1).flatten(1).double()
        found.setdefault(layer, []).append(channels.clone())

    handles = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts, 1).mean(1) for parts in found.values()]


def test_bias_correction_makes_every_mean_that_of_the_float_model(deep):
    model = prepared(deep, weight_bits=3, first_last_bits=3)
    with _off(model.eval()):
        wanted = means(model, False)
    errors = []
    for corrects in (False, True):
        model = prepared(deep, weight_bits=3, first_last_bits=3)
        divqat.ptq(model, BATCHES, activation_ranges="mse", bias_correction=corrects)
        model.eval()
        errors.append(
            [(a - b).abs().max().item() for a, b in zip(means(model, True), wanted, strict=True)]
        )
        steps = [
            layer.deployed_scales(layer.folded()[1], layer.input_scale())[1]
            for layer in model.modules()
            if isinstance(layer, QuantLayer)
        ]
    plain, corrected = errors
    # What is left is the rounding of the bias to an integer, before and after.
    for before, after, step in zip(plain, corrected, steps, strict=True):
        bound = step.max().item() if step is not None else 0
        assert after <= bound + 1e-5 < before


RECIPES = {
    "minmax": dict(),
    "average": dict(activation_ranges="average"),
    "percentile": dict(activation_ranges="percentile", percentile=99.9),
    "mse": dict(activation_ranges="mse", weight_ranges="mse"),
    "entropy": dict(activation_ranges="entropy", bias_correction=True),
    "all": dict(activation_ranges="mse", weight_ranges="mse", equalize=True, rounding="learned",
                rounding_steps=100, bias_correction=True),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_exported_file_agrees_with_the_model(net, recipe, tmp_path):
    model = prepared(net, weight_bits=4)
    before = [p.clone() for p in net.parameters()]
    assert divqat.ptq(model, BATCHES, **RECIPES[recipe]) is model and model.training
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantize)]
    assert quantizers and all(q.calibrated and not q.observer_enabled for q in quantizers)
    export_onnx(model.eval(), BATCHES[0][:2], tmp_path / "model.onnx")
    report = verify(model, tmp_path / "model.onnx", TEST_IMAGES, TEST_LABELS)
    assert report.argmax_agreement > 0.99 and report.accuracy_onnx > 0.9


def test_two_bits_need_learned_rounding_and_clips(net):
    """Squared errors of the logits; over five seeds 0.03 to 0.2 of those of plain rounding."""
    x = to_float(TEST_IMAGES)
    errors = []
    for recipe in ("minmax", "all"):
        model = prepared(net, weight_bits=2, first_last_bits=2)
        divqat.ptq(model, BATCHES, **RECIPES[recipe])
        with torch.no_grad():
            errors.append((model.eval()(x) - net(x)).square().mean().item())
    assert errors[1] < 0.6 * errors[0]


def test_the_same_seed_gives_the_same_bits(net):
    states = []
    for _ in range(2):
        model = divqat.ptq(prepared(net), BATCHES, rounding="learned", rounding_steps=5, seed=4)
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(activation_ranges="max"), ValueError, "activation_ranges: wanted one of average"),
        (
            dict(weight_ranges="entropy"),
            ValueError,
            "weight_ranges: wanted one of minmax, mse, got",
        ),
        (dict(rounding="up"), ValueError, "rounding: wanted one of nearest, learned, got 'up'"),
        (dict(percentile=50), ValueError, "percentile: wanted a number above 50 up to 100, got 50"),
        (dict(rounding_steps=0), ValueError, "rounding_steps: wanted at least 1, got 0"),
    ],
)
def test_bad_options(net, options, error, message):
    with pytest.raises(error, match=message):
        divqat.ptq(prepared(net), BATCHES, **options)


def test_bad_models_and_batches(net):
    model = prepared(net)
    with pytest.raises(ValueError, match="batches: wanted at least one input, got none"):
        divqat.ptq(model, [BATCHES[0][:0]])
    with pytest.raises(TypeError, match="batches: wanted tensors"):
        divqat.ptq(model, [(BATCHES[0], TEST_LABELS)])
    with pytest.raises(FloatingPointError, match="batches: wanted finite activations, got NaN"):
        divqat.ptq(model, [BATCHES[0] / 0])
    with pytest.raises(ValueError, match="prepared: "):
        divqat.ptq(net, BATCHES)
    wide = divqat.QuantConfig(weight=QuantSpec(bits=8, per_channel=True))
    with pytest.raises(ValueError, match="prepared: wanted weights with narrow_range"):
        divqat.ptq(prepared(net, wide), BATCHES, rounding="learned")
    learned = divqat.QuantConfig(activation=QuantSpec(signed=False, symmetric=False, learned=True))
    with pytest.raises(ValueError, match="prepared: wanted observed scales, got a learned one in"):
        divqat.ptq(prepared(net, learned), BATCHES)
    swapped = nn.Sequential(qnn.QuantConv2d(1, 2, 3), nn.ReLU())
    with pytest.raises(ValueError, match="equalize: wanted a model that was traced"):
        divqat.ptq(swapped, BATCHES, equalize=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "fp"
    train(TrainConfig(dataset="digits", epochs=2, threads=1), folder, **QUIET)
    return folder


def test_the_training_method_uses_it_and_resumes_with_the_same_bits(teacher, tmp_path):
    config = TrainConfig(
        method="ptq", teacher=str(teacher), dataset="digits", epochs=2, threads=1, weight_bits=3,
        activation_ranges="mse", weight_ranges="mse", equalize=True, rounding="learned",
        rounding_steps=10, bias_correction=True, calibration_images=100,
    )  # fmt: skip
    assert config.calibrates and "calibration_images" not in config.unused
    train(config, tmp_path / "whole", **QUIET)
    train_interrupted(config, tmp_path / "stopped", 1)
    runs = [load_run(tmp_path / name) for name in ("whole", "stopped")]
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    plain = TrainConfig(method="ptq", teacher=str(teacher), dataset="digits", threads=1)
    assert not plain.calibrates and {"percentile", "rounding_steps"} <= plain.unused
    assert "equalize" in TrainConfig(method="qat", teacher=str(teacher)).unused
