"""Compile the CUDA kernels for the CPU, with headers that stand in for CUDA's, and load them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build/cuda_emulator"
FLAGS = [
    "-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-pthread",
    # As in the real build: no contraction to FMA.
    "-ffp-contract=off",
    # A vector access off its alignment is an error; block.cpp stands in for its library.
    "-fsanitize=alignment",
    # Fibers are left by longjmp, which the fortified one takes for an error.
    "-U_FORTIFY_SOURCE",
    "-Wall", "-Wno-unknown-pragmas",
    '-DDIVQAT_CUDA="emulated"',
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
]  # fmt: skip


def compiler() -> list[str]:
    """The command that compiles C++, from $CXX or g++."""
    return shlex.split(os.environ.get("CXX", "g++"))


def why_not() -> str | None:
    """What is missing for build()."""
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return "the emulator of CUDA needs 64-bit Linux"
    name = compiler()[0]
    return None if shutil.which(name) else f"there is no C++ compiler ({name})"


def sources() -> list[Path]:
    cuda = ROOT / "csrc/cuda"
    found = [*cuda.glob("*.cu"), *cuda.glob("*.cpp"), *HERE.glob("*.cu"), *HERE.glob("*.cpp")]
    # The longest first: what reads torch's headers.
    return sorted(found, key=lambda source: source.suffix)


def includes(source: Path) -> set[Path]:
    """The source and what it includes by a path beside it, directly or not."""
    found, wanted = set(), [source]
    while wanted:
        path = wanted.pop()
        if path in found:
            continue
        found.add(path)
        names = re.findall(r'^ *#include "(.+)"', path.read_text(), re.MULTILINE)
        beside = [(path.parent / name).resolve() for name in names]
        wanted += [header for header in beside if header.is_file()]
    return found


def include_flags() -> list[str]:
    try:
        import pybind11
    except ImportError:  # torch ships a copy
        theirs = []
    else:
        theirs = [pybind11.get_include()]
    theirs += [*include_paths(), sysconfig.get_paths()["include"]]
    ours = [f"-I{HERE / 'include'}"]
    return ours + [flag for path in theirs for flag in ("-isystem", path)]


def run(command: list[str], out: Path, *, printed: bool = False) -> str:
    """Run a compiler whose output is `out`, unless it is there, and return what it said then; or
    what has its output `printed`. The output is whole or absent; of several processes that want it
    at once, one compiles."""
    import fcntl  # not everywhere where this file is read

    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        partial, said = out.with_suffix(".partial"), out.with_suffix(".txt")
        if out.exists() and said.exists():
            return said.read_text()
        to = [] if printed else ["-o", str(partial)]
        done = subprocess.run([*command, *to], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\nfailed:\n{done.stdout}{done.stderr}")
        if printed:
            partial.write_text(done.stdout)
        said.write_text(done.stderr)
        partial.replace(out)
        return done.stderr


def compiled(source: Path, key: bytes) -> Path:
    """The object file of a source."""
    text = b"".join(path.read_bytes() for path in sorted(includes(source)))
    out = BUILD / "objects" / f"{source.name}.{digest(key + text)}.o"
    run([*compiler(), *FLAGS, *include_flags(), "-x", "c++", "-c", str(source)], out)
    return out


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@cache
def build() -> ModuleType:
    """The module with the CUDA kernels, compiled unless nothing changed since the last time.

    Raises:
        RuntimeError: what is missing, or what the compiler said.
    """
    missing = why_not()
    if missing is not None:
        raise RuntimeError(missing)
    version = [torch.__version__, sys.version, *compiler(), *FLAGS]
    stand_ins = sorted((HERE / "include").rglob("*.h"))
    key = "\n".join(version).encode() + b"".join(path.read_bytes() for path in stand_ins)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: compiled(source, key), sources()))
    names = "".join(sorted(path.name for path in objects))
    library = BUILD / digest(names.encode()) / "cuda_emulated.so"
    folders = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries = [*folders, "-ltorch_cpu", "-lc10", "-ldl"]
    run([*compiler(), "-shared", "-pthread", *map(str, objects), *libraries], library)
    spec = importlib.util.spec_from_file_location("cuda_emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print("CUDA emulator:", why_not() or build().__file__)
