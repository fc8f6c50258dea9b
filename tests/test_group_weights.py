"""Weights quantized in groups against each layer quantizing its own."""

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import networks
import pytest
import torch
from test_distributed import spawn
from testing import randn, same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import divqat
from divqat.nn import QuantConv2d, QuantConvBn2d, QuantLinear, QuantSpec
from divqat.nn._layer import QuantLayer
from divqat.quantize import convert, freeze_batchnorm, group_weights, preset, ungroup_weights

pytestmark = pytest.mark.usefixtures("one_thread")
CLIPPING = QuantSpec(per_channel=True)  # codes from -128: its backward is not the identity


class Calls(TorchDispatchMode):
    """How many weights each call of fake_quantize_weights had."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.divqat.fake_quantize_weights.default:
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, QuantLayer)]


def idle(model):
    return all(layer._group is layer._grouped_weight is None for layer in layers_of(model))


def prepared(name, config="x86"):
    model = divqat.prepare(networks.build(name), config, networks.images(2))
    with torch.no_grad():
        model(networks.images(8))
    return model


def swapped(name="residual", config="x86"):
    with pytest.warns(UserWarning, match="not traced"):
        return divqat.prepare(networks.build(name), config)


def step(model, images=None):
    """Output and gradients of a step, and the sizes of the calls that it made."""
    model.zero_grad()
    with Calls() as calls:
        y = model(networks.images() if images is None else images)
        if y.requires_grad:
            (y * randn(*y.shape, seed=5)).sum().backward()
    return y, [p.grad for p in model.parameters()], calls.sizes


def assert_as_per_layer(model, bucket_mb=25.0):
    """Two steps of the model with and without groups are the same; the sizes of the calls."""
    alone, grouped = ungroup_weights(copy.deepcopy(model)), copy.deepcopy(model)
    group_weights(grouped, bucket_mb)
    sizes = []
    for _ in range(2):
        (y, grads, each), (wanted, wanted_grads, ones) = step(grouped), step(alone)
        assert set(ones) <= {1} and sum(each) == len(ones)
        same([y], [wanted])
        assert [g is None for g in grads] == [g is None for g in wanted_grads]
        same([g for g in grads if g is not None], [g for g in wanted_grads if g is not None])
        with torch.no_grad():
            for net in (alone, grouped):
                for p in net.parameters():
                    if p.grad is not None:
                        p -= 0.01 * p.grad
        assert idle(grouped)
        sizes.append(each)
    assert sizes[0] == sizes[1]
    return sizes[0]


CONFIGS = {
    "x86": preset("x86"),
    "4 bits": preset("x86", weight_bits=4),
    "qnnpack": preset("qnnpack"),
    "clipping": replace(preset("x86"), weight=CLIPPING),
}


@pytest.mark.parametrize("mode", ["train", "frozen", "eval"])
@pytest.mark.parametrize("config", CONFIGS)
def test_equals_a_call_per_layer(config, mode):
    model = prepared("concat_hardswish", CONFIGS[config])
    if mode == "frozen":
        freeze_batchnorm(model)
    model.train(mode != "eval")
    # first and last layer on a grid of their own
    wanted = [2, 3] if config == "4 bits" else [5]
    assert sorted(assert_as_per_layer(model)) == wanted


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("shared", [3, 1]), ("up_and_down", [1, 3]), ("in_place", [3]), ("resnet20", [22])],
)
def test_networks(name, sizes):
    """A layer called twice quantizes itself the second time; another axis is another call."""
    assert sorted(assert_as_per_layer(prepared(name))) == sorted(sizes)


def test_prepare_groups_what_it_traces_and_a_copy_stays_grouped():
    model = prepared("resnet20")
    assert step(model)[2] == step(copy.deepcopy(model))[2] == [22]
    assert step(copy.deepcopy(nn.Sequential(model)))[2] == [22]
    assert model.state_dict().keys() == ungroup_weights(copy.deepcopy(model)).state_dict().keys()


def test_module_swap_copies_and_pickles():
    model = swapped()
    assert step(model)[2] == [1, 1, 1]
    assert assert_as_per_layer(model) == [3]
    model = group_weights(nn.Sequential(conv_net()))
    for net in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert step(net, randn(2, 3, 8, 8))[2] == [3] and idle(net)


def conv_net():
    """A picklable net whose second layer folds a BatchNorm."""
    return nn.Sequential(
        QuantConv2d(3, 4, 3, weight_spec=CLIPPING), nn.ReLU(),
        QuantConvBn2d(4, 4, 3, weight_spec=CLIPPING), nn.Flatten(),
        QuantLinear(64, 5, weight_spec=CLIPPING),
    )  # fmt: skip


def test_buckets_are_filled_from_the_last_layer():
    model = nn.Sequential(*[QuantLinear(64, 64) for _ in range(5)])  # 16 KiB each
    for megabytes, sizes in ((1.0, [5]), (2 / 64, [1, 2, 2]), (1e-9, [1] * 5)):
        assert step(group_weights(model, megabytes), randn(2, 64))[2] == sizes
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="bucket_mb: wanted more than 0, got"):
            group_weights(model, wrong)


def test_buckets_of_a_traced_model_follow_its_graph():
    def backwards(net, x):
        return net.first(net.second(x))

    net = networks.Net(backwards, first=nn.Linear(8, 8), second=nn.Linear(8, 8))
    model = group_weights(divqat.prepare(net, "x86", randn(2, 8)), 1e-9)
    buckets = next(iter(model._forward_pre_hooks.values())).__self__.buckets
    assert [bucket.layers for bucket in buckets] == [[model.second], [model.first]]


@pytest.mark.parametrize("spec", [QuantSpec(per_channel=True, narrow_range=True), CLIPPING])
def test_a_layer_that_is_not_called_gets_no_gradient(spec):
    def forward(net, x):
        return net.last(net.first(x))

    parts = {name: QuantLinear(6, 6, weight_spec=spec) for name in ("first", "unused", "last")}
    model = group_weights(networks.Net(forward, **parts))
    _, _, sizes = step(model, randn(4, 6))
    assert sizes == [3] and model.unused.weight.grad is None and idle(model)
    assert model.first.weight.grad is not None


def test_frozen_weights_need_no_gradient():
    model = conv_net()
    model[0].requires_grad_(False)
    seen = {}
    for i in (0, 4):
        compute = model[i].compute
        model[i].compute = lambda x, w, b, i=i, f=compute: (seen.update({i: w}), f(x, w, b))[1]
    assert sorted(step(group_weights(model), randn(2, 3, 8, 8))[2]) == [1, 2]
    assert not seen[0].requires_grad and seen[4].requires_grad


def test_layers_that_quantize_for_themselves():
    class Own(QuantLinear):
        def quantize_weight(self, weight):
            return weight * 2

    learned = QuantSpec(per_channel=True, learned=True)
    model = nn.Sequential(
        Own(6, 6), QuantLinear(6, 6, weight_spec=learned), QuantLinear(6, 6), QuantLinear(6, 6)
    )
    model.add_module("bn", nn.Sequential(nn.Unflatten(1, (6, 1, 1))))
    model.bn.append(QuantConvBn2d(6, 6, 1, weight_spec=learned))
    assert assert_as_per_layer_with(model, randn(4, 6)) == [2]
    # a new grid holds from the next forward on
    model[3].set_weight_spec(QuantSpec(bits=4, per_channel=True, narrow_range=True))
    assert assert_as_per_layer_with(model, randn(4, 6)) == [1, 1]
    assert len((model[3].quantized_weight()[0][0] / model[3].weight_qparams()[0]).unique()) <= 15


def assert_as_per_layer_with(model, x):
    alone, grouped = ungroup_weights(copy.deepcopy(model)), group_weights(copy.deepcopy(model))
    (y, grads, sizes), (wanted, wanted_grads, _) = step(grouped, x), step(alone, x)
    same([y, *grads], [wanted, *wanted_grads])
    group_weights(model)
    return sizes


def test_a_forward_that_fails_leaves_nothing():
    model = group_weights(conv_net())
    x = randn(2, 3, 8, 8)
    model(x)
    for shape in ((2, 4, 8, 8), (2, 3, 9, 9)):  # what the first layer, and the last, cannot take
        with pytest.raises(RuntimeError):
            model(randn(*shape))
        assert idle(model)
    with torch.no_grad():
        model[4].weight.mul_(-3)
    alone = ungroup_weights(copy.deepcopy(model)).eval()
    assert torch.equal(model.eval()(x), alone(x))
    assert torch.equal(model[4](randn(2, 64)), alone[4](randn(2, 64)))


def test_nothing_is_kept_alive():
    model, alive = group_weights(conv_net()), []
    for layer in layers_of(model):
        compute = layer.compute
        layer.compute = lambda x, w, b, f=compute: (alive.append(weakref.ref(w)), f(x, w, b))[1]
    gc.disable()  # without help from the collector
    try:
        y = model(randn(2, 3, 8, 8))
        assert len(alive) == 3
        y.sum().backward()
        del y
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


def test_no_grad_and_convert():
    model = prepared("concat_hardswish")
    with torch.no_grad():
        y, _, sizes = step(model.eval())
    assert sizes == [5] and not y.requires_grad and idle(model)
    converted, alone = convert(model), convert(ungroup_weights(copy.deepcopy(model)))
    assert not converted._forward_pre_hooks and not converted._forward_hooks
    assert not copy.deepcopy(converted)._forward_pre_hooks
    assert torch.equal(converted(networks.images()), alone(networks.images()))
    assert model._forward_pre_hooks  # the original is left as it was


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiles_without_a_break(mode):
    model = group_weights(conv_net())
    with torch.no_grad():
        model(randn(4, 3, 8, 8))
    model.train(mode == "train")
    other, x = copy.deepcopy(model), randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        y, wanted = compiled(x), other(x)
        y.square().sum().backward()
        wanted.square().sum().backward()
        torch.testing.assert_close(y, wanted)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        assert idle(model)
    torch._dynamo.reset()


def timeline(bucket_mb):
    """In what order layers start their backward (numbers) and weights get their gradients."""
    model, events = nn.Sequential(*[QuantConvBn2d(4, 4, 1) for _ in range(4)]), []
    x = randn(2, 4, 3, 3).requires_grad_()
    model(x)
    for i, layer in enumerate(model):
        layer.register_full_backward_pre_hook(lambda *_, i=i: events.append(i))
        layer.weight.register_post_accumulate_grad_hook(lambda _, i=i: events.append(f"w{i}"))
    group_weights(model, bucket_mb)(x).sum().backward()
    return events


def test_a_bucket_gets_its_gradients_before_the_earlier_layers_run_backward():
    """Which is when DDP can send them. A weight has 64 bytes."""
    last = timeline(2 * 64 / 2**20)
    assert last[:2] == [3, 2] and set(last[2:4]) == {"w3", "w2"}
    assert last[4:6] == [1, 0] and set(last[6:]) == {"w1", "w0"}
    whole = timeline(25.0)
    assert whole[:4] == [3, 2, 1, 0] and set(whole[4:]) == {"w0", "w1", "w2", "w3"}


def in_parallel(rank, size, bucket_mb):
    """Gradients of three steps, all of which DistributedDataParallel has averaged."""
    torch.manual_seed(0)
    model = conv_net()
    model(randn(2, 3, 8, 8))
    group_weights(model, bucket_mb) if bucket_mb else ungroup_weights(model)
    net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.1), []
    for i in range(3):
        optimizer.zero_grad()
        net(randn(4, 3, 8, 8, seed=10 * i + rank)).square().mean().backward()
        steps.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return steps


def both_ways(rank, size):
    return [in_parallel(rank, size, bucket_mb) for bucket_mb in (None, 25.0, 1e-3)]


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    results = spawn(2, tmp_path / "group", both_ways)
    alone = results[0][0]
    for process in results:
        for way in process:
            for grads, wanted in zip(way, alone, strict=True):
                same(grads, wanted)


def test_a_first_layer_without_gradients_takes_none_from_the_others():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            with torch.no_grad():
                y = self.stem(x).mean((2, 3))
            return self.head(y)

    model = divqat.prepare(Frozen(), "x86", torch.ones(2, 3, 6, 6))
    model(torch.ones(2, 3, 6, 6)).sum().backward()
    assert model.stem.weight.grad is None and model.head.weight.grad is not None
