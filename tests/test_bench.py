"""The benchmark admits who is right, and counts what does not depend on the machine."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench/ is not installed
from bench import activations, losses, run, weights
from bench.case import COPY, Absent, Contender, Plan, last_level_cache, rotations
from bench.nets import NETWORKS
from bench.nets import weights as weights_of
from divqat.ops._backend import best

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "new_garbage_only")]
SHAPE = (2, 8, 9, 10)
N = 2 * 8 * 9 * 10
FLOAT, BF16, LAST = "float32", "bfloat16", "channels_last"
NOT_COMPILED = ["divqat", "torch.ao", "torchao", "torch.fake", "ATen", "Brevitas", "eager"]


def case(op, dtype=FLOAT, layout="contiguous", device="cpu"):
    if op == weights.OP:
        tensors = [torch.empty(8, 3, 3, 3), torch.empty(10, 16)]
        return weights.case_of(Plan(op, "two weights", (), dtype, layout), tensors, device, 2)
    shape = (16, 10) if op == losses.OP else SHAPE
    return run.make(Plan(op, "small", shape, dtype, layout), device, 2)


def rows_of(op, *args, names=NOT_COMPILED):
    rows = run.measure(case(op, *args), "cpu", 0.0, names)
    return {row["contender"]: row for row in rows}


@pytest.mark.parametrize("layout", ["contiguous", LAST])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("op", run.OPS)
def test_every_opponent_takes_part_or_says_why_not(op, dtype, layout):
    if op == weights.OP and dtype == BF16:
        pytest.skip("weights are float32 in training")
    rows = rows_of(op, dtype, layout)
    out = {name: row for name, row in rows.items() if "milliseconds" not in row}
    fused = {"torch.ao fused", "torchao PT2E"}
    expected = fused if dtype == BF16 and "observed" in op else set()  # float32 only
    assert set(out) - {"divqat native"} == expected, out
    assert all("Float" in out[name]["fails"] for name in expected)
    for row in rows.values():
        if "milliseconds" in row:
            t = row["milliseconds"]
            assert 0 < t["p20"] <= t["median"] <= t["p80"] and t["rounds"] >= 7
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / t["median"] / 1e6)
    assert rows[COPY]["share_of_copy"] == 1


@pytest.mark.parametrize("op", run.OPS)
def test_the_compiled_opponent_is_right_and_other_ways_of_compiling_are_listed(op):
    rows = rows_of(op, names=["divqat torch", "torch.compile"])
    assert "milliseconds" in rows["torch.compile"], rows["torch.compile"]
    absent = [name for name, row in rows.items() if "absent" in row]
    assert absent == [f"torch.compile, {how}" for how in (
        "cooperative_reductions", "combo_kernels", "reduce-overhead",
    )]  # fmt: skip


BYTES = {  # per element in float32 and in bfloat16, worked by hand in the design
    "fake_quantize": (16.25, 8.25),
    "fake_quantize_observed": (20.25, 10.25),
    "relu_fake_quantize_observed": (20.25, 10.25),
    "fake_quantize_lsq": (20, 10),
    "fake_quantize_weights": (8, None),
    "divergence_loss": (12, 6),
}


@pytest.mark.parametrize("op", run.OPS)
def test_bytes_are_counted_as_the_design_has_them(op):
    for dtype, wanted in zip((FLOAT, BF16), BYTES[op], strict=True):
        if wanted is not None:
            measured = case(op, dtype)
            elements = sum(t.numel() for t in measured.copied[0])
            assert measured.bytes == wanted * elements
    if "observed" in op:
        rows = rows_of(op, names=["divqat torch"])
        assert rows["divqat torch"]["bytes"] == 20.25 * N
        assert rows["divqat torch, delayed"]["bytes"] == 16.25 * N


def test_ours_reads_nothing_on_the_host_and_keeps_one_bit_per_element():
    for op in run.OPS:
        rows = rows_of(op)
        ours = next(row for row in rows.values() if "milliseconds" in row)
        # On a CPU, where nothing waits for it, scale and zero point, or targets, are looked at.
        checks = 2 if op in ("fake_quantize", "divergence_loss") else 0
        assert ours["contender"].startswith("divqat") and ours["syncs"] == checks, op
        if op.startswith(("fake_quantize_obs", "relu", "fake_quantize,")):
            assert ours["saved_bytes"] == N // 8, op
            assert rows["torch.ao FakeQuantize"]["saved_bytes"] >= N, op  # a byte
            assert rows["torch.ao FakeQuantize"]["syncs"] > 0
    name = f"divqat {best('cpu')}"
    ours = rows_of(weights.OP)[name]
    assert ours["saved_bytes"] == 0
    # all weights in one operator forward, none backward; the opponents' grow with their number
    assert ours["operators"] <= 2
    # logits and the teacher's (for a second derivative), labels and λ
    assert rows_of(losses.OP)[name]["saved_bytes"] == 2 * 4 * 16 * 10 + 8 * 16 + 4


def _wrong(contender, op):
    """Mutants: name → forward that is wrong in one way."""
    forward = contender.forward

    def unmasked(x):
        y = forward(x).detach()
        return x + (y - x).detach()

    if op == losses.OP:
        return {
            "sign of the divergence": lambda z, t, y: (
                2 * torch.nn.functional.cross_entropy(z, y) - forward(z, t, y)
            ),
            "one percent": lambda *args: 1.01 * forward(*args),
            "gradient": lambda *args: forward(*args).detach() + args[0].sum() * 1e-3,
        }
    if op == weights.OP:
        return {
            "not rounded": lambda *ws: [w * 1.0 for w in ws],
            "off by a level": lambda *ws: [y + y.abs().amax() / 127 for y in forward(*ws)],
            "no gradient": lambda *ws: [y + 0 * w for y, w in zip(
                (y.detach() for y in forward(*ws)), ws, strict=True)],
        }  # fmt: skip
    return {
        "off by a level": lambda x: forward(x) + activations.STEP,
        "not rounded": lambda x: x.clamp(-6, 6) + 0 * forward(x),
        "rounded down": lambda x: forward(x - activations.STEP / 2),
        "unmasked": unmasked,
        "half the gradient": lambda x: forward(x.detach() + 0.5 * (x - x.detach())),
    }


@pytest.mark.parametrize("op", run.OPS)
def test_a_contender_that_is_wrong_gets_no_time(op):
    measured = case(op)
    right = measured.contenders["divqat torch"]
    wrong = _wrong(right(), op)

    def build(forward):
        made = right()
        return dataclasses.replace(made, forward=forward)

    if op == "fake_quantize_lsq":  # the mutants must still know the scale
        wrong.pop("unmasked")
        scale = right().parameters

        def no_scale_gradient(x):
            return right().forward(x) + 0 * scale[0]

        wrong["gradient of the scale"] = no_scale_gradient
        build = lambda forward: (  # noqa: E731
            dataclasses.replace(right(), forward=forward, parameters=scale)
            if forward is no_scale_gradient
            else _sharing_scale(right(), forward)
        )
    measured.contenders = {name: lambda f=forward: build(f) for name, forward in wrong.items()}
    rows = run.measure(measured, "cpu", 0.0)
    assert len(rows) == len(wrong) + 1
    for row in rows[:-1]:
        assert "wrong" in row and "milliseconds" not in row, row


def _sharing_scale(contender, forward):
    """A mutant of LSQ whose parameters are asked for though it does not use them."""
    scale = contender.parameters[0]
    return dataclasses.replace(contender, forward=lambda x: forward(x) + 0 * scale)


def test_an_observer_that_does_not_move_is_wrong():
    measured = case("fake_quantize_observed")
    frozen = case("fake_quantize").contenders["divqat torch"]
    measured.contenders = {"frozen": frozen}
    row = run.measure(measured, "cpu", 0.0)[0]
    assert "scale" in row["wrong"]


def test_a_contender_that_raises_or_is_absent_is_listed_with_the_reason(monkeypatch):
    def absent():
        raise Absent("it is on holiday")

    def fails(x):
        raise RuntimeError("no such luck\nat line 3")

    measured = case("fake_quantize")
    measured.contenders |= {"absent": absent, "fails": lambda: Contender(fails)}
    rows = {row["contender"]: row for row in run.measure(measured, "cpu", 0.0, ["absent", "fails"])}
    assert rows["absent"]["absent"] == "it is on holiday"
    assert rows["fails"]["fails"] == "RuntimeError: no such luck"
    assert "milliseconds" in rows[COPY]


def test_nothing_needs_the_packages_that_are_compared_with(monkeypatch):
    for package in ("torchao", "brevitas", "liger_kernel"):
        for name in [n for n in sys.modules if n.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    for op, names in {
        "fake_quantize": ["torchao PT2E"],
        "fake_quantize_lsq": ["Brevitas"],
        weights.OP: ["torchao PT2E", "Brevitas"],
        losses.OP: ["Liger"],
    }.items():
        rows = rows_of(op, names=[*names, "divqat torch"])
        for name in names:
            assert "is not installed" in rows[name]["absent"]
        assert "milliseconds" in rows["divqat torch"]


def test_inputs_take_turns_and_exceed_the_cache():
    cache = last_level_cache("cpu")
    for nbytes in (1000, 10**6, 10**9):
        assert (rotations(nbytes, "cpu") - 1) * nbytes <= 2 * cache or nbytes > cache
        assert rotations(nbytes, "cpu") * nbytes > 2 * cache
    seen = []
    measured = case("fake_quantize")
    contender = Contender(lambda x: seen.append(x.data_ptr()) or x * 1)
    for i in range(4):
        measured.run(contender, i)
    assert seen[0] != seen[1] and seen[:2] == seen[2:]


def test_the_shapes_are_those_of_the_networks():
    wanted = {
        "ResNet-20": (272_474, 22),
        "ResNet-50": (25_557_032, 54),
        "MobileNetV2": (3_504_872, 53),
    }
    for name, net in NETWORKS.items():
        with torch.device("meta"):
            model = net.build()
            outputs = []
            for module in model.modules():
                module.register_forward_hook(lambda m, args, y, to=outputs: to.append(y.shape[1:]))
            logits = model(torch.empty(2, 3, net.size, net.size))
            found = weights_of(name)
        parameters, count = wanted[name]
        assert sum(p.numel() for p in model.parameters()) == parameters, name
        assert set(net.activations) <= set(map(tuple, outputs))
        assert logits.shape == (2, net.classes)
        assert len(found) == count
    plans = [
        p for m in (activations, weights, losses) for p in m.plans("cpu", [FLOAT, BF16], [LAST])
    ]
    assert len({p.key for p in plans}) == len(plans)


@pytest.mark.gpu
@pytest.mark.parametrize("op", run.OPS)
def test_on_a_gpu_ours_is_launched_a_few_times_and_waits_for_nothing(op):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is available")
    rows = run.measure(case(op, device="cuda"), "cuda", 0.0, ["divqat"])
    kernels = [r for r in rows if r["contender"].startswith(("divqat cuda", "divqat triton"))]
    timed = [row for row in kernels if "milliseconds" in row]
    assert timed, rows
    for row in timed:
        # forward, backward, a second launch of the exact observer, and autograd's gradient of 1
        assert row["syncs"] == 0 and 1 <= row["launches"] <= 4 and row["enqueue_us"] > 0, row
