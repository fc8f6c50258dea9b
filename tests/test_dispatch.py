"""The ops as PyTorch's compiler and dispatcher see them."""

import itertools

import backends
import pytest
import torch
from testing import DTYPES, randn, tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from divqat import ops
from divqat.ops import reference, reference_loss
from divqat.ops._library import SCHEMAS
from divqat.ops._mask import unpack_mask

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture(scope="module", params=backends.names(every_set=False))
def backend(request):
    """Compiler and dispatcher do not see which instructions a kernel takes."""
    with backends.serving(request.param):
        yield request.param


INF = float("inf")


def buffers(n=None):
    shape = [] if n is None else [n]
    return (
        torch.full(shape, INF),
        torch.full(shape, -INF),
        torch.ones(shape),
        torch.zeros(shape, dtype=torch.int32),
    )


def samples():
    """(op, arguments), each op over dtypes, layouts and axes."""
    x = randn(2, 3, 4, 5)
    per_tensor = (tensor(0.1), torch.tensor(3, dtype=torch.int32))
    per_channel = (tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, -1], dtype=torch.int32))
    for variant in (x, x.bfloat16().to(memory_format=torch.channels_last), x[:, :, ::2]):
        yield "fake_quantize", (variant, *per_tensor, -128, 127, None, True)
        yield "fake_quantize", (variant, *per_channel, -128, 127, 1, False)
        yield "observe", (variant, *buffers(), -128, 127, None, 0.01, False, True)
        for mode in ("exact", "delayed", "frozen"):
            rest = (-128, 127, 1, 0.01, True, mode, True)
            yield "fake_quantize_observed", (variant, *buffers(3), *rest)
            yield "fake_quantize_observed_inplace", (variant.clone(), *buffers(3), *rest)
        lsq = (per_channel[0], tensor([0.0, 1.2, -0.7]), -8, 7, 1)
        yield "fake_quantize_lsq", (variant, *lsq)
        grad = torch.empty_like(variant).copy_(variant)
        yield "fake_quantize_lsq_backward", (grad, variant, *lsq, 0.5)
        weights = [variant, variant[0], randn(3, dtype=variant.dtype)]
        yield "fake_quantize_weights", (weights, -127, 127, 0)
        yield "fake_quantize_weights_backward", (weights, weights, -127, 127, 0)
    mask = torch.arange(15, dtype=torch.uint8)
    yield "fake_quantize_backward", (x, mask)
    for direction in ("student_teacher", "teacher_student", "js"):
        loss = (randn(5, 4), randn(5, 4, seed=1), torch.tensor([0, 1, -100, 3, 0]), tensor(0.3))
        yield "divergence_loss", (*loss, 4.0, direction, "non_label", 0.5, True, 0.1, -100)
    yield "divergence_loss_backward", (randn(5, 4).bfloat16(), tensor(0.5))


def test_every_op_has_a_sample():
    assert {name for name, _ in samples()} == set(SCHEMAS)


@pytest.mark.parametrize(
    "i", [pytest.param(i, id=f"{name}-{i}") for i, (name, _) in enumerate(samples())]
)
def test_opcheck(i, backend):
    """How an op is traced does not depend on its kernels, which takes the longest to check."""
    if backend == "traceable":
        pytest.skip("the ops are served by the references, which are checked as torch")
    name, args = next(itertools.islice(samples(), i, None))  # on the backend's device
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if backend == "torch":
        checks.append("test_aot_dispatch_dynamic")
    result = opcheck(getattr(torch.ops.divqat, name).default, args, test_utils=checks)
    assert result == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "channels_last"), list(zip(DTYPES, [False, True] * 2, strict=True))
)
@torch._dynamo.config.patch(recompile_limit=16)  # one for each, traceable and not
def test_compiles_without_a_graph_break_and_changes_nothing(dtype, channels_last):
    x = randn(2, 3, 4, 5, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    qparams = (tensor(0.05), torch.tensor(0, dtype=torch.int32))
    scale, offset = tensor([0.1, 0.2, 0.3]), tensor([0.4, -1.3, 0.0])
    logits, target = randn(2, 5, dtype=dtype), torch.tensor([1, 4])

    def step(x, scale, logits, state):
        y = ops.fake_quantize_observed(x, *state, 0, 255, relu=True)
        y = ops.fake_quantize(y * 1.5, *qparams, -128, 127)
        y = ops.fake_quantize_lsq(y, scale, offset, -8, 7, 1, grad_factor=0.3)
        (y,) = ops.fake_quantize_weights([y], -127, 127, 1)
        loss = ops.divergence_loss(logits, -logits, target, weight=0.1, temperature=4.0)
        return y.double().square().sum() + loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().clone().requires_grad_() for t in (x, scale, logits)]
        state = buffers()
        out = function(*leaves, state)
        results.append([out, *torch.autograd.grad(out, leaves), *state])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.slow
@pytest.mark.skipif(
    backends.INTERPRETED in backends.names(), reason="Inductor calls an op, whatever serves it"
)
def test_compiles_with_inductor():
    x = randn(4, 3, 8, 8).requires_grad_()
    state = buffers()

    def step(x):
        return ops.fake_quantize_observed(torch.sin(x), *state, -128, 127).cos().sum()

    compiled = torch.compile(step, fullgraph=True)(x)
    (grad,) = torch.autograd.grad(compiled, x)
    wanted = step(x)  # the second batch is the first again: the range does not move
    torch.testing.assert_close(compiled, wanted)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, x)[0])


def test_a_new_weight_does_not_recompile():
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def loss(logits, weight):
        return ops.divergence_loss(logits, -logits, torch.tensor([0, 1]), weight=weight)

    for weight in (0.1, 0.2, 0.3):
        loss(randn(2, 3), torch.tensor(weight))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", backends.names()[:1], indirect=True)
def test_no_reference_reads_a_tensor_on_the_host(backend):
    """Fake tensors have no data: an ``item()`` or a branch on a value raises. The references are
    called themselves, whatever serves the ops."""
    modules = (reference, reference_loss)
    functions = {
        name: next(getattr(m, f"{name}_ref") for m in modules if hasattr(m, f"{name}_ref"))
        for name in SCHEMAS
    }
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        for name, args in samples_as_fakes(mode):
            if name == "fake_quantize_backward":
                args[1] = unpack_mask(args[1], args[0])
            functions[name](*args)


def samples_as_fakes(mode):
    def fake(value):
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value)
        return [fake(v) for v in value] if isinstance(value, list) else value

    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        cases = list(samples())
    for name, args in cases:
        yield name, [fake(arg) for arg in args]


def test_backends_names_every_op_and_gives_a_reason():
    table = ops.backends()
    assert set(table) == set(SCHEMAS)
    for devices in table.values():
        assert set(devices) == {"cpu", "cuda"}
        for backend, reason in devices.values():
            assert (backend == "native") == (reason == "")


def test_calling_an_op_directly_warns_about_its_gradient():
    x = randn(4).requires_grad_()
    y, _ = torch.ops.divqat.fake_quantize(
        x, tensor(0.1), torch.tensor(0, dtype=torch.int32), -128, 127, None, True
    )
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        y.sum().backward()
