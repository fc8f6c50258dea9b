"""The Triton kernels by what Triton's compiler makes of them: no device is needed.

The launchers run as they are, for a GPU that is not there (``bench/absent_gpu.py``), so that what
is looked at are the specializations that a real one would run.
"""

import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from testing import tensor

from divqat.ops import _triton

if _triton.missing("cpu") == "the package triton is not installed":
    pytest.skip("the package triton is not installed", allow_module_level=True)
if _triton.interpreted():
    pytest.skip("compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)

import triton

from divqat.ops._library import SCHEMAS
from divqat.ops._triton import launcher

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench/ is not installed
from bench import triton_host
from bench.absent_gpu import absent_gpu

pytestmark = pytest.mark.slow

ARCHITECTURES = [80, 90]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# 256 threads with this many registers fit twice into a multiprocessor, 512 once. float64, which
# nobody trains in, may have more.
MOST_REGISTERS = 128
# Loads and stores that are scalar by nature: rows of 10 or 1000 classes do not begin on 16 bytes.
UNALIGNED = "_divergence_loss"
REDUCTIONS = {"_observe", "_delayed", "_lsq_backward", "_divergence_loss"}


def kernels():
    """The jitted functions of all files, by name."""
    modules = {_triton.module_of(name) for name in SCHEMAS}
    found = {}
    for module in modules:
        for name, value in vars(importlib.import_module(f"divqat.kernels.{module}")).items():
            if isinstance(value, triton.JITFunction) and name.startswith("_"):
                found[name] = value
    return found


def activations(dtype):
    """(x, ch_axis): per tensor, per channel, and per channel in channels_last."""
    images = torch.empty(16, 64, 32, 32, dtype=dtype)
    yield images, None
    yield images, 1
    yield images.to(memory_format=torch.channels_last), 1


def elementwise(x, ch_axis):
    """op (and mode) → call, for an activation."""
    shape = [] if ch_axis is None else [x.shape[ch_axis]]
    scale, zero_point = torch.ones(shape), torch.zeros(shape, dtype=torch.int32)
    state = (torch.zeros(shape), torch.zeros(shape), scale, zero_point)
    offset, options = torch.zeros(shape), (0, 255, ch_axis, 0.1, False)
    mask = torch.empty(x.numel() // 8, dtype=torch.uint8)

    def observed(mode):
        return lambda: launcher("fake_quantize_observed")(x, *state, *options, mode, True)

    return {
        "fake_quantize": lambda: launcher("fake_quantize")(
            x, scale, zero_point, -128, 127, ch_axis, True
        ),
        "fake_quantize_backward": lambda: launcher("fake_quantize_backward")(x, mask),
        "observe": lambda: launcher("observe")(x, *state, *options, True),
        "exact": observed("exact"),
        "delayed": observed("delayed"),
        "frozen": observed("frozen"),
        "fake_quantize_lsq": lambda: launcher("fake_quantize_lsq")(
            x, scale, offset, -8, 7, ch_axis
        ),
        "fake_quantize_lsq_backward": lambda: launcher("fake_quantize_lsq_backward")(
            x, x, scale, offset, -8, 7, ch_axis, 0.1
        ),
    }


def weights_ops(dtype):
    shapes = [(64, 64, 3, 3), (64, 3, 7, 7), (10, 64)]
    weights = [torch.empty(shape, dtype=dtype) for shape in shapes]
    return {
        "fake_quantize_weights": lambda: launcher("fake_quantize_weights")(weights, -127, 127, 0),
        "fake_quantize_weights_backward": lambda: launcher("fake_quantize_weights_backward")(
            weights, weights, -128, 127, 0
        ),
    }


def loss_ops(dtype, n=64, c=10, direction="js", classes="non_label"):
    logits, target = torch.empty(n, c, dtype=dtype), torch.zeros(n, dtype=torch.int64)
    one = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    options = (4.0, direction, classes, 0.5, True, 0.1, -100)
    return {
        "divergence_loss": lambda: launcher("divergence_loss")(
            logits, logits, target, tensor(0.1), *options
        ),
        "divergence_loss_backward": lambda: launcher("divergence_loss_backward")(logits, one),
    }


@pytest.fixture(scope="module")
def compiled():
    """(architecture, dtype) → the kernels, compiled once."""

    @cache
    def compile_all(arch, dtype):
        before = {key for k in kernels().values() for key in id_of(k, arch)}
        with absent_gpu(arch):
            for x, ch_axis in activations(dtype):
                for call in elementwise(x, ch_axis).values():
                    call()
            for call in weights_ops(dtype).values():
                call()
            for c in (10, 1000, 4096, 21841):
                for direction in ("student_teacher", "js"):
                    for call in loss_ops(dtype, c=c, direction=direction).values():
                        call()
        found = {key: k for f in kernels().values() for key, k in id_of(f, arch).items()}
        return [k for key, k in found.items() if key not in before]

    return compile_all


def id_of(function, arch):
    caches = function.device_caches  # looking up an unknown device would ask for its driver
    return {id(k): k for k in caches[arch][0].values()} if arch in caches else {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_is_spilled(compiled, tmp_path, arch, dtype):
    seen = set()
    for i, kernel in enumerate(compiled(arch, dtype)):
        path = tmp_path / f"{i}.cubin"
        path.write_bytes(kernel.asm["cubin"])
        done = subprocess.run(
            [CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True
        )
        usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", done.stdout)
        registers, stack, local = map(int, usage.groups())
        assert (stack, local) == (0, 0), (kernel.name, done.stdout)
        assert registers <= (255 if dtype == torch.float64 else MOST_REGISTERS), kernel.name
        seen.add(kernel.name)
    assert seen == {
        "_fake_quantize", "_masked_grad", "_observe", "_delayed", "_lsq_backward",
        "_quantize_weights", "_divergence_loss", "_scale_in_place",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_memory_is_read_and_written_16_bytes_at_once(compiled, arch, dtype):
    for kernel in compiled(arch, dtype):
        ptx = kernel.asm["ptx"]
        if kernel.name == UNALIGNED:
            continue
        wide = r"global(\.\w+)*\.(v4\.b32|v2\.b64)"
        assert re.search(r"\bld\." + wide, ptx), kernel.name
        assert re.search(r"\bst\." + wide, ptx) or kernel.name == "_observe", kernel.name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_arithmetic_is_ieee_and_the_last_program_sees_what_the_others_stored(compiled, arch, dtype):
    for kernel in compiled(arch, dtype):
        ptx = kernel.asm["ptx"]
        assert not re.search(r"\bdiv\.(full|approx)", ptx), kernel.name
        if kernel.name != "_divergence_loss":  # libdevice's exponentials use FMA on purpose
            assert not re.search(r"\bfma\b", ptx), kernel.name
            assert ".ftz" not in ptx, kernel.name  # subnormals are not flushed
        if kernel.name in {"_fake_quantize", "_delayed", "_lsq_backward", "_quantize_weights"}:
            assert "cvt.rni" in ptx and "div.rn.f32" in ptx, kernel.name
        if kernel.name in REDUCTIONS:
            assert re.search(r"atom\.(acq_rel\.gpu\.global|global\.gpu\.acq_rel)", ptx), kernel.name
            assert re.search(r"ld\.global\.cg", ptx), kernel.name


def launches_of(call):
    with absent_gpu(90) as gpu:
        call()
    return gpu.launches


@pytest.mark.parametrize(
    ("name", "launches"),
    [
        ("fake_quantize", 1),
        ("fake_quantize_backward", 1),
        ("observe", 1),
        ("exact", 2),
        ("delayed", 1),
        ("frozen", 1),
        ("fake_quantize_lsq", 1),
        ("fake_quantize_lsq_backward", 1),
    ],
)
def test_launches_of_an_activation(name, launches):
    assert len(launches_of(elementwise(torch.empty(16, 64, 32, 32), None)[name])) == launches


def test_launches_of_all_weights_and_of_the_loss():
    for call in weights_ops(torch.float32).values():
        assert launches_of(call) == ["_quantize_weights"]
    for call in loss_ops(torch.float32).values():
        assert len(launches_of(call)) == 1
    many = loss_ops(torch.float32, n=9000)["divergence_loss"]
    assert launches_of(many) == ["_count", "_divergence_loss"]


def test_a_new_batch_size_compiles_nothing():
    def run(batch):
        x = torch.empty(batch, 64, 32, 32)
        for call in elementwise(x, None).values():
            call()
        for call in elementwise(x, 1).values():
            call()
        loss_ops(torch.float32, n=batch)["divergence_loss"]()

    with absent_gpu(90) as gpu:
        run(4)
        run(512)
        known = sum(len(id_of(k, 90)) for k in kernels().values())
        for batch in (1, 2, 5, 6, 96, 130, 257, 511):
            run(batch)
        assert sum(len(id_of(k, 90)) for k in kernels().values()) == known
        assert gpu.launches


def test_the_host_benchmark_measures_every_op():
    with absent_gpu(90):
        found = set()
        for name, call in triton_host.calls(torch.device("cpu")).items():
            op, bare = triton_host.measure(name, call, 0.0)
            assert min(row["milliseconds"]["median"] for row in (op, bare)) > 0
            assert op["launches"] >= 1
            found.add(name.partition(",")[0].split()[0])
    assert found == set(SCHEMAS)
