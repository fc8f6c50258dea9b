"""Training steps train the same network, sweeps are fitted, tables are what was measured."""

import copy
import json
import re
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench/ is not installed
from bench import activations, case, curves, readme, run, scale, step, tables, tune
from bench.__main__ import parser
from bench.nets import NETWORKS, Network, weights
from divqat.models.resnet20 import BasicBlock, ResNet20
from divqat.ops._backend import best

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "new_garbage_only")]
ROOT = Path(__file__).parent.parent


OURS = f"divqat {best('cpu')}"


def tiny():
    """A ResNet-20 with one block in place of nine, which compiles sooner."""
    model = ResNet20(in_channels=3, num_classes=10)
    model.blocks = nn.Sequential(BasicBlock(16, 64, 2))
    return model


@pytest.fixture(scope="module")
def network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "tiny", Network(tiny, 16, 10, {}, {}, ()))
        yield "tiny"


@pytest.fixture(scope="module")
def setup(network):
    return step.set_up_case(network, 4, "cpu", torch.float32)


@pytest.fixture(scope="module")
def small(network):
    """All contenders, eager."""
    return step.measure(network, 16, "float32", "cpu", 0.0, modes=["eager"])


def test_every_opponent_trains(small, network):
    rows = {row["contender"]: row for row in small}
    timed = {name for name, row in rows.items() if "milliseconds" in row}
    peers = {"torch.ao FakeQuantize", "torch.ao fused", "torchao PT2E", "Brevitas", "PyTorch"}
    assert {"float", "divqat torch", *peers} <= timed, rows
    assert set(rows) - timed <= {name for name in rows if name.startswith("divqat native")}
    assert rows["float"]["over_float"] == 1
    for name in timed:
        row = rows[name]
        assert row["images_per_s"] == pytest.approx(16e3 / row["milliseconds"]["median"])
        assert row["mode"] == "eager" and row["extra_bytes"] > 0
        if name.startswith(("divqat", "PyTorch", "float")):
            # On a CPU, where nothing waits for it, the loss looks at the ends of its targets.
            assert row["syncs"] == (2 if "DivQAT" in name else 0), name
    assert rows["torch.ao FakeQuantize"]["syncs"] > 10 * len(weights(network))


def test_divqat_keeps_less_than_the_opponents(small):
    memory = {row["contender"]: row.get("extra_bytes") for row in small}
    ours = memory[OURS]
    for name in ("torch.ao fused", "torch.ao FakeQuantize", "torchao PT2E", "Brevitas", "PyTorch"):
        assert ours < memory[name], name


def test_options_do_what_they_are_for():
    """In a network that is deep enough for its activations to outweigh all else."""
    names = [OURS, f"{OURS}, saved as codes", f"{OURS}, a call per weight"]
    rows = step.measure("ResNet-20", 4, "float32", "cpu", 0.0, [f"={n}" for n in names], ["eager"])
    by_name = {row["contender"]: row for row in rows}
    ours, codes, single = (by_name[name] for name in names)
    assert codes["extra_bytes"] < 0.75 * ours["extra_bytes"] < 0.8 * single["extra_bytes"]
    assert single["operators"] - ours["operators"] == 22 - 1  # the backward passes gradients on


def test_a_misdirected_step_has_proxies_of_its_own(setup):
    one = step.Step(setup, step.recipes("cpu")[f"{OURS}, DivQAT, misdirected"], "eager")
    seen = []
    one.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    with one.serving():
        one(), one()
    n = len(setup.x)
    assert [len(x) for x in seen] == [n + n // 2] * 2
    assert seen[0][:n].equal(setup.x) and not seen[0][n:].equal(seen[1][n:])
    assert seen[0][n:].min() >= -1 and seen[0][n:].max() <= 1


def test_the_step_compiles_without_a_break(setup):
    """PyTorch's does so in the test of the compiled step. All that is in the other recipes is in
    these: of the plain one the model is that with a teacher, and the loss that of ``delayed``."""
    contained = {OURS, f"{OURS}, DivQAT, cached teacher"}
    for name, recipe in step.recipes("cpu").items():
        if not name.startswith(OURS) or "compiled" not in recipe.modes or name in contained:
            continue
        one = step.Step(setup, recipe, "eager")
        with one.serving():
            found = torch._dynamo.explain(one._compute)()
        assert found.graph_break_count == 0 and found.graph_count == 1, name
        torch._dynamo.reset()


def test_the_compiled_step_is_right(network, monkeypatch):
    # What Inductor makes of a step is test_compile's.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    rows = step.measure(network, 16, "float32", "cpu", 0.0, ["PyTorch"], ["compiled"])
    labels = {(row["contender"], row["mode"]): row for row in rows}
    assert set(labels) == {("float", "eager"), ("float", "compiled"), ("PyTorch", "compiled")}
    assert all("milliseconds" in row for row in rows), rows
    assert labels["PyTorch", "compiled"]["over_float_same_mode"] > 0


def test_a_step_that_does_not_train_the_network_gets_no_time(setup):
    def unquantized(model, x):
        return copy.deepcopy(model)

    def shuffled(model, x):
        model = copy.deepcopy(model)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 2:
                    p.mul_(-50)
        return model

    def detached(model, x):
        model = copy.deepcopy(model)
        model.unused = nn.Linear(2, 2)
        return model

    reference = step.Step(setup, step.recipes("cpu")["float"], "eager")
    for prepare, message in (
        (unquantized, "nothing is quantized"),
        (shuffled, "cosine|loss"),
        (detached, "no gradient of unused.weight"),
    ):
        row = {"contender": prepare.__name__}
        assert step.admit(setup, step.Recipe(prepare), "eager", row, reference) is None
        assert re.search(message, row["wrong"]), row

    def raises(model, x):
        raise RuntimeError("no such luck")

    row = {"contender": "raises"}
    assert step.admit(setup, step.Recipe(raises), "eager", row, reference) is None
    assert row["fails"] == "RuntimeError: no such luck"


def test_bfloat16_is_autocast(network):
    rows = step.measure(network, 16, "bfloat16", "cpu", 0.0, [f"={OURS}"], ["eager"])
    assert [row["contender"] for row in rows] == ["float", OURS]
    assert all("milliseconds" in row for row in rows), rows


def test_exponents_are_those_of_powers():
    x = [1, 10, 100, 1000, 10000, 100000]
    for k in (0.0, 1.0, 1.5):
        found, error = curves.exponent(x, [3 * v**k for v in x])
        assert found == pytest.approx(k, abs=1e-9) and error < 1e-6
    # fixed costs of the small sizes do not count
    assert curves.exponent(x, [1000 + v for v in x])[0] == pytest.approx(0.95, abs=0.1)
    assert curves.exponent([1, 2], [4.0, 2.0]) == (pytest.approx(-1), None)
    assert curves.exponent(x[::-1], [v**2 for v in x[::-1]])[0] == pytest.approx(2)


def test_every_sweep_has_points_that_are_measured(tmp_path, monkeypatch):
    # of the smallest inputs a large cache holds millions
    monkeypatch.setattr(case, "last_level_cache", lambda device: 2**16)
    made = activations.case

    def few(plan, device):  # of the four million whose time depends on the threads
        return made(replace(plan, shape=(min(plan.shape[0], 4096),)), device)

    monkeypatch.setattr(activations, "case", few)
    rows = []
    for sweep, sizes in {"elements": (64, 256), "classes": (3, 9), "layers": (1, 2)}.items():
        for size in sizes:
            rows += scale.point(sweep, size, "cpu", 0.0)
    threads = torch.get_num_threads()
    rows += scale.point("threads", 2, "cpu", 0.0)
    assert torch.get_num_threads() == threads
    assert {row["sweep"] for row in rows} == set(curves.SWEEPS) - {"batch"}
    memory = curves.curves(rows, "elements", "extra_bytes")
    assert memory[OURS][0] == [64, 256]
    # all weights cost one operator, however many there are
    ours = [r for r in rows if r["sweep"] == "layers" and r["contender"] == OURS]
    assert max(row["operators"] for row in ours) <= 2
    result = {"rows": rows, "hardware": "this", "date": "today"}
    from bench.plots import plot_scaling

    assert plot_scaling(result, str(tmp_path / "s.png")).stat().st_size > 1000
    assert "| divqat" in tables.scaling(result)
    for sweep in curves.SWEEPS:
        assert sweep == "threads" or len(scale.sizes(sweep, "cpu")) >= 5
        assert sweep == "threads" or len(scale.sizes(sweep, "cuda")) >= 5


def test_results_become_pictures_and_tables(tmp_path, small):
    from bench.plots import plot_rows, plot_steps

    result = {"rows": small, "hardware": "this", "date": "today", "device": "cpu"}
    assert plot_steps(result, str(tmp_path / "p.png")).stat().st_size > 1000
    text = tables.steps(result)
    assert "| Brevitas, eager | " in text and "images/s" in text
    made = run.make(run.Plan("fake_quantize", "small", (2, 3, 4, 5)), "cpu", 2)
    rows = run.measure(made, "cpu", 0.0, ["divqat", "torch.ao", "cooperative"])
    result["rows"] = rows
    assert plot_rows(result, str(tmp_path / "r.png")).stat().st_size > 1000
    text = tables.ops(result)
    assert "`--op fake_quantize --dtype float32 --layout contiguous`" in text
    assert "torch.ao fused" in text and "*absent*: torch.compile, cooperative_reductions" in text
    assert "small, float32, contiguous" in tables.cases(result)
    assert "| 0.03 |" in tables.costs(result)  # kept for the backward: one bit of 32


def test_the_tables_are_those_of_the_committed_results():
    """``python -m bench readme`` has been run."""
    text = readme.PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- bench (\S+) -->", text)) == set(readme.BLOCKS)
    assert readme.filled(text) == text, "run python -m bench readme"
    details = readme.RESULTS / "README.md"
    assert readme.details() == details.read_text(encoding="utf-8"), "run python -m bench readme"
    for name, (file, _) in readme.BLOCKS.items():
        if not (readme.RESULTS / file).is_file():
            assert name.startswith("cuda") and readme.block(name) == "Not measured."
            continue
        result = json.loads((readme.RESULTS / file).read_text())
        for key in ("command", "commit", "date", "hardware", "threads", "versions"):
            assert result[key]


def test_no_result_is_not_measured(tmp_path):
    text = "a\n<!-- bench cpu-ops -->\nold\n<!-- /bench -->\nb"
    wanted = "a\n<!-- bench cpu-ops -->\nNot measured.\n<!-- /bench -->\nb"
    assert readme.filled(text, tmp_path) == wanted
    assert readme.filled(wanted, tmp_path) == wanted
    assert "Not measured." in readme.details(tmp_path)


def test_every_command_that_is_written_down_is_understood():
    count = 0
    for file in (
        "docs/performance.md",
        "bench/README.md",
        "bench/gpu.sh",
        "bench/results/README.md",
    ):
        text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", "")
        call = (
            r" bench (?=run|step|scale|host|tune)"
            if file.endswith("gpu.sh")
            else "python -m bench "
        )
        for words in re.findall(call + r"([a-z][^`\n#…;]*)", text):
            words = words.replace("$WORK", "out").replace("$device", "cuda")
            parser().parse_args(shlex.split(words))
            count += 1
    assert count >= 10


def test_tuning_says_why_it_measures_nothing():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    args = parser().parse_args(["tune"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        tune.main(args)


def test_tiles_are_chosen_while_they_are_tried():
    pytest.importorskip("triton")
    from divqat.kernels import fake_quantize

    before = fake_quantize.block_of
    with tune.tiles(4096, 8):
        assert fake_quantize.block_of(10, torch.float32) == {"BLOCK": 4096, "num_warps": 8}
    assert fake_quantize.block_of is before
