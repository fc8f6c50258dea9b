"""``python -m bench runtimes``: figures by hand, a real row, rows with a reason."""

import argparse
import importlib.util

import pytest
import torch

from bench import runtimes
from bench.runtime_targets import Target
from bench.runtimes import compared, measure, missed_bars


def options(*more):
    parser = argparse.ArgumentParser()
    runtimes.add_arguments(parser)
    quick = ["--networks", "lenet", "--presets", "x86", "--steps", "2"]
    return parser.parse_args([*quick, *more])


def test_figures_by_hand():
    wanted = torch.tensor([[255.0, 0.0], [10.0, 9.0], [0.0, 100.0]])  # a step is 1
    got = torch.tensor([[252.0, 0.0], [9.0, 10.0], [0.0, 100.0]])
    row = compared(wanted, got, torch.tensor([0, 0, 0]))
    assert row["images"] == 3 and row["steps_most"] == 3
    assert row["steps_mean"] == pytest.approx(5 / 6)
    assert row["agreement"] == pytest.approx(2 / 3) and row["agreement_decided"] == 1
    assert (row["accuracy_trained"], row["accuracy"]) == pytest.approx((2 / 3, 1 / 3))


@pytest.mark.slow
def test_a_network_in_onnx_runtime(monkeypatch):
    monkeypatch.setattr(runtimes, "ROUNDS", 2)
    [row] = measure("lenet", "x86", ["ONNX Runtime"], 40, 0)
    assert "error" not in row and not missed_bars([row])
    assert row["agreement_decided"] == 1 and row["steps_most"] < 2 and row["saturating"] == 0
    assert row["accuracy"] > 0.5 and row["bytes"]["int8"] < row["bytes"]["float"] / 2
    assert f"{100 * row['agreement']:.1f} %, " in runtimes.tables([row])


def test_what_a_runtime_cannot_do_is_a_row_and_a_missed_bar(monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("no kernel of\nthis kind")

    broken = Target("no-such-package", ".x", refuse, refuse)
    monkeypatch.setattr(runtimes, "TARGETS", {"Broken": broken})
    with pytest.raises(SystemExit, match=r"lenet, x86, Broken: RuntimeError: no kernel of$"):
        runtimes.main(options("--check"))
    out = capsys.readouterr().out
    assert "| lenet | x86 | RuntimeError: no kernel of |" in out


@pytest.mark.skipif(importlib.util.find_spec("openvino") is not None, reason="it is installed")
def test_a_runtime_that_is_not_installed_says_what_to_install():
    [row] = measure("lenet", "x86", ["OpenVINO"], 1, 0)
    assert "pip install 'divqat[openvino]'" in row["error"]


def test_bars():
    row = {"network": "n", "preset": "x86", "runtime": "r", "saturating": 0}
    assert missed_bars([{**row, "agreement_decided": 0.994}])
    assert missed_bars([{**row, "agreement_decided": None}])
    assert not missed_bars([{**row, "agreement_decided": 0.996}])
    assert not missed_bars([{**row, "agreement_decided": 0.9, "saturating": 1}])
