"""The benchmark measures what it says: contenders that agree, bytes that are counted, a table."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench/ is not installed
from bench import cases, cpu, steps
from bench.timing import interleaved

SMALL = {
    "fake_quantize": lambda: cases.fake_quantize(0.1),
    "exact": lambda: cases.observed(0.1, "exact"),
    "delayed": lambda: cases.observed(0.1, "delayed"),
    "lsq": lambda: cases.learned(0.1),
    "weights": lambda: cases.weights(-127),
    "weights, clipped": lambda: cases.weights(-128),
    "loss": lambda: cases.loss(16, 10, compile_=False),
}


@pytest.mark.parametrize("name", SMALL)
def test_contenders_agree_and_are_measured(name, one_thread):
    case = SMALL[name]()
    row = cpu.measure(case, 0.02)
    assert set(row["speedup"]) == set(case.peers)
    times = row["milliseconds"]
    assert set(times) == {"divqat", *case.peers, "copy", "copy into fresh memory"}
    assert all(0 < t["p20"] <= t["median"] <= t["p80"] and t["rounds"] >= 7 for t in times.values())
    ours = times["divqat"]["median"]
    assert row["gb_per_s"] == pytest.approx(case.bytes / ours / 1e6)
    n = sum(t.numel() for t in case.copied)
    assert case.bytes / n in (16.25, 20.25, 20, 12, 8)


def test_a_contender_that_is_wrong_gets_no_time():
    case = cases.fake_quantize(0.01)
    case.peers["wrong"] = lambda: [y + 1 for y in case.ours()]
    with pytest.raises(AssertionError):
        cpu.measure(case, 0.01)


def test_contenders_take_turns():
    order = []
    times = interleaved({name: lambda n=name: order.append(n) for name in "ab"}, 0.0, warmup=1)
    assert order == ["a", "b"] * 8 and times["a"]["rounds"] == 7


def test_the_steps_train_the_same_network(one_thread):
    contenders = steps.resnet20(2)
    assert list(contenders) == [
        "fp32", "divqat", "divqat, delayed ranges", "torch.ao, fused observers",
    ]  # fmt: skip
    for step in contenders.values():
        step()
    assert sum(w.numel() for w in cases.resnet50_weights()) == 25_502_912


def test_the_table_has_a_line_for_every_row():
    row = cpu.measure(cases.loss(4, 3, compile_=False), 0.01)
    step = {"name": "net", "milliseconds": {n: {"median": 2.0} for n in ("fp32", "divqat")}}
    text = cpu.table({"rows": [row], "steps": [step]})
    assert "divergence_loss, [4, 3]" in text and "| net, divqat | 2 | 1.00× |" in text


def test_the_gpu_benchmark_says_why_it_measures_nothing():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    from bench import cuda

    sys_argv, sys.argv = sys.argv, ["bench.cuda"]
    try:
        with pytest.raises(SystemExit, match="nothing to measure"):
            cuda.main()
    finally:
        sys.argv = sys_argv
