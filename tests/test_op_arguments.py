"""Arguments of the ops that are wrong, or look so: one answer, whatever serves them."""

import numpy as np
import pytest
import torch
from testing import randn, same, tensor

from divqat import ops
from divqat.ops.reference_loss import divergence_loss_ref

pytestmark = pytest.mark.usefixtures("backend")

INF, NAN = float("inf"), float("nan")


def whole(value):
    return torch.tensor(value, dtype=torch.int32)


def buffers(n=()):
    return [torch.full(n, INF), torch.full(n, -INF), torch.ones(n), torch.zeros(n).int()]


def arguments():
    """op → arguments that work, by name."""
    x, state = randn(3, 4), dict(zip(("running_min", "running_max"), buffers(), strict=False))
    grid = {"scale": tensor(0.1), "zero_point": whole(0), "quant_min": -8, "quant_max": 7}
    return {
        ops.fake_quantize: {"x": x, **grid},
        ops.fake_quantize_observed: {"x": x, **state, **grid},
        ops.fake_quantize_lsq: {"x": x, **grid},
        ops.fake_quantize_weights: {"weights": [x], "quant_min": -8, "quant_max": 7},
        ops.divergence_loss: {
            "logits": x,
            "teacher_logits": randn(3, 4, seed=1),
            "target": torch.tensor([0, 2, 1]),
            "weight": 0.3,
        },
    }


WRONG = [
    ("fake_quantize_lsq", {"grad_factor": "x"}, TypeError, "wanted a number, got 'x'"),
    ("fake_quantize_lsq", {"grad_factor": INF}, ValueError, "wanted a finite number, got inf"),
    ("fake_quantize_lsq", {"grad_factor": NAN}, ValueError, "wanted a finite number, got nan"),
    ("divergence_loss", {"temperature": INF}, ValueError, "wanted 1e-18 to 1e18, got inf"),
    ("divergence_loss", {"temperature": 1e200}, ValueError, "wanted 1e-18 to 1e18, got 1e[+]200"),
    ("divergence_loss", {"temperature": 1e-30}, ValueError, "wanted 1e-18 to 1e18, got 1e-30"),
    ("divergence_loss", {"temperature": NAN}, ValueError, "wanted > 0, got nan"),
    ("divergence_loss", {"temperature": "hot"}, TypeError, "wanted a number, got 'hot'"),
    ("divergence_loss", {"bound": "1"}, TypeError, "wanted a number, got '1'"),
    ("divergence_loss", {"label_smoothing": None}, TypeError, "wanted a number, got None"),
    ("divergence_loss", {"ignore_index": 0.5}, TypeError, "wanted an integer, got 0.5"),
    ("divergence_loss", {"guard": "no"}, TypeError, "wanted True or False, got 'no'"),
    ("divergence_loss", {"weight": INF}, ValueError, "wanted a number, got inf"),
    ("divergence_loss", {"weight": 1e39}, ValueError, "wanted a number, got 1e[+]39"),
    ("divergence_loss", {"weight": "heavy"}, TypeError, "wanted a number, got 'heavy'"),
    (
        "divergence_loss",
        {"weight": torch.ones(2)},
        ValueError,
        r"wanted float32 \[\], got .* \[2\]",
    ),
    ("divergence_loss", {"weight": torch.ones((), dtype=torch.float64)}, ValueError, "float32"),
    ("divergence_loss", {"teacher_logits": None}, TypeError, "wanted a Tensor, got NoneType"),
    ("divergence_loss", {"target": [0, 2, 1]}, TypeError, "wanted a Tensor, got list"),
    ("divergence_loss", {"target": torch.tensor([0, 4, 1])}, IndexError, "got 4 at 1"),
    ("divergence_loss", {"target": torch.tensor([-100, 0, -1])}, IndexError, "got -1 at 2"),
    ("divergence_loss", {"logits": torch.zeros(3, 0)}, ValueError, r"\[N, C\], got \[3, 0\]"),
    ("fake_quantize_weights", {"weights": torch.zeros(2, 3)}, TypeError, "several Tensors"),
    ("fake_quantize_weights", {"weights": None}, TypeError, "several Tensors, got NoneType"),
    ("fake_quantize_weights", {"weights": [[1.0]]}, TypeError, r"\[0\]: wanted a Tensor"),
    ("fake_quantize_observed", {"averaging_constant": "1"}, TypeError, "a number, got '1'"),
    ("fake_quantize_observed", {"averaging_constant": NAN}, ValueError, r"\(0, 1\], got nan"),
    ("fake_quantize_observed", {"symmetric": "no"}, TypeError, "True or False, got 'no'"),
    ("fake_quantize_observed", {"relu": tensor(1.0)}, TypeError, "True or False, got tensor"),
    ("fake_quantize", {"zero_point": whole(8)}, ValueError, r"values in \[-8, 7\], got 8 to 8"),
    ("fake_quantize", {"scale": tensor(0.0)}, ValueError, "wanted values in .*, got 0 to 0"),
    ("fake_quantize", {"scale": tensor(-0.1)}, ValueError, "got -0.1 to -0.1"),
    ("fake_quantize", {"scale": tensor(NAN)}, ValueError, "got nan to nan"),
    ("fake_quantize", {"scale": tensor(INF)}, ValueError, "got inf to inf"),
    *(
        (f"fake_quantize{op}", change, error, words)
        for op in ("", "_observed", "_lsq")
        for change, error, words in (
            ({"x": torch.zeros(3).to_sparse()}, TypeError, "wanted torch.strided"),
            ({"scale": torch.ones(1).to_sparse()}, TypeError, "wanted torch.strided"),
            ({"quant_min": -8.0}, TypeError, "wanted an integer, got -8.0"),
            ({"quant_max": "7"}, TypeError, "wanted an integer, got '7'"),
            ({"ch_axis": "0"}, TypeError, "wanted an integer, got '0'"),
            ({"ch_axis": 0.0}, TypeError, "wanted an integer, got 0.0"),
        )
    ),
]


@pytest.mark.parametrize(("op", "change", "error", "words"), WRONG)
def test_what_is_wrong_is_named_at_the_call(op, change, error, words):
    function = getattr(ops, op)
    given = {
        name: value for f, a in arguments().items() if f is function for name, value in a.items()
    }
    function(**given)  # works
    (name,) = change
    state = [t for t in given.values() if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in state]
    with pytest.raises(error, match=f"{name}.*{words}"):
        function(**given | change)
    same(before, state)


def test_per_channel_zero_points_outside_the_range_are_refused():
    x, scale = randn(3, 4), tensor([0.1, 0.2, 0.3])
    with pytest.raises(RuntimeError, match="must be between"):  # torch's own
        torch.fake_quantize_per_channel_affine(x, scale, whole([0, -9, 3]), 0, -8, 7)
    with pytest.raises(ValueError, match=r"zero_point: wanted values in \[-8, 7\], got -9 to 3"):
        ops.fake_quantize(x, scale, whole([0, -9, 3]), -8, 7, 0)
    with pytest.raises(ValueError, match=r"scale: wanted values in .*, got -0.2 to 0.3"):
        ops.fake_quantize(x, tensor([0.1, -0.2, 0.3]), whole([0, 1, 3]), -8, 7, 0)
    ops.fake_quantize(x, scale, whole([-8, 0, 7]), -8, 7, 0)  # the ends belong to it


@pytest.mark.slow
def test_where_values_cannot_be_read_the_formula_holds():
    """A zero point outside the range, under a compiler: 0 is then another level."""
    x, scale, z = randn(3, 4), tensor([0.1, 0.2, 0.3]), whole([0, -9, 3])
    steps = torch.ones(3).requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(x, grad_factor):
        y = ops.fake_quantize(x, scale, z, -8, 7, 0)
        return y, ops.fake_quantize_lsq(x, steps, whole([0] * 3), -8, 7, 0, grad_factor=grad_factor)

    wanted = ((x / scale[:, None]).round() + z[:, None]).clamp(-8, 7) - z[:, None]
    for grad_factor in (0.25, 0.5):  # the second one makes it symbolic
        y, learned = function(x, grad_factor)
        torch.testing.assert_close(y, wanted * scale[:, None])
        (grad,) = torch.autograd.grad(learned.sum(), steps)
        torch.testing.assert_close(grad, grad_factor * (x.round() - x).sum(1))


def test_any_iterable_of_weights():
    weights = [randn(3, 4), randn(2, 5, seed=1)]
    wanted = ops.fake_quantize_weights(weights, -127, 127)
    for given in ((w for w in weights), tuple(weights), {0: weights[0], 1: weights[1]}.values()):
        same(ops.fake_quantize_weights(given, -127, 127), wanted)
    assert ops.fake_quantize_weights(iter(()), -127, 127) == []


def test_integers_of_numpy_are_integers():
    y = ops.fake_quantize(randn(3), tensor(0.1), whole(0), np.int64(-8), np.int8(7))
    assert torch.equal(y, ops.fake_quantize(randn(3), tensor(0.1), whole(0), -8, 7))


@pytest.mark.parametrize("mode", ["exact", "delayed", "frozen"])
def test_one_value_is_a_scalar_or_a_list_of_one(mode):
    x, wanted = randn(3, 4), buffers()
    y = ops.fake_quantize_observed(x, *wanted, 0, 255, mode=mode)
    for lists in range(1, 16):
        given = [b[None] if lists >> i & 1 else b for i, b in enumerate(buffers())]
        assert torch.equal(ops.fake_quantize_observed(x, *given, 0, 255, mode=mode), y)
        same([b.reshape(()) for b in given], wanted)
    for weight in (tensor(0.3), tensor([0.3])):
        value = ops.divergence_loss(x, -x, torch.tensor([0, 1, 2]), weight=weight)
        assert value.shape == ()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1), (2, 3), (0, 1, 2, 3)])
def test_buffers_whose_values_share_memory_are_refused(which, inplace):
    x, state = randn(4, 3), buffers((3,))
    state = [b[:1].expand(3) if i in which else b for i, b in enumerate(state)]
    before = [b.clone() for b in (x, *state)]
    name = ("running_min", "running_max", "scale", "zero_point")[which[0]]
    words = rf"{name}: wanted memory of its own for each value, got \[3\] with strides \[0\]"
    with pytest.raises(ValueError, match=words):
        ops.fake_quantize_observed(x, *state, 0, 255, 1, inplace=inplace)
    with pytest.raises(ValueError, match=f"{name}: wanted memory of its own for each value"):
        torch.ops.divqat.observe(x, *state, 0, 255, 1, 0.1, False, False)
    for form in ("", "_inplace"):
        op = getattr(torch.ops.divqat, f"fake_quantize_observed{form}")
        with pytest.raises(ValueError, match=f"{name}: wanted memory of its own for each value"):
            op(x, *state, 0, 255, 1, 0.1, False, "exact", False)
    assert all(torch.equal(a, b) for a, b in zip(before, [x, *state], strict=True))


def leaf(x):
    return x.requires_grad_()


def one_of_several(x):
    return (leaf(x) * 1).split(2)[0]


def made_without_grad(x):
    x = leaf(x) * 1
    with torch.no_grad():
        return x[:2]


def made_in_inference(x):
    with torch.inference_mode():
        return x * 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (leaf, "a result to overwrite, got a leaf that requires grad"),
        (lambda x: leaf(x).view(-1), "a result to overwrite, got a view of a leaf"),
        (lambda x: leaf(x)[1:], "a result to overwrite, got a view of a leaf"),
        (lambda x: leaf(x).t(), "a result to overwrite, got a view of a leaf"),
        (one_of_several, "a result to overwrite, got a view that autograd does not track"),
        (lambda x: (leaf(x) * 1).unbind()[1], "a result to overwrite, got a view that"),
        (made_without_grad, "a result to overwrite, got a leaf that requires grad"),
        (made_in_inference, "a tensor to update, got one made in inference mode"),
    ],
)
def test_what_autograd_would_refuse_too_late_is_left_alone(make, words):
    x, state = make(randn(4, 6)), buffers()
    before = [t.detach().clone() for t in (x, *state)]
    with pytest.raises(ValueError, match=f"x: wanted {words}"):
        ops.fake_quantize_observed(x, *state, 0, 255, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *state), strict=True))


def test_a_view_of_a_result_is_written_over():
    x, wanted = leaf(randn(4, 6)), leaf(randn(4, 6))
    y = ops.fake_quantize_observed((x * 2)[1:], *buffers(), 0, 255, inplace=True)
    plain = ops.fake_quantize_observed((wanted * 2)[1:], *buffers(), 0, 255)
    grads = [torch.autograd.grad(v.square().sum(), leaf) for v, leaf in ((y, x), (plain, wanted))]
    same([y.detach(), *grads[0]], [plain.detach(), *grads[1]])


def test_buffers_made_in_inference_mode():
    with torch.inference_mode():
        state = buffers()
        y = ops.fake_quantize_observed(randn(3, 4), *state, 0, 255)
    before = [b.clone() for b in state]
    with pytest.raises(ValueError, match="running_min: wanted a tensor to update, got one made in"):
        ops.fake_quantize_observed(3 * randn(3, 4), *state, 0, 255)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    own = buffers()
    assert torch.equal(ops.fake_quantize_observed(randn(3, 4), *own, 0, 255), y)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
@pytest.mark.parametrize("ch_axis", [0, 1, None])
@pytest.mark.parametrize("count", [None, 5])
def test_an_empty_batch_changes_nothing_and_has_gradients(shape, ch_axis, count):
    x = leaf(torch.zeros(shape))
    n = () if ch_axis is None else (count if shape[ch_axis] == 0 and count else shape[ch_axis],)
    scale, zero_point = leaf(torch.full(n, 0.1)), leaf(torch.zeros(n))
    y = ops.fake_quantize_lsq(x, scale, zero_point, -8, 7, ch_axis)
    grads = torch.autograd.grad(y.sum(), (x, scale, zero_point))
    assert y.shape == shape and [g.shape for g in grads] == [x.shape, scale.shape, scale.shape]
    assert not any(g.any() for g in grads)
    y = ops.fake_quantize(x, scale.detach(), zero_point.detach().int(), -8, 7, ch_axis)
    assert torch.autograd.grad(y.sum(), x)[0].shape == y.shape == shape
    for options in ({}, {"inplace": True}, {"fake_quant": False}, {"mode": "delayed"}):
        state = buffers(n)
        y = ops.fake_quantize_observed(x * 2, *state, 0, 255, ch_axis, **options)
        assert torch.autograd.grad(y.sum(), x)[0].shape == y.shape == shape
        same(state, buffers(n))


HUGE = torch.finfo(torch.float32).max


@pytest.mark.parametrize("ch_axis", [None, 0])
@pytest.mark.parametrize("mode", ["exact", "delayed"])
@pytest.mark.parametrize(("low", "high"), [(-2e38, 2e38), (-3e38, 1e38), (-1.0, 3e38)])
def test_a_range_too_wide_for_a_float_has_a_scale(low, high, mode, ch_axis):
    x, state = tensor([[low, 0.0, high / 3, high]]), buffers(() if ch_axis is None else (1,))
    for _ in range(2):
        y = ops.fake_quantize_observed(x, *state, 0, 255, ch_axis, mode=mode)
    wanted = (high - low) / 255  # in float64
    torch.testing.assert_close(state[2].double().reshape(()), tensor(wanted, torch.float64))
    assert abs(state[3].item() + low / wanted) <= 0.5001  # the rounded one
    assert ((y.double() - x.double()).abs() <= 0.51 * wanted).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_level_has_the_largest_scale_at_most(symmetric):
    state = buffers()
    y = ops.fake_quantize_observed(tensor([-2e38, 2e38]), *state, 0, 1, symmetric=symmetric)
    assert state[2].item() == HUGE and y.isfinite().all()


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_an_average_over_the_whole_range_of_floats(weight):
    state = buffers()
    for batch in (2e38, -3e38):
        ops.fake_quantize_observed(
            tensor([batch, batch]), *state, 0, 255, averaging_constant=weight, fake_quant=False
        )
    wanted = (1 - weight) * 2e38 + weight * -3e38
    for running in state[:2]:
        torch.testing.assert_close(running.double(), tensor(wanted, torch.float64))
    assert state[2].isfinite()


def test_a_target_that_nothing_may_wait_for_makes_the_loss_nan():
    """The reference; CUDA's and Triton's kernels are looked at in their own tests."""
    x = randn(3, 4)
    args = (tensor(0.3), 1.0, "js", "all", None, False, 0.1, -100)
    value, ce, _, grad = divergence_loss_ref(x, -x, torch.tensor([1, 4, -100]), *args)
    assert value.isnan() and ce.isnan()
    assert grad[1].isnan().all() and grad[0].isfinite().all() and not grad[2].any()


def test_a_frozen_grid_is_checked_like_a_given_one():
    x, ends = randn(2, 3), (torch.zeros(3), torch.ones(3))
    for scale, point, name in ((1.0, 300, "zero_point"), (0.0, 0, "scale")):
        buffers = (*ends, torch.full((3,), scale), torch.full((3,), point, dtype=torch.int32))
        with pytest.raises(ValueError, match=f"{name}: wanted values in"):
            ops.fake_quantize_observed(x, *buffers, 0, 255, 1, observe=False)
