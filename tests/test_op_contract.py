"""What every op keeps to, whatever serves it: checkpoints, transforms, double backward, meta."""

from functools import partial

import pytest
import torch
from testing import randn, same, tensor
from torch.utils.checkpoint import checkpoint

from divqat import ops

pytestmark = pytest.mark.usefixtures("backend")

INF = float("inf")


def whole(value):
    return torch.tensor(value, dtype=torch.int32)


def buffers(n=()):
    return [torch.full(n, INF), torch.full(n, -INF), torch.ones(n), torch.zeros(n).int()]


class Call:
    """An op of x [3, 4] with the tensors that it takes beside it."""

    def __init__(self, function, *state, trained=0):
        self.function, self.make, self.trained = function, state, trained

    def state(self):
        """New ones; the first ``trained`` of them require grad."""
        made = [value() for value in self.make]
        return [t.requires_grad_(i < self.trained) for i, t in enumerate(made)]

    def __call__(self, x, *state):
        return self.function(x, *state)


def observer():
    return [lambda i=i: buffers()[i] for i in range(4)]


def observed(**options):
    def call(x, *state):
        return ops.fake_quantize_observed(x * 2, *state, 0, 255, **options)

    return Call(call, *observer())


def loss(x, teacher, target, weight):
    return ops.divergence_loss(x, teacher, target, weight=weight, temperature=4.0, bound=0.5)


CALLS = {
    "fake_quantize": Call(
        lambda x, s, z: ops.fake_quantize(x, s, z, -8, 7), lambda: tensor(0.1), lambda: whole(3)
    ),
    "fake_quantize, per channel": Call(
        lambda x, s, z: ops.fake_quantize(x, s, z, -8, 7, 0),
        lambda: tensor([0.1, 0.2, 0.3]),
        lambda: whole([0, 1, -1]),
    ),
    "fake_quantize_observed": observed(),
    "fake_quantize_observed, inplace": observed(relu=True, inplace=True),
    "observe": observed(fake_quant=False),
    "fake_quantize_lsq": Call(
        lambda x, s, z: ops.fake_quantize_lsq(x, s, z, -8, 7, 0, grad_factor=0.3),
        lambda: tensor([0.1, 0.2, 0.3]),
        lambda: tensor([0.4, 1.0, -0.7]),
        trained=2,
    ),
    "fake_quantize_weights": Call(
        lambda x, w: sum(ops.fake_quantize_weights([x, w], -8, 7)), lambda: randn(3, 4), trained=1
    ),
    "fake_quantize_weights, straight through": Call(
        lambda x: ops.fake_quantize_weights([x], -7, 7)[0]
    ),
    "divergence_loss": Call(
        loss, lambda: randn(3, 4, seed=1), lambda: torch.tensor([0, 2, 1]), lambda: tensor(0.3)
    ),
}
every_op = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@every_op
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_gives_the_same_bits(call, use_reentrant):
    def run(through):
        state, x = call.state(), randn(3, 4).requires_grad_()
        call(randn(3, 4, seed=3), *state)  # a batch before, of another range
        y = through(lambda x: call(x, *state), x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(t.grad for t in state if t.requires_grad), *state]

    again = partial(checkpoint, use_reentrant=use_reentrant)
    same(run(again), run(lambda function, x: function(x)))


def test_a_delayed_range_is_not_there_when_the_op_is_run_again():
    call = observed(mode="delayed")
    state, x = call.state(), randn(3, 4).requires_grad_()
    y = checkpoint(lambda x: call(x, *state), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"mode: wanted 'exact' where torch\.utils\.checkpoint"):
        y.sum().backward()


@every_op
@pytest.mark.parametrize(
    "transform",
    [
        torch.vmap,
        lambda f: torch.func.grad(lambda x: f(x).sum()),
        torch.func.hessian,
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
        lambda f: lambda x: torch.func.vjp(f, x),
    ],
)
def test_transforms_are_refused_by_name(call, transform):
    state, x = call.state(), randn(2, 3, 4)
    before = [t.detach().clone() for t in state]
    with pytest.raises(
        NotImplementedError, match=r"(fake_quantize\w*|divergence_loss): wanted a call outside of"
    ):
        transform(lambda x: call(x.reshape(-1, 3, 4)[0], *state))(x)
    same(before, [t.detach() for t in state])


def test_where_no_op_is_called_transforms_work():
    x, target = randn(3, 4), torch.tensor([0, 2, 1])
    grad = torch.func.grad(lambda x: ops.divergence_loss(x, x.detach(), target, weight=0.0))(x)
    wanted = x.requires_grad_()
    torch.nn.functional.cross_entropy(wanted, target).backward()
    torch.testing.assert_close(grad, wanted.grad)


@every_op
def test_a_batch_of_cotangents(call):
    x = randn(3, 4).requires_grad_()
    y = call(x, *call.state())
    batch = torch.stack([torch.full_like(y, factor) for factor in (1.0, -0.5)])
    grads = [torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in batch]
    (batched,) = torch.autograd.grad(y, x, batch, is_grads_batched=True)
    # the loss's gradient is rounded before it is scaled, or afterwards
    torch.testing.assert_close(batched, torch.stack(grads))


@every_op
def test_forward_mode_is_refused(call):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(randn(3, 4), randn(3, 4, seed=1))
        if call is CALLS["observe"]:  # hands x on
            return
        with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
            call(dual, *call.state())


@every_op
@pytest.mark.parametrize("use_reentrant", [None, False])
def test_double_backward_is_the_derivative_of_the_gradient(call, use_reentrant):
    """By differences of the gradient itself, of which the ops that round are piecewise linear."""
    state, x = call.state(), randn(3, 4, dtype=torch.float64).requires_grad_()
    if call is CALLS["divergence_loss"]:
        state[0] = state[0].double()
    if call is CALLS["fake_quantize_weights"]:
        state[0] = state[0].detach().double()
    direction = randn(3, 4, dtype=torch.float64, seed=7)

    def gradient(cotangent):
        if use_reentrant is None:
            y = call(x, *state)
        else:
            y = checkpoint(lambda x: call(x, *state), x, use_reentrant=use_reentrant)
        grad = torch.autograd.grad(y, x, cotangent.expand_as(y), create_graph=True)[0]
        return (grad * direction).sum()

    # y is a loss of one value, or as large as x: the gradient is linear in the cotangent
    cotangent = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = gradient(cotangent)
    (by_cotangent,) = torch.autograd.grad(value, cotangent, retain_graph=True)
    torch.testing.assert_close(by_cotangent, value.detach())
    (by_x,) = torch.autograd.grad(value, x, allow_unused=True)
    if call is not CALLS["divergence_loss"]:
        assert by_x is None or not by_x.any()
        return
    step = 1e-6 * randn(3, 4, dtype=torch.float64, seed=8)
    with torch.no_grad():
        x += step
    ahead = gradient(cotangent)
    with torch.no_grad():
        x -= 2 * step
    change = ahead - gradient(cotangent)
    torch.testing.assert_close((by_x * 2 * step).sum(), change.detach(), rtol=1e-4, atol=1e-12)


@every_op
def test_all_meta_is_served_by_shape(call):
    outcomes = []
    for device in ("meta", torch.get_default_device()):
        with torch.device(device):
            state, x = call.state(), randn(3, 4).requires_grad_()
            y = call(x, *state)
            y.sum().backward()
            outcomes.append([y, x.grad, *(t.grad for t in state if t.requires_grad), *state])
    for meta, real in zip(*outcomes, strict=True):
        assert meta.device.type == "meta" != real.device.type
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@every_op
def test_meta_beside_others_is_refused(call):
    for i in range(len(call.make)):
        state = call.state()
        before = [t.detach().clone() for t in state]
        given = [t.to("meta") if i == j else t for j, t in enumerate(state)]
        with pytest.raises(ValueError, match=r"[\w\[\]]+: wanted it on .* like .*, got meta"):
            call(randn(3, 4), *given)
        same(before, [t.detach() for t in state])
