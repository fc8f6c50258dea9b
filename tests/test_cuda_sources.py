"""The CUDA sources by what the compilers make of them: no device is needed, only a toolkit.

Every file compiles for the architectures that are built, as torch's extension builder would, keeps
to its registers and reads and writes 16 bytes at once; and the tensor side fits torch's headers.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cubins import ARCHITECTURES, CUDA, KERNELS, NVCC, cubin, tool
from torch.utils.cpp_extension import include_paths

pytestmark = pytest.mark.slow

# Two blocks of 256 threads per multiprocessor, or one of 512, have this many registers each.
MOST_REGISTERS = 128


CUOBJDUMP = tool("cuobjdump")
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


def instructions(path: Path) -> dict[str, str]:
    """The machine code of each kernel of a cubin, by its mangled name."""
    done = subprocess.run(
        [CUOBJDUMP, "-sass", str(path)], capture_output=True, text=True, check=True
    )
    functions = done.stdout.split("Function : ")[1:]
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
    kernels = instructions(cubin(source, architecture)[0])
    assert kernels
    for name, code in kernels.items():
        # Local memory is where spilled registers and arrays without a constant index go.
        # (A word boundary in front, too, would take four times as long.)
        assert not re.search(r"(LDL|STL)\b", code), name
        if ONE_BY_ONE.search(name):
            continue
        assert "LDG.E.128" in code, name
        assert "STG.E.128" in code or STORES_SCALARS in name, name


def toolkit_headers(folder: Path) -> Path:
    """Where nvcc, which may be a script that calls another one, has its headers."""
    empty = folder / "empty.cu"
    empty.touch()
    done = subprocess.run([NVCC, "-M", str(empty)], capture_output=True, text=True, check=True)
    return Path(re.search(r"(\S+)/cuda_runtime\.h\b", done.stdout)[1])


@needs_nvcc
def test_the_tensor_side_fits_torchs_cuda_headers(tmp_path):
    """All files at once: torch's headers take the longest."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no C++ compiler ({compiler})")
    toolkit = toolkit_headers(tmp_path)
    # A torch without CUDA ships the headers but for this one, which says how it was built.
    macros = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.touch()
    headers = [*include_paths(), str(toolkit), str(tmp_path)]
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += [f'-DDIVQAT_CUDA="{torch.version.cuda}"']
    command += [flag for path in headers for flag in ("-isystem", path)]
    whole = tmp_path / "all.cpp"
    whole.write_text("".join(f'#include "{source}"\n' for source in sorted(CUDA.glob("*.cpp"))))
    done = subprocess.run([*command, str(whole)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
