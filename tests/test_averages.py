"""Weight averages, copies, casts and pickles of a prepared model end as calibrated as it is."""

import copy
import io
import warnings

import pytest
import torch
from testing import randn
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

import divqat
from divqat.nn import FakeQuantize, LearnedStepFakeQuantize, QuantConvBn2d, QuantSpec
from divqat.quantize import QuantConfig, convert, observe_first

LEARNED = QuantConfig(
    weight=QuantSpec(per_channel=True, narrow_range=True, learned=True),
    activation=QuantSpec(signed=False, symmetric=False, learned=True),
)
CONFIGS = {"x86": "x86", "tensorrt": "tensorrt", "learned": LEARNED}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
X = randn(16, 1, 6, 6)


def float_model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)).eval()


def prepared(config="x86") -> nn.Module:
    return divqat.prepare(float_model(), config, X)


def train(model: nn.Module, after=lambda: None, steps: int = 8) -> nn.Module:
    """Some steps of training on batches of changing ranges."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        model((1 + step % 3) * randn(16, 1, 6, 6, seed=step) + 0.3).square().mean().backward()
        optimizer.step()
        after()
    return model


def quantizers(model: nn.Module) -> list:
    return [m for m in model.modules() if isinstance(m, (FakeQuantize, LearnedStepFakeQuantize))]


def on_grids(model: nn.Module) -> bool:
    """Whether every quantizer puts other values on its grid."""
    for quantizer in quantizers(model):
        x = randn(4096) if quantizer.ch_axis is None else randn(len(quantizer.scale), 4096)
        if len(quantizer.eval()(x).unique()) > 256 * quantizer.scale.numel():
            return False
    return True


@configs
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("average", ["mean", "ema", "ema by tensor"])
def test_an_averaged_model_made_before_the_first_batch_is_calibrated(config, buffers, average):
    options = {
        "mean": {},
        "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.7)},
        "ema by tensor": {"avg_fn": get_ema_avg_fn(0.7)},
    }[average]
    model = prepared(config)
    averaged = AveragedModel(model, use_buffers=buffers, **options).eval()
    averaged(X)  # as new: float, and no error
    train(model, lambda: averaged.update_parameters(model))
    y = averaged(X)
    assert all(q.has_range() for q in quantizers(averaged)) and on_grids(averaged)
    # What is deployed is what the average computed, up to the rounding of the biases.
    torch.testing.assert_close(convert(averaged)(X), y, rtol=0.02, atol=0.02)
    # Scale and zero point belong to the range, also to one that was averaged.
    for quantizer in quantizers(averaged):
        if isinstance(quantizer, FakeQuantize):
            low, high = quantizer.running_min.double(), quantizer.running_max.double()
            code = (low / quantizer.scale + quantizer.zero_point).round()
            assert abs(int(code) - quantizer.spec.quant_min) <= 1 or quantizer.spec.symmetric
            assert float(high - low) > 0


@configs
def test_an_average_by_hand_over_parameters_that_copies_buffers(config):
    model = prepared(config)
    observe_first(model, [X])
    model(X)  # a learned scale starts here
    averaged = copy.deepcopy(model).eval()

    @torch.no_grad()
    def update():
        for a, b in zip(averaged.parameters(), model.parameters(), strict=True):
            a.lerp_(b, 0.2)
        for a, b in zip(averaged.buffers(), model.buffers(), strict=True):
            a.copy_(b)

    train(model, update)
    y = averaged(X)
    assert on_grids(averaged)
    torch.testing.assert_close(convert(averaged)(X), y, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("how", ["lerp", "mul and add"])
@configs
def test_an_average_of_what_had_seen_nothing_says_so(config, how):
    # As timm's and YOLO's do, over the state dict; which holds nothing but tensors.
    model = prepared(config)
    averaged = copy.deepcopy(model).eval()

    def update():
        state = model.state_dict()
        for key, value in averaged.state_dict().items():
            if not value.dtype.is_floating_point:
                value.copy_(state[key])
            elif how == "lerp":
                value.lerp_(state[key], 0.2)
            else:
                value.mul_(0.8).add_(state[key], alpha=0.2)

    train(model, update)
    for use in (averaged, convert):
        with pytest.raises(RuntimeError, match="an average that began before the first batch"):
            use(averaged if use is convert else X)


@configs
def test_an_average_by_hand_over_the_state_dict_that_began_later(config):
    model = prepared(config)
    model(X)
    averaged = copy.deepcopy(model).eval()

    def update():
        state = model.state_dict()
        for key, value in averaged.state_dict().items():
            value.copy_((0.8 * value + 0.2 * state[key]).to(value.dtype))

    train(model, update)
    torch.testing.assert_close(convert(averaged)(X), averaged(X), rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_a_compiled_average_finds_its_range_on_the_device():
    model = nn.Sequential(FakeQuantize(), FakeQuantize(relu=True), LearnedStepFakeQuantize())
    averaged = copy.deepcopy(model).eval()
    compiled = torch.compile(averaged, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), X.relu())
    model(X)
    for a, b in zip([*averaged.parameters(), *averaged.buffers()],
                    [*model.parameters(), *model.buffers()], strict=True):  # fmt: skip
        a.data.copy_(b)
    assert torch.equal(compiled(X), model.eval()(X)) and not torch.equal(compiled(X), X.relu())


@configs
def test_update_bn_of_an_average(config):
    model = prepared(config)
    averaged = AveragedModel(model)
    train(model, lambda: averaged.update_parameters(model))
    scales = [q.scale.detach().clone() for q in quantizers(averaged)
              if isinstance(q, LearnedStepFakeQuantize)]  # fmt: skip
    update_bn([X, 2 * X], averaged)
    (bn,) = [m.bn for m in averaged.modules() if isinstance(m, QuantConvBn2d)]
    assert bn.num_batches_tracked == 2
    learned = [q for q in quantizers(averaged) if isinstance(q, LearnedStepFakeQuantize)]
    assert all(torch.equal(q.scale, scale) for q, scale in zip(learned, scales, strict=True))
    convert(averaged.eval())

    frozen = AveragedModel(divqat.freeze_batchnorm(model))
    with pytest.raises(RuntimeError, match="frozen: wanted a BatchNorm with statistics"):
        update_bn([X], frozen)


@configs
def test_copies_and_pickles(config):
    model, file = train(prepared(config)), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    again = copy.deepcopy(loaded)
    x = 2 * X
    wanted = copy.deepcopy(model).eval()(x)
    names = [list(dict(named)) for named in (model.named_modules(), model.named_buffers())]
    for twin in (copy.deepcopy(model), loaded, again):
        assert twin.training and torch.equal(copy.deepcopy(twin).eval()(x), wanted)
        assert [list(dict(n)) for n in (twin.named_modules(), twin.named_buffers())] == names
        assert torch.equal(convert(twin)(x), convert(model)(x))
        assert len(twin._forward_pre_hooks) == len(model._forward_pre_hooks) == 1  # grouped
        twin.load_state_dict(model.state_dict())
        twin.load_state_dict(float_model().state_dict())  # strict
        assert torch.equal(twin.get_parameter("3.weight"), float_model()[3].weight)
    fresh = prepared(config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), wanted)
    # An average's state has no flags of its own: the tensors decide.
    fresh = AveragedModel(prepared(config))
    fresh.update_parameters(model)
    other = AveragedModel(prepared(config)).eval()
    other.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(other(x), wanted, rtol=0.1, atol=0.1)
    assert on_grids(other)


def test_a_pickle_keeps_the_size_of_its_groups():
    model, file = divqat.quantize.group_weights(prepared(), 0.5), io.BytesIO()
    torch.save(nn.Sequential(model), file)
    file.seek(0)
    (loaded,) = torch.load(file, weights_only=False)
    (hook,) = loaded._forward_pre_hooks.values()
    assert hook.__self__.bucket_mb == 0.5


PRESETS = {
    "x86": "x86",
    "tensorrt": "tensorrt",
    "qnnpack": "qnnpack",
    "4 bits": divqat.preset("x86", weight_bits=4, activation_bits=4),
}


@pytest.mark.parametrize("source", PRESETS)
@pytest.mark.parametrize(
    ("target", "assign"), [*((target, False) for target in PRESETS), ("tensorrt", True)]
)
def test_a_checkpoint_of_another_preset_is_put_on_the_grid_of_this_one(source, target, assign):
    model = train(prepared(PRESETS[source]))
    state = copy.deepcopy(model.state_dict())
    other = divqat.freeze_observers(prepared(PRESETS[target]))
    other.load_state_dict(model.state_dict(), assign=assign)
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value)  # nothing was written into it
    for a, b in zip(quantizers(other), quantizers(model), strict=True):
        assert torch.equal(a.running_min, b.running_min)
        low, high = min(float(b.running_min), 0), max(float(b.running_max), 0)
        levels = a.spec.quant_max - a.spec.quant_min
        width = 2 * max(-low, high) if a.spec.symmetric else high - low
        assert float(a.scale) == pytest.approx(width / levels, rel=1e-5)
        zero = 0 if a.spec.symmetric else round(a.spec.quant_min - low / float(a.scale))
        assert abs(int(a.zero_point) - zero) <= 1


def test_a_learned_scale_of_another_grid_is_refused():
    affine = LearnedStepFakeQuantize(QuantSpec(signed=False, learned=True))
    affine(X)
    with pytest.raises(ValueError, match=r"codes -128 to 127, got one .* for 0 to 255"):
        LearnedStepFakeQuantize(QuantSpec(learned=True)).load_state_dict(affine.state_dict())


@configs
@pytest.mark.parametrize(
    ("cast", "dtype"),
    [("to", torch.float16), ("to", torch.float64), ("type", torch.bfloat16)],
)
def test_a_model_that_is_cast_after_prepare(config, cast, dtype):
    model, plain = prepared(config), prepared(config)
    getattr(model, cast)(dtype)
    for quantizer in quantizers(model):
        assert quantizer.scale.dtype == torch.float32
    y = model(X.to(dtype))
    assert y.dtype == dtype and y.isfinite().all()
    y.float().sum().backward()
    assert model.get_parameter("3.weight").grad.dtype == dtype
    plain(X)
    wanted = plain.eval()(X).detach()
    for quantizer in quantizers(plain):
        quantizer.fake_quant_enabled = False
    # A value beside a tie of two codes may go to either: an error as large as quantization's own.
    noise = (plain(X).detach() - wanted).abs().max()
    tolerance = float(2 * noise + 32 * torch.finfo(dtype).eps * wanted.abs().max())
    assert tolerance < wanted.detach().abs().max()
    got = model.eval()(X.to(dtype)).float()
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    deployed = convert(model)(X)  # float32, as a runtime computes
    torch.testing.assert_close(deployed, wanted, rtol=0, atol=tolerance)


@configs
def test_a_model_from_the_meta_device_starts_as_new(config):
    with torch.device("meta"):
        model = divqat.prepare(float_model(), config, X.to("meta"))
    model = model.to_empty(device="cpu")
    for quantizer in quantizers(model):
        assert not quantizer.has_range()
    model.load_state_dict(float_model().state_dict())
    plain = prepared(config)
    assert torch.equal(model(X), plain(X))


@configs
def test_shared_memory_and_functional_calls(config):
    model = prepared(config).share_memory()
    twin = copy.deepcopy(model)
    state = dict(model.named_parameters())
    assert torch.equal(torch.func.functional_call(model, state, X), twin(X))
    assert torch.equal(model.eval()(X), twin.eval()(X))
    model.requires_grad_(False).train()(X)


def test_an_average_of_parameters_alone_says_that_it_stays_in_float():
    model = prepared()
    average = copy.deepcopy(model)
    train(model)
    with torch.no_grad():
        for mine, other in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(other, 0.5)
    with pytest.warns(UserWarning, match="leaves its input in float"):
        average.eval()(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model).eval()(X)
