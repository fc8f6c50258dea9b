"""Which kernels serve which device, in which order of preference, and the reasons."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from divqat import ops
from divqat.ops import _backend, _native, _triton


@pytest.fixture
def machine(monkeypatch):
    """machine(backend, device, …) pretends that these are missing, and the rest is there."""

    def pretend(*missing):
        monkeypatch.setattr(
            _backend,
            "missing",
            lambda b, d: f"no {b} on {d}" if (b, d) in missing and b != "torch" else "",
        )
        monkeypatch.setattr(_triton, "missing", lambda d: _backend.missing("triton", d))
        monkeypatch.setattr(
            _native, "missing", lambda d: _backend.missing("native" if d == "cpu" else d, d)
        )

    return pretend


def test_the_order_of_preference_is_cuda_triton_torch(machine):
    machine()
    assert _backend._chosen("native") == {"cpu": "native", "cuda": "cuda"}
    machine(("cuda", "cuda"), ("triton", "cpu"))
    assert _backend._chosen("native") == {"cpu": "native", "cuda": "triton"}
    machine(("cuda", "cuda"), ("triton", "cuda"), ("triton", "cpu"))
    assert _backend._chosen("native") == {"cpu": "native", "cuda": "torch"}


def test_triton_serves_the_cpu_only_where_it_can(machine):
    machine(("triton", "cpu"))
    assert _backend._chosen("triton") == {"cpu": "native", "cuda": "triton"}
    machine(("native", "cpu"))
    assert _backend._chosen("triton") == {"cpu": "triton", "cuda": "triton"}
    assert _backend._chosen("cuda") == {"cpu": "torch", "cuda": "cuda"}
    for name in ("torch", "traceable"):
        assert _backend._chosen(name) == {"cpu": "torch", "cuda": "torch"}


@pytest.mark.parametrize(
    ("name", "missing", "reason"),
    [
        ("cuda", [("cuda", "cuda")], "wanted cuda, but no cuda on cuda"),
        ("native", [("native", "cpu")], "wanted native, but no native on cpu"),
        (
            "triton",
            [("triton", "cpu"), ("triton", "cuda")],
            "wanted triton, but no triton on cuda; no triton on cpu",
        ),
    ],
)
def test_asking_for_what_is_absent_is_an_error_that_says_why(machine, name, missing, reason):
    machine(*missing)
    with pytest.raises(RuntimeError, match=f"backend: {reason}"):
        ops.backend(name).__enter__()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_the_reasons_here():
    assert _triton.missing("cuda") == f"torch {torch.__version__} is built without CUDA"
    assert _native.missing("cuda")
    backend, reason = ops.backends()["fake_quantize"]["cuda"]
    assert backend == "torch" and reason == "no CUDA device is available"


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_environment_chooses_traceable():
    code = (
        "from divqat import ops\n"
        "print({backend for op in ops.backends().values() for backend, _ in op.values()})"
    )
    assert run(code, DIVQAT_BACKEND="traceable") == (0, "{'traceable'}\n")


@pytest.mark.slow
@pytest.mark.skipif(
    "not installed" in _triton.missing("cpu"), reason="the package triton is not installed"
)
def test_the_environment_chooses_triton_under_its_interpreter():
    code = (
        "import torch; from divqat import ops\n"
        "x, scale, zero = torch.tensor([0.26]), torch.tensor(0.1), torch.tensor(0).int()\n"
        "y = ops.fake_quantize(x, scale, zero, -8, 7)\n"
        "print(*ops.backends()['observe']['cpu'][:1], round(float(y), 3))\n"
        "with ops.backend('torch'): print(ops.backends()['observe']['cpu'][0])\n"
        "print(ops.backends()['observe']['cpu'][0])"
    )
    assert run(code, TRITON_INTERPRET="1", DIVQAT_BACKEND="triton") == (
        0,
        "triton 0.3\ntorch\ntriton\n",
    )
    code, said = run(code, DIVQAT_BACKEND="triton")
    if torch.version.cuda is None:
        assert code != 0 and "backend: wanted triton, but" in said and "TRITON_INTERPRET=1" in said
