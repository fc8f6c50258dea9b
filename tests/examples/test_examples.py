"""The examples train a defended model, each in its framework: make test-examples.

Not collected by ``make test``, as the frameworks are not installed there. Without them these tests
fail.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PLAIN_MISLED = 0.2  # at most; a tenth of the proxies get the decoy's class from the float model


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def run(name, out, *arguments):
    return importlib.import_module(name).main(["--out", str(out), *arguments])


def check(result, out):
    """Trained, deployed and defended."""
    assert (out / "model.onnx").stat().st_size > 0
    assert result["accuracy"] > 0.85 and result["agreement"] > 0.97
    assert result["misled"] > 1.5 * PLAIN_MISLED


@pytest.mark.parametrize("name", ["huggingface_trainer", "accelerate_loop", "timm_loop"])
def test_the_example_defends_a_model(name, tmp_path):
    result = run(name, tmp_path)
    check(result, tmp_path)
    assert result["budget"].finished and result["budget"].summary()["path"]
    if "evaluated" in result:
        assert result["evaluated"] > 0.85


def test_lightning_defends_a_model_and_resumes(tmp_path):
    """A budget that is hardly met: the last third is repeated."""
    result = run("lightning_module", tmp_path)
    check(result, tmp_path)
    module = result["module"]
    saved = sorted((tmp_path / "checkpoints").glob("*.ckpt"), key=os.path.getmtime)
    state = torch.load(saved[2], weights_only=False)
    assert state["budget"]["epoch"] == 3
    resumed = run("lightning_module", tmp_path / "resumed", "--resume", str(saved[2]))
    check(resumed, tmp_path / "resumed")
    assert resumed["module"].budget.finished and resumed["module"].budget is not module.budget
    # the epochs before were not repeated
    again = list((tmp_path / "resumed" / "checkpoints").glob("*.ckpt"))
    assert again and all("epoch=0" not in path.name for path in again)


def test_trainer_resumes_with_the_same_bits(tmp_path):
    """A budget that cannot be met: Trainer goes back twice, the checkpoint is in between."""
    few = ("--epochs", "3", "--points", "0.01")
    whole = run("huggingface_trainer", tmp_path, *few)
    steps = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    if len(steps) < 4:
        pytest.fail(f"wanted a repeated last third, got the budget met at once: {steps}")
    kept = tmp_path / f"checkpoint-{steps[2]}"
    assert torch.load(kept / "budget.pt")["attempts"]
    resumed = run("huggingface_trainer", tmp_path / "resumed", *few, "--resume", str(kept))
    wanted, found = (result["budget"].model.state_dict() for result in (whole, resumed))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert resumed["budget"].summary() == whole["budget"].summary()


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("lightning_module", ["--precision", "bf16-mixed"]),
        ("huggingface_trainer", ["--bf16", "--accumulate", "2"]),
        ("accelerate_loop", ["--precision", "bf16", "--accumulate", "2"]),
        ("timm_loop", ["--mixup", "0"]),
    ],
)
def test_mixed_precision_and_accumulated_gradients(name, arguments, tmp_path):
    check(run(name, tmp_path, *arguments), tmp_path)


def test_accelerate_in_two_processes(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "examples" / "accelerate_loop.py"), "--out", str(tmp_path),
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    accuracy, agreement, misled = map(float, re.findall(r"([\d.]+)%", done.stdout)[-3:])
    shares = {"accuracy": accuracy / 100, "agreement": agreement / 100, "misled": misled / 100}
    check(shares, tmp_path)
    assert done.stdout.count("accuracy budget: epoch 1 of 6") == 1  # printed by one process
