"""Observer and fake-quantizer modules: ranges worked by hand, switches, learned scales."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from testing import randn, tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

from divqat.nn import FakeQuantize, LearnedStepFakeQuantize, MovingAverageMinMaxObserver, QuantSpec
from divqat.ops import fake_quantize_lsq

# Weight 1/4 of a new batch: exact in binary. Batches with (min, max) (-1, 3), (1, 7), (-3, 3):
# running minimum -1, -1 + (1 + 1)/4 = -1/2, -1/2 + (-3 + 1/2)/4 = -9/8;
# running maximum 3, 3 + (7 - 3)/4 = 4, 4 + (3 - 4)/4 = 15/4.
BATCHES = [tensor([-1.0, 0.5, 3.0]), tensor([[1.0, 7.0]]), tensor([-3.0, 3.0, 0.0])]
RANGES = [(-1.0, 3.0), (-0.5, 4.0), (-1.125, 3.75)]
EPS = 2.0**-23
GRIDS = {
    # affine uint8: scale (high - low) / 255, zero point round(-low / scale): 63.75, 28.3, 58.8
    "affine": (QuantSpec(signed=False, symmetric=False), 255, lambda a, b: b - a, (64, 28, 59)),
    # affine int8: the same, 128 lower
    "affine, signed": (QuantSpec(symmetric=False), 255, lambda a, b: b - a, (-64, -100, -69)),
    # affine uint4: -1 -> 3.75, -0.5 -> 1.67, -1.125 -> 3.46
    "4 bits": (QuantSpec(bits=4, signed=False, symmetric=False), 15, lambda a, b: b - a, (4, 2, 3)),
    "symmetric": (QuantSpec(), 255, lambda a, b: 2 * max(-a, b), (0, 0, 0)),
    "narrow": (QuantSpec(narrow_range=True), 254, lambda a, b: 2 * max(-a, b), (0, 0, 0)),
    "unsigned symmetric": (
        *(QuantSpec(signed=False), 255, lambda a, b: 2 * max(-a, b)),
        (128, 128, 128),
    ),
}


@pytest.mark.parametrize("kind", [MovingAverageMinMaxObserver, FakeQuantize])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_moving_average_scale_and_zero_point(grid, kind):
    spec, levels, width, zero_points = grid
    module = kind(replace(spec, averaging_constant=0.25))
    assert module.running_min == math.inf and module.running_max == -math.inf
    for batch, (low, high), zero_point in zip(BATCHES, RANGES, zero_points, strict=True):
        module(batch)
        assert (float(module.running_min), float(module.running_max)) == (low, high)
        scale, zero = module.calculate_qparams()
        assert float(scale) == pytest.approx(width(low, high) / levels, rel=1e-6)
        assert int(zero) == zero_point
        assert scale.dtype == torch.float32 and zero.dtype == torch.int32


def test_values_worked_by_hand():
    # uint2 affine over [-1, 2]: scale 1, zero point 1, levels -1, 0, 1, 2; halves to even.
    module = FakeQuantize(QuantSpec(bits=2, signed=False, symmetric=False, averaging_constant=1.0))
    x = tensor([-1.0, -0.6, -0.5, 0.4, 0.5, 1.5, 2.0]).requires_grad_()
    y = module(x)
    assert y.tolist() == [-1.0, -1.0, 0.0, 0.0, 0.0, 2.0, 2.0]
    module.eval()
    y = module(tensor([-9.0, -1.4, 2.4, 2.6, 9.0]).requires_grad_())
    assert y.tolist() == [-1.0, -1.0, 2.0, 2.0, 2.0]
    x = tensor([-9.0, -1.4, 2.4, 2.6, 9.0]).requires_grad_()
    module(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]  # by the rounded value, ends included


def test_ranges_per_channel():
    module = FakeQuantize(QuantSpec(), ch_axis=1, num_channels=2)
    x = torch.stack([randn(3, 4), 100 * randn(3, 4, seed=1)], 1)  # [3, 2, 4]
    y = module(x)
    expected = torch.fake_quantize_per_channel_affine(
        x, x.abs().amax((0, 2)) * 2 / 255, torch.zeros(2, dtype=torch.int32), 1, -128, 127
    )
    assert module.scale[1] > 10 * module.scale[0]
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


def test_observer_passes_its_input_through():
    x = randn(3, 4)
    assert MovingAverageMinMaxObserver()(x) is x


def state(module):
    return [b.clone() for b in module.buffers()]


def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


def test_switches():
    x, module = randn(64), FakeQuantize()
    module.eval()
    before = state(module)
    assert torch.equal(module(100 * x), 100 * x) and same(state(module), before)  # not calibrated
    module.train()
    y = module(x)
    assert not torch.equal(y, x)
    after = state(module)
    module.eval()
    assert torch.equal(module(x), y) and module(100 * x).max() < 4 and same(state(module), after)
    module.train().disable_observer()
    assert torch.equal(module(x), y)
    module(100 * x)
    assert same(state(module), after)
    module.enable_observer()
    module.fake_quant_enabled = False
    assert torch.equal(module(100 * x), 100 * x) and not same(state(module), after)


def test_fused_relu():
    x = randn(64).requires_grad_()
    fused, plain = FakeQuantize(relu=True), FakeQuantize()
    y, expected = fused(x), plain(x.relu())
    assert torch.equal(y, expected) and fused.running_min == 0
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, (x > 0).float())
    fused.fake_quant_enabled = False
    assert torch.equal(fused(x), x.relu())


def test_delayed_mode_quantizes_with_the_range_before():
    spec = QuantSpec(signed=False, symmetric=False, averaging_constant=0.25)
    exact, delayed = FakeQuantize(spec), FakeQuantize(spec, mode="delayed")
    x = randn(32)
    assert torch.equal(exact(x), delayed(x))  # nothing was before the first batch
    frozen = copy.deepcopy(exact).eval()
    assert torch.equal(delayed(3 * x), frozen(3 * x))
    assert not torch.equal(exact(3 * x), frozen(3 * x))
    assert same(state(exact), state(delayed))  # what is observed does not depend on the mode


@pytest.mark.parametrize("mode", ["exact", "delayed"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_batch_leaves_the_range_alone(bad, mode):
    x, module = randn(32), FakeQuantize(mode=mode)
    y = module(x)
    before = state(module)
    x[3] = bad
    z = module(x)
    assert same(state(module), before)
    assert z[3].isnan() if math.isnan(bad) else z[3].isfinite()
    x[3], y[3], z[3] = 0, 0, 0
    assert torch.equal(z, y)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30])
@pytest.mark.parametrize("grid", ["affine", "narrow", "symmetric"])
def test_constant_input(value, grid):
    module = FakeQuantize(GRIDS[grid][0])
    y = module(torch.full((4, 4), value))
    # 255 steps have no code for both ends of a symmetric range: half a step is lost.
    error = 0.5 / 127.5 if grid == "symmetric" else 1e-6
    torch.testing.assert_close(y, torch.full((4, 4), value), rtol=1.001 * error, atol=EPS)
    assert module.scale >= EPS


def test_empty_batch_is_not_a_batch():
    module = FakeQuantize()
    assert module(torch.empty(0, 3)).shape == (0, 3)
    assert not module.calibrated and module.running_min == math.inf
    module(randn(8))
    before = state(module)
    module(torch.empty(0, 3))
    assert same(state(module), before)


@pytest.mark.parametrize("axis", [None, 1])
def test_lsq_starts_at_the_published_scale(axis):
    spec, x = QuantSpec(bits=4), randn(5, 3, 7)
    module = LearnedStepFakeQuantize(spec, ch_axis=axis, num_channels=axis and 3)
    module.eval()
    assert module(x) is x  # no batch yet
    module.train()(x)
    magnitude = x.double().abs().mean() if axis is None else x.double().abs().mean((0, 2))
    expected = (2 * magnitude / math.sqrt(7)).float()
    torch.testing.assert_close(module.scale.detach(), expected, rtol=1e-6, atol=0)
    module(100 * x)
    torch.testing.assert_close(module.scale.detach(), expected, rtol=1e-6, atol=0)


def test_lsq_affine_starts_at_the_range():
    module = LearnedStepFakeQuantize(QuantSpec(bits=4, signed=False, symmetric=False))
    module(tensor([-1.0, 2.0, 0.3]))
    scale, zero_point = module.calculate_qparams()
    assert float(scale) == pytest.approx(0.2) and int(zero_point) == 5


@pytest.mark.parametrize("axis", [None, 0])
def test_lsq_gradients_by_the_formula_in_float64(axis):
    spec = QuantSpec(bits=3, signed=False, symmetric=False)
    x = randn(2, 50).requires_grad_()
    module = LearnedStepFakeQuantize(spec, ch_axis=axis, num_channels=None if axis is None else 2)
    module(x)
    with torch.no_grad():
        module.scale.mul_(0.6)  # so that values fall outside
    cotangent = randn(2, 50, seed=1)
    (module(x) * cotangent).sum().backward()

    v = x.detach().double()
    s = module.scale.detach().double().view(-1, 1)
    z = module.zero_point.detach().double().round().view(-1, 1)
    code = torch.round(v / s) + z
    below, above = code < 0, code > 7
    ds = torch.where(below, 0 - z, torch.where(above, 7 - z, torch.round(v / s) - v / s))
    dz = torch.where(below | above, -s.expand_as(v), 0.0)
    assert below.any() and above.any()
    factor = 1 / math.sqrt(7 * (100 if axis is None else 50))
    dims = (0, 1) if axis is None else 1
    for parameter, slope in ((module.scale, ds), (module.zero_point, dz)):
        expected = ((cotangent.double() * slope).sum(dims) * factor).float()
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(x.grad, torch.where(below | above, 0, cotangent))


def test_lsq_training_lowers_the_error():
    x = randn(2000)
    module = LearnedStepFakeQuantize(QuantSpec(bits=3))
    module(x)
    with torch.no_grad():
        module.scale.mul_(3)  # far too coarse
    errors = []
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(200):
        error = (module(x) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    candidates = torch.linspace(0.2, 2, 181)
    zero = torch.zeros((), dtype=torch.int32)
    best = min(
        float((fake_quantize_lsq(x, s, zero, -4, 3) - x).square().mean()) for s in candidates
    )
    assert errors[0] > 3 * best and errors[-1] < 1.1 * best


OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("lr", [1e-4, 1e-2, 1.0, 100.0])
def test_an_lsq_scale_finds_back(optimizer, lr):
    x = randn(64, 5)
    module = LearnedStepFakeQuantize(QuantSpec(bits=4), ch_axis=1, num_channels=5)
    module(x)
    with torch.no_grad():
        module.scale[1:] = tensor([0.0, -1e-3, -1.0, -1e6])
    optimizer, seen = optimizer([module.scale], lr), []
    for _ in range(20):
        y = module(x)
        used, _ = module.calculate_qparams()
        assert (used >= EPS).all() and torch.equal(used, module.scale)
        seen.append(used.clone())
        error = (y - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        assert (module.scale.grad[used <= EPS] < 0).all()
        optimizer.step()
    assert (torch.stack(seen).amax(0) > EPS).all()
    assert (module.eval()(x).isfinite()).all()


def test_an_lsq_scale_that_fell_is_learned_again():
    x, module = randn(2000), LearnedStepFakeQuantize(QuantSpec(bits=3))
    module(x)
    start = (module(x) - x).square().mean().item()
    optimizer = torch.optim.Adam([module.scale], lr=0.02)
    with torch.no_grad():
        module.scale.fill_(-50.0)
    for _ in range(150):
        error = (module(x) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert error < start


@pytest.mark.parametrize("compiled", [False, True])
def test_one_lsq_scale_may_quantize_twice_in_a_graph(compiled):
    module, x = LearnedStepFakeQuantize(QuantSpec(bits=4)), randn(64).requires_grad_()
    module(x.detach())
    with torch.no_grad():
        module.scale.fill_(-1.0)

    def twice(x):
        return module(module(x) * 0.5)

    run = torch.compile(twice, backend="aot_eager", fullgraph=True) if compiled else twice
    run(x).sum().backward()
    assert module.scale == EPS and module.scale.grad <= 0
    before = module.eval().scale.clone()
    assert torch.equal(module(x), module(x)) and torch.equal(module.scale, before)


def test_a_bad_lsq_scale_is_left_alone_in_eval_mode():
    module = LearnedStepFakeQuantize(QuantSpec(bits=4))
    module(randn(64))
    with torch.no_grad():
        module.scale.fill_(-1.0)
    y = module.eval()(tensor([-1.0, 0.0, 1.0]))
    assert y.tolist() == [-8 * EPS, 0.0, 7 * EPS] and module.scale == -1.0


@pytest.mark.parametrize("symmetric", [False, True])
def test_lsq_starts_at_a_range_too_wide_for_a_float(symmetric):
    module = LearnedStepFakeQuantize(QuantSpec(symmetric=symmetric))
    module(tensor([-2e38, 0.0, 2e38, 1e38]))
    wanted = 2 * 1.25e38 / math.sqrt(127) if symmetric else 4e38 / 255
    assert float(module.scale.detach()) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind", [FakeQuantize, LearnedStepFakeQuantize])
def test_an_empty_batch_with_channels_along_its_first_axis(kind):
    module = kind(QuantSpec(), ch_axis=0, num_channels=2)
    for _ in range(2):
        x = torch.zeros(0, 3, requires_grad=True)
        y = module(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == (0, 3)
        module(randn(2, 3))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_that_is_run_again_in_the_backward_observes_once(use_reentrant):
    def step(run):
        torch.manual_seed(0)
        model = nn.Sequential(FakeQuantize(), nn.Linear(8, 8), FakeQuantize(relu=True))
        for _ in range(3):
            model(torch.randn(64, 8))
        x = (3 * torch.randn(64, 8)).requires_grad_()
        run(model, x).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]

    def again(model, x):
        return checkpoint(model, x, use_reentrant=use_reentrant)

    for a, b in zip(step(nn.Module.__call__), step(again), strict=True):
        assert torch.equal(a, b)


def test_a_delayed_range_is_not_there_when_the_forward_is_run_again():
    quantizer = FakeQuantize(mode="delayed")
    x = randn(64, 8).requires_grad_()
    quantizer(x)
    y = checkpoint(quantizer, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"mode: wanted 'exact' where torch\.utils\.checkpoint"):
        y.sum().backward()
    checkpoint(quantizer.eval(), x, use_reentrant=False).sum().backward()
