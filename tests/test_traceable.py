"""The backend that a compiler sees through: what the references give, by PyTorch's own ops."""

from functools import partial

import backends
import pytest
import torch
from testing import DTYPES, axes, loss_cases, qparams_along, randn, same, variants
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from divqat import ops
from divqat.ops import _library

pytestmark = pytest.mark.skipif(
    backends.INTERPRETED in backends.names(), reason="only Triton's kernels are looked at here"
)
RANGE = (-60, 61)


class Dispatched(TorchDispatchMode):
    """The names of the ops that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def compare(function, leaves, *args):
    """Values, buffers, gradients and their gradients under torch and under traceable: the same."""
    results = []
    for name in ("torch", "traceable"):
        with ops.backend(name), Dispatched() as dispatched:
            own = [leaf.detach().requires_grad_() for leaf in leaves]
            (y, *state) = function(*own, *args)
            grad = randn(*y.shape, dtype=y.dtype, seed=7).requires_grad_()
            grads = torch.autograd.grad(y, own, grad, retain_graph=True)
            twice = torch.autograd.grad(y, own, grad, create_graph=True)
            (again,) = torch.autograd.grad([g.sum() for g in twice], grad)
        results.append([t.detach() for t in (y, *state, *grads, *twice, again)])
        ours = {op for op in dispatched.names if op.startswith("divqat::")}
        assert bool(ours) == (name == "torch"), ours
    same(*results)


def large(dtype):
    x = randn(3, 4, 9, 7, dtype=dtype).mul_(4)
    yield x
    yield from variants(x)


def fake_quantize(x, *args, **options):
    return [ops.fake_quantize(x, *args, **options)]


def learned(x, scale, zero_point, *args):
    return [ops.fake_quantize_lsq(x, scale, zero_point, *args, grad_factor=0.3)]


def weights(w, *args):
    return ops.fake_quantize_weights([w], *args)


def observed(x, n, *args, **options):
    ends = torch.full(n, torch.inf), torch.full(n, -torch.inf)
    state = *ends, torch.ones(n), torch.zeros(n, dtype=torch.int32)
    first = ops.fake_quantize_observed(x.detach() * 0.7, *state, *args, **options)
    return [ops.fake_quantize_observed(x, *state, *args, **options), first, *state]


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers_are_the_references_bit_for_bit(dtype):
    for x in large(dtype):
        for ch_axis in axes(x):
            scale, zero_point = qparams_along(x, ch_axis)
            for nan in ("propagate", "aten"):
                given = (scale, zero_point, *RANGE, ch_axis)
                compare(partial(fake_quantize, nan=nan), [x], *given)
            compare(learned, [x, scale, zero_point + 0.3], *RANGE, ch_axis)
            compare(weights, [x], *RANGE, ch_axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["exact", "delayed", "frozen"])
def test_observers_are_the_references_bit_for_bit(dtype, mode):
    for i, x in enumerate(large(dtype)):
        for ch_axis in axes(x):
            n = [] if ch_axis is None else [x.shape[ch_axis]]
            options = {"mode": mode, "relu": i % 2 == 0, "symmetric": i % 3 == 0}
            compare(partial(observed, **options), [x], n, *RANGE, ch_axis)


@pytest.mark.parametrize("relu", [False, True])
def test_observing_alone_is_the_reference(relu):
    results = []
    for name in ("torch", "traceable"):
        with ops.backend(name):
            results.append(observed(randn(3, 4), [4], *RANGE, 1, fake_quant=False, relu=relu))
    same(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student", "js"])
def test_losses_are_the_references_bit_for_bit(dtype, direction):
    names = ("temperature", "direction", "classes", "bound", "guard", "label_smoothing")
    for logits, teacher, target, weight, *rest in loss_cases(dtype, direction, [(33, 10), (5, 1)]):
        options = dict(zip(names, rest, strict=False))
        loss = partial(ops.divergence_loss_terms, weight=weight, **options)
        compare(loss, [logits], teacher, target)


def test_a_mask_outlives_its_backend():
    x = randn(3, 5).requires_grad_()
    for before, after in (("torch", "traceable"), ("traceable", "torch")):
        with ops.backend(before):
            y = ops.fake_quantize(x, *qparams_along(x, None), -8, 7)
        with ops.backend(after):
            (grad,) = torch.autograd.grad(y.sum(), x)
        assert 0 < grad.sum() < 15 and torch.equal(grad, (grad != 0).float())


@pytest.mark.slow
def test_a_change_of_backend_compiles_again_and_back_does_not():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    x = randn(8).requires_grad_()
    quantize = torch.compile(ops.fake_quantize, fullgraph=True, backend=counter)
    counts = []
    for name in ("torch", "traceable", "torch", "traceable"):
        with ops.backend(name):
            quantize(x, *qparams_along(x, None), -8, 7).sum().backward()
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2]


def test_it_is_reported_and_left_again():
    before = ops.backends()
    with ops.backend("traceable"):
        table = ops.backends()
        with ops.backend("torch"):
            assert not _library.traceable
        assert _library.traceable
    for name, devices in table.items():
        for device, (backend, reason) in devices.items():
            assert backend == "traceable" and reason, (name, device)
    assert ops.backends() == before
