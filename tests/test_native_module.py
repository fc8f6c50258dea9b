"""The module that brings the native kernels: checks, switches, hooks."""

import os
import subprocess
import sys
from pathlib import Path

import backends
import pytest
import torch
from cuda_emulator.build import why_not
from testing import randn, same, tensor

from divqat import ops
from divqat.ops import _native

extension = _native.extension
if extension is None:
    pytest.skip(f"no native kernels: {_native.missing('cpu')}", allow_module_level=True)

call = torch.ops.divqat
SETS = extension.instruction_sets()
# What checks its arguments in C++: the CPU kernels, and the CUDA ones where they can be emulated.
KERNELS = [SETS[0], *([backends.EMULATED] if why_not() is None else [])]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("name", "args", "error", "words"),
    [
        ("fake_quantize", {"scale": torch.ones(2)}, ValueError, r"scale: wanted 1 value"),
        ("fake_quantize", {"scale": torch.ones(()).double()}, TypeError, "scale: wanted Float"),
        ("fake_quantize", {"zero_point": torch.zeros(())}, TypeError, "zero_point: wanted Int"),
        ("fake_quantize", {"x": torch.ones(3).int()}, TypeError, "x: wanted float32"),
        ("fake_quantize", {"ch_axis": 2}, IndexError, "ch_axis: wanted an axis of x with 1 dims"),
        ("fake_quantize", {"quant_max": -128}, ValueError, "quant_min < quant_max"),
    ],
)
def test_the_kernels_check_what_they_are_given(kernels, name, args, error, words):
    given = {
        "x": torch.zeros(3),
        "scale": torch.ones(()),
        "zero_point": torch.zeros((), dtype=torch.int32),
        "quant_min": -128,
        "quant_max": 127,
        "ch_axis": None,
        "propagate_nan": True,
    } | args
    with backends.serving(kernels), pytest.raises(error, match=words):
        getattr(call, name)(*given.values())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("grad", "mask", "error", "words"),
    [
        (torch.zeros(9), torch.zeros(1, dtype=torch.uint8), ValueError, "mask: wanted 2"),
        (torch.zeros(9), torch.zeros(2), TypeError, "mask: wanted uint8"),
        (
            torch.zeros(9, 4)[:, ::2],
            torch.zeros(3, dtype=torch.uint8),
            ValueError,
            "grad_y: wanted",
        ),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(kernels, grad, mask, error, words):
    with backends.serving(kernels), pytest.raises(error, match=words):
        call.fake_quantize_backward(grad, mask)


def test_backend_switches_and_says_what_is_wrong():
    assert ops.backends()["fake_quantize"]["cpu"] == ("native", "")
    with ops.backend("torch"):
        name, reason = ops.backends()["fake_quantize"]["cpu"]
        assert name == "torch" and reason == "the native kernels are switched off"
        with ops.backend("native"):
            assert ops.backends()["observe"]["cpu"] == ("native", "")
        assert ops.backends()["observe"]["cpu"][0] == "torch"
    assert ops.backends()["observe"]["cpu"] == ("native", "")
    with pytest.raises(ValueError, match=r"wanted one of native, .*, traceable, got 'gpu'"):
        ops.backend("gpu").__enter__()


@pytest.mark.slow
def test_a_wrong_backend_in_the_environment_is_an_error():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from divqat import ops; print(ops.backends()['observe']['cpu'][0])",
        ],
        env=os.environ | {"DIVQAT_BACKEND": "gpu"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 1 and "backend: wanted one of" in done.stderr


def test_every_op_has_a_native_cpu_kernel():
    assert {devices["cpu"] for devices in ops.backends().values()} == {("native", "")}


def test_instruction_sets():
    assert SETS[-1] == "portable" and extension.instruction_set() in SETS
    with pytest.raises(ValueError, match=r"name: wanted one of .*portable, got mmx"):
        extension.use_instruction_set("mmx")
    with pytest.raises(ValueError, match="this build has no kernels for tpu"):
        extension.Registration("tpu")


@pytest.mark.parametrize("elements", [1, 100, 10**6])
def test_the_plan_of_the_weights_covers_every_row_once(elements):
    shapes = [(64, 147), (10, 1), (1, 5000), (0, 3), (7, 0), (513, 33)]
    rows = [(i, r) for i, (n, columns) in enumerate(shapes) if columns for r in range(n)]
    tasks = extension.WeightsPlan(shapes, elements).tasks
    assert [(t.weight, r) for t in tasks for r in range(t.row_begin, t.row_end)] == rows
    for task in tasks:
        columns = shapes[task.weight][1]
        assert task.row_end - task.row_begin == 1 or (
            (task.row_end - task.row_begin) * columns <= elements
        )


def test_no_destructor_may_throw():
    """It would end the process: two at once, or one while another error is on its way."""
    sources = [p for p in (Path(__file__).parent.parent / "csrc").rglob("*.*") if p.is_file()]
    assert len(sources) > 40
    assert not [p for p in sources if "noexcept(false)" in p.read_text()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_there_is_one_openmp_runtime():
    """A second one would bring threads that fight with torch's."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    libraries = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}
    here = {line.split()[-1] for line in maps if "divqat/_C" in line}
    assert here
    # scikit-learn and others may have loaded their own copy: ours must have come with torch
    assert any("/torch/" in library or "/conda" in library for library in libraries)


def test_the_kernels_use_torchs_threads():
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert extension.threads() == n
    finally:
        torch.set_num_threads(threads)


def test_benchmark_hooks_do_the_work():
    x, y = randn(1001).mul_(3), torch.zeros(1001)
    mask = torch.zeros(126, dtype=torch.uint8)
    extension.fake_quantize_cpu(
        x.data_ptr(), y.data_ptr(), mask.data_ptr(), 1001, 0.05, 3.0, -20.0, 20.0
    )
    same([y, mask], call.fake_quantize(x, tensor(0.05), torch.tensor(3).int(), -20, 20, None, True))
    extension.copy_cpu(y.data_ptr(), x.data_ptr(), 4 * 1001)
    assert torch.equal(x, y)
