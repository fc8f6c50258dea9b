"""Timing takes turns, the profiler's counts are those worked by hand, a stopped run goes on."""

import argparse
import contextlib
import csv
import io
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench/ is not installed
from bench import case, command, compare, run
from bench.__main__ import parser
from bench.environment import environment
from bench.measure import Runner, costs, interleaved, saved_bytes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def test_contenders_take_turns_back_and_forth_inside_their_blocks():
    order, inside = [], []

    @contextlib.contextmanager
    def serving():
        inside.append(True)
        yield
        inside.pop()

    def call(name):
        return lambda i: order.append((name, i, bool(inside)))

    times = interleaved(
        {"a": Runner(call("a")), "b": Runner(call("b"), serving)}, "cpu", 0.0, warmup=1, rounds=3
    )
    names = [name for name, _, _ in order]
    assert names == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [i for name, i, _ in order if name == "a"] == [0, 0, 1, 2]  # inputs take turns
    assert all(was_inside == (name == "b") for name, _, was_inside in order)
    assert times["a"]["rounds"] == 3 and times["a"]["p20"] <= times["a"]["p80"]


def test_costs_are_those_worked_by_hand():
    x = torch.ones(1000)
    found = costs(Runner(lambda i: x.exp().sum()), "cpu")
    assert found == {"operators": 2, "syncs": 0, "launches": None, "extra_bytes": 4000 + 4}
    assert costs(Runner(lambda i: [x.exp(), x.exp()]), "cpu")["extra_bytes"] == 8000
    assert costs(Runner(lambda i: (x.exp(), None)[1] or x.exp()), "cpu")["extra_bytes"] == 4000
    found = costs(Runner(lambda i: x.sum().item() + float(x[0])), "cpu")
    assert found["syncs"] == 2
    nested = costs(Runner(lambda i: torch.nn.functional.linear(x[None], x[None])), "cpu")
    assert nested["operators"] == 3  # two views and linear, whatever that calls


def test_compiled_graphs_count_as_one_operator():
    function = torch.compile(lambda x: (x.exp() + 1).sin().sum(), backend="inductor")
    x = torch.ones(1000)
    function(x)
    assert costs(Runner(lambda i: function(x)), "cpu")["operators"] == 1


def test_what_is_kept_for_the_backward_counts_once_per_storage():
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: x.exp(), []) == 4000  # its result
    assert saved_bytes(lambda: x.sin(), []) == 4000  # its input
    assert saved_bytes(lambda: x.sin(), [x]) == 0  # which lives anyway
    assert saved_bytes(lambda: x.sin() + x.cos(), []) == 4000
    assert saved_bytes(lambda: x + 1, []) == 0


def arguments(*words):
    return parser().parse_args(list(words))


@pytest.fixture
def quick(monkeypatch):
    """Two cases whose measurement is noted and takes no time."""
    measured = []

    def measure(case, device, seconds, names=None):
        measured.append(case.plan.key)
        row = dict(zip(run.KEY, case.plan.key, strict=True))
        times = {"median": 1.0, "p20": 0.9, "p80": 1.1, "rounds": 7}
        counts = {"launches": None, "operators": 2, "syncs": 0, "extra_bytes": 1, "saved_bytes": 1}
        rates = {"gb_per_s": 1.0, "share_of_copy": 1.0, "bytes": 1.0}
        return [{**row, "contender": "divqat torch", "milliseconds": times, **counts, **rates}]

    monkeypatch.setattr(run, "measure", measure)
    # of the smallest inputs a large cache holds millions
    monkeypatch.setattr(case, "last_level_cache", lambda device: 2**16)
    return measured


ASK = ["run", "--op", "divergence_loss", "--on", "[64, 10]", "--device", "cpu"]


def test_a_run_that_was_stopped_goes_on(tmp_path, quick, monkeypatch, capsys):
    file = str(tmp_path / "x.json")
    args = arguments(*ASK, "--json", file)
    real = run.measure

    def interrupted(case, *rest):
        if quick:
            raise KeyboardInterrupt
        return real(case, *rest)

    monkeypatch.setattr(run, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        args.main(args)
    first = json.loads(Path(file).read_text())
    assert len(first["rows"]) == 1 and len(quick) == 1
    monkeypatch.setattr(run, "measure", real)
    args.main(args)
    assert len(quick) == 2 and quick[0] != quick[1]
    args.main(args)
    assert len(quick) == 2  # nothing is left to do
    result = json.loads(Path(file).read_text())
    for key in ("command", "commit", "date", "hardware", "threads", "versions", "native_kernels"):
        assert result[key]
    assert {"torchao", "brevitas", "liger-kernel"} <= result["versions"].keys()
    other = arguments(*ASK, "--json", file, "--seconds", "3")
    with pytest.raises(SystemExit, match="has a run with other seconds"):
        other.main(other)


def test_time_that_is_over_is_said(quick, capsys):
    args = arguments(*ASK, "--minutes", "0.0000001")
    args.main(args)
    assert not quick and capsys.readouterr().err.count("not measured") == 2


def test_rows_become_csv(tmp_path, quick, capsys):
    file = tmp_path / "x.csv"
    args = arguments(*ASK, "--csv", str(file))
    args.main(args)
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert len(rows) == 2 and rows[0]["median_ms"] == "1.0" and rows[0]["op"] == "divergence_loss"
    assert "1.000 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on", "no such shape"], "no case"),
        (["--seconds", "0"], "--seconds: wanted more than 0, got 0"),
        (["--threads", "-1"], "--threads: wanted more than 0, got -1"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_bad_options_are_errors(words, message, quick):
    if words[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    args = arguments("run", *words)
    with pytest.raises(SystemExit, match=message):
        args.main(args)


def test_the_cases_can_be_listed(capsys, quick):
    args = arguments(*ASK, "--list")
    args.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"divergence_loss, logits [64, {c}], {d}, contiguous" for d, c in (
        ("float32", 10), ("float32", 100), ("float32", 1000),
        ("bfloat16", 10), ("bfloat16", 100), ("bfloat16", 1000),
    )][:len(lines)] or len(lines) == 2  # fmt: skip


def result(rows, **changes):
    base = {"bench": "run", "hardware": "this", "threads": 2, "device": "cpu", "seconds": 1.0}
    return base | {"rows": rows} | changes


def row(name="divqat", median=1.0, spread=0.1, **changes):
    identity = dict(zip(run.KEY, ("op", "on", "float32", "contiguous"), strict=True))
    times = {"median": median, "p20": median - spread, "p80": median + spread, "rounds": 9}
    return {**identity, "contender": name, "milliseconds": times, **changes}


def test_only_what_is_outside_the_noise_is_faster_or_slower():
    before = [row("a"), row("b"), row("c"), row("gone")]
    after = [row("a", 0.5), row("b", 1.1), row("c", 2.0), row("new")]
    text = compare.compared(result(before), result(after, threads=1))
    lines = text.splitlines()
    assert lines[0] == "threads: 2 -> 1"
    assert any(line.startswith("faster   0.50x") for line in lines)
    assert any(line.startswith("slower   2.00x") for line in lines)
    assert not any(line.startswith("same") for line in lines)
    assert "same   " in compare.compared(result(before), result(after), everything=True)
    assert any(line.startswith("only after") and "new" in line for line in lines)
    assert any(line.startswith("only before") and "gone" in line for line in lines)
    assert "   0.50x over 1 rows  a" in text


def test_a_contender_that_began_to_fail_is_said():
    broken = row("a")
    del broken["milliseconds"]
    text = compare.compared(result([row("a")]), result([broken | {"wrong": "half a step"}]))
    assert "timed -> wrong" in text


def test_compare_reads_results_of_one_command_only(tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    paths[0].write_text(json.dumps(result([row()])))
    paths[1].write_text(json.dumps(result([], bench="step")))
    paths[2].write_text("{}")

    def compared(a, b):
        args = argparse.Namespace(before=str(a), after=str(b), all=False)
        compare.main(args)

    compared(paths[0], paths[0])
    assert "1.00x over 1 rows" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="wanted results of one command, got run and step"):
        compared(paths[0], paths[1])
    for bad in (paths[2], tmp_path / "none.json"):
        with pytest.raises(SystemExit, match="is not a result"):
            compared(paths[0], bad)


def test_a_part_of_a_name_is_enough():
    assert command.matches("torch.ao fused", ["FUSED"]) and command.matches("x", None)
    assert not command.matches("torch.ao fused", ["brevitas"])
    assert command.matches("divqat", ["=DivQAT"])
    assert not command.matches("divqat cpp", ["=divqat"])


def test_by_turns_a_case_of_each_op_comes_first(capsys):
    words = ["run", "--device", "cpu", "--layout", "contiguous", "--list", "--by-turns"]
    args = arguments(*words)
    args.main(args)
    ops = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert set(ops[: len(run.OPS)]) == set(run.OPS) and len(ops) > 2 * len(run.OPS)


def test_contenders_can_be_left_out():
    plan = case.Plan("divergence_loss", "logits [64, 10]", (64, 10))
    whole = run.make(plan, "cpu", 1)
    names = set(run.without(whole, ["torch.compile", "=pytorch, eager"]).contenders)
    left_out = set(whole.contenders) - names
    assert "PyTorch, eager" in left_out and "torch.compile" in left_out and "divqat torch" in names
    assert run.without(whole, None) is whole


def test_a_commit_is_known_without_git_if_it_is_given(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("DIVQAT_COMMIT", raising=False)
    assert environment("x")["commit"] == "unknown"
    monkeypatch.setenv("DIVQAT_COMMIT", "1234abc")
    assert environment("x")["commit"] == "1234abc"
