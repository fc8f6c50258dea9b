"""Activations saved as codes: the same gradients from fewer bytes."""

import copy
import sys
from dataclasses import replace

import networks
import pytest
import torch
from testing import DTYPES, randn, same, tensor
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import divqat
from divqat.nn import FakeQuantize, LearnedStepFakeQuantize, QuantConv2d, QuantLinear, QuantSpec
from divqat.nn.spec import ACTIVATION
from divqat.ops import fake_quantize
from divqat.quantize import group_weights, preset, save_as_codes
from divqat.quantize.config import QuantConfig

module = sys.modules[save_as_codes.__wrapped__.__module__]  # its name is the function's
pytestmark = pytest.mark.usefixtures("one_thread")


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Takes the place of torch's in the block, to see what is kept."""

    def __init__(self, pack, unpack):
        Saved.codes, Saved.storages = {}, {}  # by address; kept, so that none comes twice

        def seeing(tensor):
            kept = pack(tensor)
            parts = [kept]
            if not isinstance(kept, torch.Tensor):
                Saved.codes[id(kept[0])] = kept[0]
                parts = [kept[0].codes, kept[0].scale, kept[0].zero]
            for part in parts:
                storage = part.untyped_storage()
                Saved.storages[storage._cdata] = storage
            return kept

        super().__init__(seeing, unpack)

    @staticmethod
    def bytes():
        return sum(storage.nbytes() for storage in Saved.storages.values())


@pytest.fixture
def saved(monkeypatch):
    monkeypatch.setattr(module, "saved_tensors_hooks", Saved)
    yield Saved
    Saved.codes, Saved.storages = {}, {}


def gradients(model, x, autocast=False):
    """Of two forwards, of which the second moves the ranges before the first's backward."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [model(x), model(3 * x)]
    for i, y in enumerate(outputs):
        y.float().backward(randn(*y.shape, seed=i))
    return [*outputs, *(p.grad for p in model.parameters())]


def assert_same_gradients(model, x, **options):
    other = copy.deepcopy(model)
    with save_as_codes(model):
        got = gradients(model, x, **options)
    same(got, gradients(other, x, **options))
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, FakeQuantize))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_comes_back(dtype):
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        bits, signed, place, size = torch.rand(4, generator=generator).tolist()
        spec = QuantSpec(bits=2 + int(7 * bits), signed=signed < 0.5)
        low, high = spec.quant_min, spec.quant_max
        zero_point = torch.tensor(low + round(place * (high - low)), dtype=torch.int32)
        largest = 2.0 if dtype == torch.float16 else 30.0
        scale = tensor(10.0 ** (size * (largest + 6) - 6)).clamp(min=1.2e-7)
        x = ((torch.arange(low - 1, high + 2) - zero_point) * scale.double()).to(dtype)
        y = fake_quantize(x, scale, zero_point, low, high)
        codes = module._Codes(y, scale, zero_point, low, high - low)
        assert codes.codes.dtype == torch.uint8 and codes.codes.numel() == y.numel()
        same([codes.values()], [y])
        for bad in (torch.nan, torch.inf, -torch.inf):
            y[1] = bad
            codes = module._Codes(y, scale, zero_point, low, high - low)
            assert codes.values().isnan().all()


def test_every_level_of_eight_bits_comes_back_from_the_eight_digits_of_bfloat16():
    """Between two levels that round to 1 and to the number below, the other may be nearer to 1."""
    zero_point = torch.tensor(0, dtype=torch.int32)
    for scale in torch.linspace(2**-8, 2**-7, 300):
        x = torch.arange(256) * scale
        y = fake_quantize(x, scale, zero_point, 0, 255).bfloat16()
        same([module._Codes(y, scale, zero_point, 0, 255).values()], [y])


@pytest.mark.parametrize("mode", ["exact", "delayed"])
@pytest.mark.parametrize("name", [*networks.HAND_WRITTEN, "resnet20", "lenet"])
def test_gradients_are_the_same(name, mode, saved):
    config = replace(preset("x86"), mode=mode)
    model = divqat.prepare(networks.build(name), config, networks.images(2))
    x = networks.images()
    if name != "in_place":  # which views what is pooled
        x = x.to(memory_format=torch.channels_last)
    model(x)
    assert_same_gradients(model, x)
    assert len(saved.codes) >= 3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("preset_name", ["x86", "tensorrt"])
def test_presets(preset_name, bits, saved):
    config = preset(preset_name, activation_bits=bits)
    model = divqat.prepare(networks.build("residual"), config, networks.images(2))
    assert_same_gradients(model, networks.images())
    assert_same_gradients(model.eval(), networks.images())
    assert saved.codes


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, saved):
    model = net().to(dtype)
    for part in model.modules():  # ranges stay in float32
        if isinstance(part, FakeQuantize):
            part.float()
    assert_same_gradients(model, randn(4, 3, 6, 6, dtype=dtype))
    assert len(saved.codes) == 4
    assert {codes.dtype for codes in saved.codes.values()} == {dtype}


def test_autocast(saved):
    """What is bfloat16 already is saved as codes; the image, which autocast casts, as it is."""
    model = divqat.prepare(networks.build("residual"), "x86", networks.images(2))
    assert_same_gradients(model, networks.images(), autocast=True)
    assert {codes.dtype for codes in saved.codes.values()} == {torch.bfloat16}


def test_learned_scales(saved):
    for symmetric in (True, False):
        spec = replace(ACTIVATION, learned=True, symmetric=symmetric)
        model = divqat.prepare(
            networks.build("residual"), QuantConfig(activation=spec), networks.images(2)
        )
        assert any(isinstance(m, LearnedStepFakeQuantize) for m in model.modules())
        model(networks.images())
        assert_same_gradients(model, networks.images())
        assert len(saved.codes) >= 6  # of two forwards


def net():
    return nn.Sequential(QuantConv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), QuantLinear(64, 5))


def test_bytes(saved, monkeypatch):
    """The inputs of the two layers take a byte per element and 8 for scale and zero; the rest,
    a mask of a bit (the image needs none), weights and ReLU's output, what it took."""
    model, x = net(), randn(16, 3, 6, 6)
    with save_as_codes(model):
        y = model(x)
        packed = saved.bytes()
    monkeypatch.setattr(module._Saver, "pack", lambda self, tensor: tensor)
    with save_as_codes(model):
        y = model(x)
        plain = saved.bytes()
    sizes = [16 * 3 * 6 * 6, 16 * 64]
    assert plain - packed == sum(3 * size - 8 for size in sizes)
    mask, weights, relu = sizes[1] // 8, 4 * 3 * 9 + 5 * 64, 16 * 64
    assert packed == sum(size + 8 for size in sizes) + mask + 4 * (weights + relu)
    del y


def test_two_layers_share_the_codes_and_views_of_them(saved):
    quantizer = FakeQuantize()
    layers = nn.ModuleList([QuantLinear(12, 5, input_spec=None) for _ in range(3)])
    x = randn(4, 24).requires_grad_()

    def forward(owner, x):
        y = quantizer(x)
        parts = y[:, :12], y.view(8, 12), y[:, 12:]
        outputs = (layer(part) for layer, part in zip(layers, parts, strict=True))
        return sum(output.square().sum() for output in outputs)

    model = networks.Net(forward, quantizer=quantizer, layers=layers)
    wanted = torch.autograd.grad(model(x), [x, *layers.parameters()])
    quantizer.disable_observer()
    with save_as_codes(model):
        loss = model(x)
    assert len(saved.codes) == 1
    same(torch.autograd.grad(loss, [x, *layers.parameters()]), wanted)


def test_what_is_not_on_the_grid_any_more_is_saved_as_it_is(saved):
    """Changed in place, replaced by another hook, or never put there."""

    def forward(owner, x):
        y = owner.quantizer(x)
        if owner.quantizer.training:
            y = y.add_(0.3) if owner.in_place else y
        return owner.layer(y)

    model = networks.Net(
        forward, quantizer=FakeQuantize(), layer=QuantLinear(6, 5, input_spec=None)
    )
    x = randn(4, 6).requires_grad_()
    for model.in_place in (True, False):
        if not model.in_place:
            model.quantizer.register_forward_hook(lambda module, args, y: y + 0.3)
        assert_same_gradients(model, x)
        assert not saved.codes
    model.quantizer._forward_hooks.clear()
    assert_same_gradients(model, x)
    assert saved.codes
    model.quantizer.fake_quant_enabled = False
    assert_same_gradients(model, x)
    assert not saved.codes


def test_nothing_is_kept_alive():
    model, freed = net(), []
    model(randn(4, 3, 6, 6))
    for layer in (model[0], model[3]):
        compute = layer.compute
        layer.compute = lambda x, w, b, f=compute: (
            freed.append(StorageWeakRef(x.untyped_storage())),
            f(x, w, b),
        )[1]
    made, init = [], module._Codes.__init__

    def watch(codes, *args):
        init(codes, *args)
        made.append(StorageWeakRef(codes.codes.untyped_storage()))

    with pytest.MonkeyPatch.context() as patch, save_as_codes(model):
        patch.setattr(module._Codes, "__init__", watch)
        y = model(randn(4, 3, 6, 6))
        assert [ref.expired() for ref in freed] == [True, True]
        assert [ref.expired() for ref in made] == [False, False]
        y.sum().backward()
        assert [ref.expired() for ref in made] == [True, True]
        saver = next(iter(model._forward_pre_hooks.values())).__self__
        for _ in range(3):
            model(randn(4, 3, 6, 6))
            assert len(saver.outputs) == 2 and not saver.qparams


def test_nan_is_not_lost():
    model = net()
    x = randn(4, 3, 6, 6)
    model(x)
    x[0, 0, 0, 0] = torch.nan
    with save_as_codes(model):
        y = model(x)
    # of the images without NaN: theirs alone would give finite gradients
    y[1:].sum().backward()
    assert model[0].weight.grad.isnan().any()


def test_double_backward():
    model, x = net(), randn(4, 3, 6, 6).requires_grad_()
    model[1] = nn.Tanh()
    model(x)
    other = copy.deepcopy(model)

    def second(model):
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, model[0].weight, model[3].weight])

    with save_as_codes(model):
        got = second(model)
    same(got, second(other))


def test_a_block_that_fails_leaves_no_hooks():
    model = group_weights(net())
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(RuntimeError), save_as_codes(model):
        model(randn(4, 3, 7, 7))
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    y = model(randn(4, 3, 6, 6))
    assert isinstance(y.grad_fn, torch.autograd.graph.Node)


@pytest.mark.slow
def test_compiled_models():
    model = net()
    model(randn(4, 3, 6, 6))
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    in_place = net()
    in_place.compile()
    for refused in (compiled, nn.Sequential(in_place)):
        message = pytest.raises(ValueError, match="model: wanted one that is not compiled")
        with message, save_as_codes(refused):
            pass
    with save_as_codes(model):  # its forward goes on to be what was compiled
        y, wanted = compiled(randn(4, 3, 6, 6)), other(randn(4, 3, 6, 6))
        F.mse_loss(y, torch.zeros_like(y)).backward()
        F.mse_loss(wanted, torch.zeros_like(wanted)).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch._dynamo.reset()
