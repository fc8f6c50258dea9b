"""prepare: every network really is quantized, trains, and stays close to the float one."""

import copy

import pytest
import torch
from networks import HAND_WRITTEN, build, conv, images, settle
from torch import nn
from torch.nn import functional as F

import divqat
from divqat import models
from divqat.nn import FakeQuantize
from divqat.nn._layer import QuantLayer
from divqat.nn.spec import WEIGHT

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
NAMES = [*models.names(), *HAND_WRITTEN]
each_network = pytest.mark.parametrize("name", NAMES)


pytestmark = pytest.mark.usefixtures("one_thread")


def layers(model):
    return [module for module in model.modules() if isinstance(module, LAYERS)]


def cross_entropy_step(model, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    F.cross_entropy(model(images()), torch.arange(8) % 5).backward()
    optimizer.step()


@each_network
def test_every_layer_is_quantized_and_the_model_left_alone(name):
    model = build(name).eval()
    before = copy.deepcopy(model.state_dict())
    types, x = [type(module) for module in model.modules()], images()
    prepared = divqat.prepare(model, "x86", x)
    assert prepared.training and not model.training
    assert len(layers(prepared)) == len(layers(model))
    assert all(isinstance(layer, QuantLayer) for layer in layers(prepared))
    carried = copy.deepcopy(prepared.state_dict())
    prepared.load_state_dict(before, strict=True)  # changes nothing: all was carried over
    for key, value in prepared.state_dict().items():
        assert not torch.is_tensor(value) or torch.equal(value, carried[key]), key

    settle(prepared, 2)
    cross_entropy_step(prepared)
    assert [type(module) for module in model.modules()] == types
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(module.training for module in model.modules())
    assert torch.equal(x, images())


def distinct(x):
    return len(x.detach().unique())


@each_network
@pytest.mark.parametrize("bits", [8, 3])
def test_activations_lie_on_their_grids(name, bits):
    config = divqat.preset("x86", activation_bits=bits)
    prepared = divqat.prepare(build(name), config, images())
    settle(prepared, 1)
    quantizers, read = [], []
    for key, module in prepared.named_modules():
        if isinstance(module, FakeQuantize):
            limit = 2**module.spec.bits
            module.register_forward_hook(
                lambda _m, _a, y, limit=limit: quantizers.append((distinct(y), limit))
            )
        if isinstance(module, QuantLayer):
            module.register_forward_pre_hook(
                lambda _m, args, key=key: read.append((key, distinct(args[0])))
            )
    for mode in (True, False):
        prepared.train(mode)(images(32, seed=7))
    assert quantizers and all(n <= limit for n, limit in quantizers)
    assert max(n for n, _ in quantizers) > 2 ** (bits - 1)  # and uses it
    # What each layer reads, be it through pooling or flattening, is on a grid.
    assert {key for key, _ in read} == {
        key for key, module in prepared.named_modules() if isinstance(module, QuantLayer)
    }
    fine = {key for key, n in read if n > 2**bits}
    assert fine == ({read[0][0]} if bits < 8 else set())  # the network's input keeps 8 bits
    assert all(n <= 256 for _, n in read)


@each_network
def test_forward_uses_integer_weights(name, monkeypatch):
    """The first classic mistake: a prepared model that computes in float."""
    prepared = settle(divqat.prepare(build(name), "x86", images()), 2)
    seen = []

    def spy(function, axis):
        def call(x, weight, *args, **kwargs):
            seen.append(weight.detach().movedim(axis, 0))
            return function(x, weight, *args, **kwargs)

        monkeypatch.setattr(F, function.__name__, call)

    spy(F.conv2d, 0)
    spy(F.linear, 0)
    spy(F.conv_transpose2d, 1)
    for mode in (True, False):
        seen.clear()
        prepared.train(mode)(images())
        assert len(seen) >= len(layers(prepared))
        for weight in seen:
            rows = weight.flatten(1).double()
            codes = rows / rows.abs().amax(1, keepdim=True) * WEIGHT.quant_max
            assert rows.abs().amax(1).min() > 0
            assert (codes - codes.round()).abs().max() < 1e-3


@each_network
def test_one_step_moves_every_weight(name):
    """The second classic mistake: an optimizer that trains weights nobody uses."""
    prepared = divqat.prepare(build(name), "x86", images())
    before = {key: value.detach().clone() for key, value in prepared.named_parameters()}
    first = prepared(images()).detach()
    cross_entropy_step(prepared)
    weights = [key for key in before if key.endswith("weight")]
    assert len(weights) >= len(layers(prepared))
    for key in weights:
        assert not torch.equal(prepared.get_parameter(key), before[key]), key
    assert not torch.equal(prepared(images()), first)


@each_network
def test_loads_the_float_checkpoint_and_stays_close_to_it(name):
    model = settle(build(name))
    prepared = divqat.prepare(build(name, seed=1), "x86", images())
    state = model.state_dict()
    keys = list(state)
    prepared.load_state_dict(state, strict=True)
    assert list(state) == keys  # renaming happens in a copy

    for batch in range(10):  # activation ranges; BatchNorm as it was loaded
        divqat.freeze_batchnorm(prepared).train()
        for module in prepared.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        with torch.no_grad():
            prepared(images(16, seed=100 + batch))
    x = images(64, seed=500)
    with torch.no_grad():
        expected, actual = model.eval()(x), prepared.eval()(x)
    error = (actual - expected).square().mean().sqrt() / expected.std()
    assert 1e-5 < error < 0.1  # close, and not the float model itself
    assert (actual.argmax(1) == expected.argmax(1)).float().mean() > 0.9


@each_network
def test_quantized_checkpoint_round_trips(name, tmp_path):
    prepared = settle(divqat.prepare(build(name), "x86", images()), 3)
    divqat.freeze_observers(prepared)
    torch.save(prepared.state_dict(), tmp_path / "model.pt")
    other = divqat.prepare(build(name, seed=1), "x86", images())
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert torch.equal(other.eval()(images(seed=3)), prepared.eval()(images(seed=3)))
    assert all(not m.observer_enabled for m in other.modules() if isinstance(m, FakeQuantize))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "lenet"])
def test_compiles_without_a_graph_break_to_the_same_values(name):
    eager = divqat.prepare(build(name), "x86", images())
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = images(seed=step)
        a, b = eager(x), compiled(x)
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        a.square().mean().backward()
        b.square().mean().backward()
    for (key, p), q in zip(eager.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=key)
    for (key, p), q in zip(eager.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6, msg=key)


def test_a_copy_loads_float_checkpoints_too():
    model = settle(build("residual"))
    prepared = divqat.prepare(build("residual"), "x86", images())
    clone = copy.deepcopy(prepared)
    clone.load_state_dict(model.state_dict(), strict=True)  # the renaming travels along
    assert torch.equal(clone.state_dict()["conv1.weight"], model.state_dict()["conv1.weight"])
    assert not torch.equal(
        prepared.state_dict()["bn1.running_mean"], clone.state_dict()["bn1.running_mean"]
    )


def test_a_relu_that_only_a_quantizer_reads_is_applied_by_it():
    model = build("residual")
    x = images()
    prepared = divqat.prepare(model, "x86", x)
    assert not [n for n in prepared.graph.nodes if n.target in (F.relu, torch.relu)]
    fused = [m for m in prepared.modules() if isinstance(m, FakeQuantize) and m.relu]
    assert len(fused) == 2

    def outputs():
        torch.manual_seed(0)
        y = prepared.train()(x)
        grads = torch.autograd.grad(y.square().sum(), [*prepared.parameters()])
        return [y, *grads, *(m.running_max.clone() for m in fused)]

    state = copy.deepcopy(prepared.state_dict())
    together = outputs()
    # the same network with the ReLU as an operation of its own
    prepared.load_state_dict(state)
    for quantizer in fused:
        quantizer.relu = quantizer.inplace = False  # ReLU's own backward needs its result
        quantizer.register_forward_pre_hook(lambda _, args: (F.relu(args[0]),))
    for a, b in zip(together, outputs(), strict=True):
        assert torch.equal(a, b)


def test_a_relu_whose_value_is_read_elsewhere_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = nn.Linear(3, 3), nn.ReLU()

        def forward(self, x):
            y = self.relu(self.linear(x.mean((2, 3))))
            return self.linear(y), y

    net = Net()
    prepared = divqat.prepare(net, "x86", images())
    assert isinstance(prepared.relu, nn.ReLU)
    assert not any(m.relu for m in prepared.modules() if isinstance(m, FakeQuantize))
    assert (prepared(images())[1] >= 0).all()


@pytest.mark.parametrize(
    "relu",
    [
        nn.ReLU(inplace=True),
        F.relu_,
        torch.relu_,
        lambda y: F.relu(y, inplace=True),
        lambda y: F.relu(y, True),
        lambda y: y.relu_(),
    ],
    ids=["nn.ReLU", "F.relu_", "torch.relu_", "inplace=True", "True", "method"],
)
def test_a_relu_in_place_stays_where_another_reads_what_it_has_written(relu):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 5)
            self.relu = relu

        def forward(self, x):
            y = self.conv1(x)
            z = self.conv2(self.relu(y))
            return self.head((y + z).mean((2, 3)))

    torch.manual_seed(0)
    model = Net().eval()
    x = images(16)
    prepared = divqat.prepare(model, "x86", x)
    prepared(x)
    with torch.no_grad():
        expected, actual = model(x), prepared.eval()(x)
    assert (actual - expected).abs().max() < 0.03 * (expected.max() - expected.min())
