"""``make test-package``: sdist and wheel are whole, and the wheel runs the five lines."""

import os
import re
import subprocess
import sys
import venv

import pytest
import torch
from pages import ROOT

# What a reader has before the five lines.
BEFORE = """
import torch
from torch import nn
torch.manual_seed(0)
images, labels = torch.rand(20, 1, 8, 8) * 2 - 1, torch.arange(20) % 10
loader, secret = [(images, labels)] * 3, 731
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
)
"""
AFTER = """
import importlib.util
assert torch.isfinite(loss)
print(divqat.__version__, divqat.__file__, importlib.util.find_spec("onnx"))
"""


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of an sdist and of the wheel that is built from it, in an isolated environment."""
    out = tmp_path_factory.mktemp("dist")
    environment = os.environ | {"DIVQAT_BUILD": "python"}
    said = run(sys.executable, "-m", "build", "--outdir", out, ROOT, env=environment)
    assert "warning" not in said.lower(), said
    return out


def test_twine_accepts_what_is_built(built):
    files = sorted(built.iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"]
    said = run(sys.executable, "-m", "twine", "check", "--strict", *files)
    assert said.count("PASSED") == 2


def test_the_wheel_runs_the_five_lines_in_an_empty_environment(built, tmp_path):
    """Which has what the wheel itself asks for, torch and numpy, and nothing else; torch is the one
    that is installed here, as PyPI's brings gigabytes for GPUs."""
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, wheel, f"torch=={torch.__version__}")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    said = run(python, "-W", "error", "-c", BEFORE + code + AFTER, cwd=tmp_path)
    version, file, onnx = said.split()
    assert file.startswith(str(tmp_path)) and onnx == "None"
    assert wheel.name.startswith(f"divqat-{version}-")
