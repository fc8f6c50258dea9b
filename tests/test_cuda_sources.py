"""The CUDA sources by what the compilers make of them: no device is needed, only a toolkit.

Every file compiles for the architectures that are built, as torch's extension builder would, keeps
to its registers and reads and writes 16 bytes at once; and the tensor side fits torch's headers.
"""

import re
import shutil

import pytest
from cubins import (
    ARCHITECTURES,
    CUDA,
    CUOBJDUMP,
    KERNELS,
    NVCC,
    accesses,
    check_tensor_side,
    cubin,
)
from cuda_emulator.build import compiler

pytestmark = pytest.mark.slow

# Two blocks of 256 threads per multiprocessor, or one of 512, have this many registers each.
MOST_REGISTERS = 128

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc (PATH, CUDA_HOME)")
needs_cuobjdump = pytest.mark.skipif(
    CUOBJDUMP is None, reason="there is no cuobjdump (PATH, CUDA_HOME, triton)"
)


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_keep_to_their_registers(source, architecture):
    report = cubin(source, architecture)[1]
    assert "warning" not in report, report
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    memory = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == len(kernels) and len(memory) >= len(kernels)
    assert set(memory) <= {("0", "0", "0")}, report
    assert max(registers, default=0) <= MOST_REGISTERS, report


def instructions(source: str, architecture: str) -> dict[str, str]:
    """The loads and stores of each kernel, by its mangled name."""
    functions = accesses(source, architecture).split("Function : ")[1:]
    return {code.split("\n", 1)[0].strip(): code for code in functions}


# Kernels for addresses off 16 bytes or runs that no pack fits take one element at a time (a width
# of 1 behind the element type); so do those that observe channel by channel.
ONE_BY_ONE = re.compile(r"(I[fd]|__half|__nv_bfloat16)Li1E|observe_runs|observe_columns")
STORES_SCALARS = "observe_tensor"  # by the kernel: the mangled name has the file's, too


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", [name for name in KERNELS if name != "launch.cu"])
def test_kernels_read_and_write_16_bytes_at_once(source, architecture):
    kernels = instructions(source, architecture)
    assert kernels
    for name, code in kernels.items():
        # Local memory is where spilled registers and arrays without a constant index go.
        # (A word boundary in front, too, would take four times as long.)
        assert not re.search(r"(LDL|STL)\b", code), name
        if ONE_BY_ONE.search(name):
            continue
        assert "LDG.E.128" in code, name
        assert "STG.E.128" in code or STORES_SCALARS in name, name


@needs_nvcc
def test_the_tensor_side_fits_torchs_cuda_headers():
    if shutil.which(compiler()[0]) is None:
        pytest.skip(f"there is no C++ compiler ({compiler()[0]})")
    check_tensor_side()


def test_nothing_asks_for_faster_arithmetic_that_rounds_or_flushes():
    """nvcc keeps subnormals and rounds divisions unless it is told otherwise."""
    flags = (CUDA / "nvcc_flags.txt").read_text().split()
    assert "-fmad=false" in flags
    assert not [f for f in flags if re.search(r"fast_math|ftz|prec-(div|sqrt)", f)]
