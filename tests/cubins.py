"""The CUDA kernels as nvcc compiles them, each once until its sources change."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path

from cuda_emulator.build import ROOT, digest, includes, run

CUDA = ROOT / "csrc/cuda"
BUILD = ROOT / "build/cubin"
KERNELS = sorted(path.name for path in CUDA.glob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_90"]
# What torch.utils.cpp_extension adds: conversions of half precision must be written out.
MACROS = [
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
]


def tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit; triton brings some of them, too."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


NVCC = tool("nvcc")


@cache
def _version() -> str:
    return subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout


def cubin(source: str, architecture: str) -> tuple[Path, str]:
    """A kernel's machine code for an architecture, and what ptxas reported."""
    flags = (CUDA / "nvcc_flags.txt").read_text().split()
    command = [NVCC, *flags, *MACROS, f"-arch={architecture}", "-cubin", "-Xptxas=-v"]
    texts = [path.read_bytes() for path in sorted(includes(CUDA / source))]
    key = digest(b"".join([" ".join([*command, _version()]).encode(), *texts]))
    out = BUILD / f"{source}.{architecture}.{key}.cubin"
    report = run([*command, str(CUDA / source)], out)
    return out, report


def compile_all() -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda case: cubin(*case), product(KERNELS, ARCHITECTURES)))


if __name__ == "__main__":
    compile_all() if NVCC else print("there is no nvcc (PATH, CUDA_HOME)")
