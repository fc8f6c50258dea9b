"""Fake-quantization over its input: the same bits in less memory, where nothing is lost."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from networks import HAND_WRITTEN, Net, build, conv, images, settle
from testing import DTYPES, randn, same
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import divqat
from divqat import ops
from divqat.nn import FakeQuantize
from divqat.quantize import QuantConfig, freeze_batchnorm, save_as_codes
from divqat.train.memory import saved_bytes

INF = float("inf")
MODES = ("exact", "delayed", "frozen")


def state(n=()):
    return [torch.full(n, INF), torch.full(n, -INF), torch.ones(n), torch.zeros(n).int()]


def layouts(dtype):
    """Dense ones, of whole vectors and not; the last is large and does not begin on 16 bytes."""
    for shape in ((3, 5, 7, 3), (0, 3, 2, 2)):
        x = randn(*shape, dtype=dtype).mul_(3)
        yield from (x, x.to(memory_format=torch.channels_last), x.permute(2, 0, 3, 1))
    x = randn(3, 400, dtype=dtype)
    x[0, 7], x[1, 200], x[2, -1] = torch.nan, INF, -INF
    yield x
    yield randn(33003, dtype=dtype)[3:].view(11000, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_a_copy(dtype, backend):
    for x, ch_axis, relu in itertools.product(layouts(dtype), (None, -1), (False, True)):
        n = () if ch_axis is None else (x.shape[ch_axis],)
        results = []
        for inplace in (False, True):
            buffers, found = state(n), []
            for step, mode in enumerate(MODES):
                leaf = x.clone().requires_grad_()
                given = leaf * (1 + 0.3 * step)
                y = ops.fake_quantize_observed(
                    given, *buffers, 0, 255, ch_axis, mode=mode, relu=relu, inplace=inplace
                )
                assert (y is given) == inplace and (given._version > 0) == inplace
                (grad,) = torch.autograd.grad(y, leaf, torch.full_like(y, 0.7))
                found += [y.detach(), grad, *[b.clone() for b in buffers]]
            results.append(found)
        same(*results)


def test_what_cannot_be_written_over_is_refused_and_left_alone(backend):
    leaf = randn(4, 6).requires_grad_()
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match="x: wanted a result to overwrite, got a leaf"):
        ops.fake_quantize_observed(leaf, *state(), 0, 255, inplace=True)
    for x in (leaf[:, ::2], leaf[:1].expand(4, 6)):
        words = rf"x: wanted dense memory to write over, got \[4, {x.shape[1]}\] with strides"
        with pytest.raises(ValueError, match=words):
            ops.fake_quantize_observed(x, *state(), 0, 255, inplace=True)
    assert torch.equal(leaf, before)
    with torch.no_grad():  # as an optimizer may
        ops.fake_quantize_observed(leaf, *state(), 0, 255, inplace=True)
    assert not torch.equal(leaf, before)


def test_the_ops_check_for_themselves(backend):
    """Memory, that is: a kernel goes through it from end to end."""
    x = randn(4, 6)[:1].expand(4, 6)
    rest = (0, 255, None, 0.1, False, "exact", False)
    with pytest.raises((ValueError, RuntimeError), match=r"dense memory|single memory location"):
        torch.ops.divqat.fake_quantize_observed_inplace(x, *state(), *rest)


def test_a_backward_that_needs_the_input_raises():
    x = randn(8).requires_grad_()
    y = ops.fake_quantize_observed(x.exp(), *state(), 0, 255, inplace=True)  # exp keeps its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_batchnorm_does_not_need_its_output(training):
    x, bn = randn(4, 3, 5, 5).requires_grad_(), nn.BatchNorm2d(3).train(training)
    grads = []
    for inplace in (False, True):
        y = ops.fake_quantize_observed(bn(x), *state(), 0, 255, relu=True, inplace=inplace)
        grads.append(torch.autograd.grad(y.square().sum(), [x, *bn.parameters()]))
    same(*grads)


def pair(name, **options):
    """A network prepared with and without, and the quantizers that write over their input."""
    made = [
        divqat.prepare(build(name), QuantConfig(inplace=inplace, **options), images(2))
        for inplace in (False, True)
    ]
    assert not overwriting(made[0])
    return *made, overwriting(made[1])


def overwriting(model):
    return {n for n, m in model.named_modules() if isinstance(m, FakeQuantize) and m.inplace}


def steps(model, forward=None):
    """Losses, gradients and the state after two steps, the second in eval mode."""
    found = []
    for training in (True, False):
        model.train(training).zero_grad()
        loss = F.cross_entropy((forward or model)(images(4)), torch.arange(4))
        loss.backward()
        found += [loss.detach(), *[p.grad.clone() for p in model.parameters()]]
    return found + [t.clone() for t in model.state_dict().values() if torch.is_tensor(t)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode", "count"),
    [
        ("resnet20", "exact", 21),  # 19 BatchNorms and two of shortcuts; of 32 quantizers
        ("resnet20", "delayed", 21),
        *((name, "exact", None) for name in ("vgg_small", "mobilenetv2_small", *HAND_WRITTEN)),
    ],
)
def test_a_step_of_a_network_has_the_same_bits(name, mode, count, one_thread):
    without, over, quantizers = pair(name, mode=mode)
    assert count in (None, len(quantizers))
    if mode == "delayed":
        for model in (without, over):
            settle(model, 1)  # the first batch is exact
    same(steps(over), steps(without))


def test_what_is_read_twice_is_not_written_over():
    def forward(net, x):
        a = net.bn1(net.conv1(x))  # by two quantizers, each with a ReLU of its own
        b = net.bn2(net.conv2(F.relu(a)) + net.conv3(torch.relu(a)))  # by one, which two read
        c = net.bn3(net.conv4(b) + b)  # by one and the caller
        return net.head(c.mean((2, 3))), c

    parts = {f"conv{i}": conv(3 if i == 1 else 4, 4) for i in (1, 2, 3, 4)}
    parts |= {f"bn{i}": nn.BatchNorm2d(4) for i in (1, 2, 3)}
    model = divqat.prepare(Net(forward, **parts, head=nn.Linear(4, 5)), "x86", images(2))
    assert {"fake_quantize.relu", "fake_quantize.relu_1", "fake_quantize.bn3"} <= {
        name for name, m in model.named_modules() if isinstance(m, FakeQuantize)
    }
    # conv1 and conv4 include bn1 and, for the quantizer and the caller, bn3's input
    assert overwriting(model) == {"fake_quantize.conv1", "fake_quantize.bn2"}


def test_options_turn_it_off():
    assert not overwriting(divqat.prepare(build("residual"), QuantConfig(inplace=False), images()))
    with pytest.warns(UserWarning, match="was not traced"):  # nobody knows who reads what
        assert not overwriting(divqat.prepare(build("residual")))
    learned = QuantConfig(activation=replace(QuantConfig().activation, learned=True))
    assert not overwriting(divqat.prepare(build("residual"), learned, images()))


def test_frozen_batchnorms_are_written_over_as_well(one_thread):
    without, over, quantizers = pair("residual")
    assert quantizers
    for model in (without, over):
        freeze_batchnorm(settle(model, 1))
    same(steps(over), steps(without))


class NewBytes(TorchDispatchMode):
    """A block that adds up the sizes of what operations return, views of what they read and meta
    tensors aside."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        made = [t for t in tensors(result) if t.untyped_storage().data_ptr() not in read]
        self.total += sum(t.nbytes for t in made)
        return result


def tensors(tree):
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return [leaf for leaf in leaves if not leaf.is_meta]


def allocated(model):
    with NewBytes() as new:
        model(images(4))
    return new.total


def test_it_saves_the_memory_of_every_output_written_over(one_thread):
    without, over, quantizers = pair("vgg_small")
    sizes = []
    for name in quantizers:
        over.get_submodule(name).register_forward_hook(lambda m, args, y: sizes.append(y.nbytes))
    for model in (without, over):
        settle(model, 1)
    sizes.clear()
    bytes_over = allocated(over)
    assert len(sizes) == len(quantizers) > 0
    assert allocated(without) - bytes_over == sum(sizes)
    kept = [saved_bytes(lambda m=m: m(images(4)), m.parameters()) for m in (without, over)]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_codes_checkpoints_and_traceable_ops(one_thread):
    """What keeps or computes again what the forward had."""
    without, over, quantizers = pair("vgg_small")
    assert quantizers

    def coded(model):
        def forward(x):
            with save_as_codes(model):
                return model(x)

        return forward

    def recomputed(model):
        return lambda x: checkpoint(model, x, use_reentrant=False)

    for forward in (coded, recomputed):
        same(steps(over, forward(over)), steps(without, forward(without)))
    with ops.backend("traceable"):
        same(steps(over), steps(without))


def test_it_compiles_and_leaves_memory_to_the_compiler():
    def forward(x, buffers):
        x = x * 2
        y = ops.fake_quantize_observed(x, *buffers, 0, 255, inplace=True)
        return y, x

    x = randn(3, 7)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    y, given = compiled(x, state())
    assert torch.equal(given, x * 2)
    same([y], [forward(x, state())[0]])


@pytest.mark.slow
def test_a_copy_and_its_summary_are_the_same(one_thread):
    without, over, quantizers = pair("resnet20")  # not every quantizer applies a ReLU
    for model in (without, over):
        settle(model, 1)
    assert overwriting(copy.deepcopy(over)) == quantizers
    assert divqat.summary(over, images()) == divqat.summary(without, images())
