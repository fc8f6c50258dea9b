"""What compilers make of the CUDA sources, each once until those change: it takes a minute."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path

import torch
from cuda_emulator.build import ROOT, compiler, digest, includes, run
from torch.utils.cpp_extension import include_paths

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


NVCC, CUOBJDUMP = tool("nvcc"), tool("cuobjdump")


@cache
def _version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout


def cubin(source: str, architecture: str) -> tuple[Path, str]:
    """A kernel's machine code for an architecture, and what ptxas reported."""
    flags = (CUDA / "nvcc_flags.txt").read_text().split()
    command = [NVCC, *flags, *MACROS, f"-arch={architecture}", "-cubin", "-Xptxas=-v"]
    texts = [path.read_bytes() for path in sorted(includes(CUDA / source))]
    key = digest(b"".join([" ".join([*command, _version(NVCC)]).encode(), *texts]))
    out = BUILD / f"{source}.{architecture}.{key}.cubin"
    report = run([*command, str(CUDA / source)], out)
    return out, report


def accesses(source: str, architecture: str) -> str:
    """Of a kernel's machine code the names of its functions, and their loads and stores."""
    path, _ = cubin(source, architecture)
    disassemble = shlex.join([CUOBJDUMP, "-sass", str(path)])
    lines = f"{disassemble} | awk '/Function : |LDL|STL|LDG|STG/'"
    out = path.with_suffix(".cubin.sass")
    run(["bash", "-o", "pipefail", "-c", lines], out, printed=True)
    return out.read_text()


def _toolkit_headers() -> str:
    """Where nvcc, which may be a script that calls another one, has its headers."""
    command = [NVCC, "-M", "-x", "cu", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.search(r"(\S+)/cuda_runtime\.h\b", done.stdout)[1]


def check_tensor_side() -> None:
    """Compile the tensor side with torch's CUDA headers, all files at once as those take the
    longest. RuntimeError: a compiler's error or warning."""
    # A torch without CUDA ships the headers but for this one, which says how it was built.
    macros = BUILD / "include/c10/cuda/impl/cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True, exist_ok=True)
    macros.touch()
    command = [compiler()[0], "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += [f'-DDIVQAT_CUDA="{torch.version.cuda}"']
    for path in (*include_paths(), _toolkit_headers(), str(BUILD / "include")):
        command += ["-isystem", path]
    sources = sorted(CUDA.glob("*.cpp"))
    for source in sources:
        command += ["-include", str(source)]
    read = sorted(set().union(*map(includes, sources)))
    versions = [_version(NVCC), _version(compiler()[0]), torch.__version__]
    texts = [path.read_bytes() for path in read]
    key = digest(b"".join([" ".join([*command, *versions]).encode(), *texts]))
    run([*command, "-x", "c++", "/dev/null"], BUILD / f"tensor_side.{key}.checked", printed=True)


def compile_all() -> None:
    made = accesses if CUOBJDUMP else cubin
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = [pool.submit(check_tensor_side)] if shutil.which(compiler()[0]) else []
        list(pool.map(lambda case: made(*case), product(KERNELS, ARCHITECTURES)))
        for check in checked:
            check.result()


if __name__ == "__main__":
    compile_all() if NVCC else print("there is no nvcc (PATH, CUDA_HOME)")
