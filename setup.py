"""Package map and native extension; everything else is declared in pyproject.toml.

``DIVQAT_BUILD`` selects what to build: ``python`` (nothing native), ``cpu``, ``cuda`` (includes
``cpu``; both fail if they cannot be built) or ``auto`` (the default: whatever the machine can
build, with one line about what is left out). The extension is compiled against the installed
torch, so it needs ``pip install --no-build-isolation``. ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``,
``CUDA_HOME`` and ``CXX`` are respected.
"""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "divqat/_util/version.py").read_text())[1]
MODES = ("auto", "python", "cpu", "cuda")
MODE = os.environ.get("DIVQAT_BUILD", "auto")
# No contraction to FMA, so that the kernels agree with PyTorch's reference bit for bit.
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# GCC's AVX-512 headers trigger these warnings.
CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Compiled for OpenMP but not linked with it: torch has the runtime whose threads ATen uses, and a
# second one would start its own threads.
OPENMP_FLAGS = ["-fopenmp"] if sys.platform == "linux" else []


def say(line: str) -> None:
    print(f"divqat: {line}", file=sys.stderr, flush=True)


def find_cpu_obstacle() -> str | None:
    """What is missing for the C++ kernels; None if nothing is."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch cannot be imported (pip install --no-build-isolation uses the installed one)"
    if sys.platform == "win32":
        return "the sources need GCC or Clang"
    compiler = os.environ.get("CXX", "c++").split()[0]
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"


def find_cuda_obstacle() -> str | None:
    """What else is missing for the CUDA kernels; None if nothing is."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not CUDA_HOME:
        return "there is no CUDA toolkit (set CUDA_HOME)"
    nvcc = Path(CUDA_HOME) / "bin" / "nvcc"
    return None if shutil.which(nvcc) else f"there is no compiler {nvcc}"


def should_build(part: str, reason: str | None) -> bool:
    """Whether to build the part; an error if it was requested but cannot be built."""
    if reason is None:
        return True
    if MODE in (part, "cuda"):
        raise SystemExit(f"divqat: DIVQAT_BUILD={MODE} cannot be built: {reason}")
    say(f"building without {part.upper()} kernels: {reason}")
    return False


def native_arguments() -> dict:
    """The arguments of setup() that build divqat._C; empty for a pure-Python package."""
    if MODE not in MODES:
        raise SystemExit(f"divqat: DIVQAT_BUILD: wanted one of {', '.join(MODES)}, got {MODE!r}")
    if MODE == "python" or not should_build("cpu", find_cpu_obstacle()):
        return {}
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            fallbacks = [("CUDA", [extension(cuda=False)])] if cuda else []
            for dropped, rest in (*fallbacks, ("native", [])):
                try:
                    return super().build_extensions()
                except Exception as error:  # an installed toolchain that does not work
                    if MODE != "auto":
                        raise
                    say(f"building without {dropped} kernels: the compiler failed: {error}")
                    self.extensions = rest

    cuda = MODE != "cpu" and should_build("cuda", find_cuda_obstacle())
    return {"ext_modules": [extension(cuda)], "cmdclass": {"build_ext": Build}}


def extension(cuda: bool) -> Any:
    """divqat._C, with or without the CUDA kernels."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    arguments = {"cxx": [*CXX_FLAGS, *OPENMP_FLAGS]}
    macros, make = [], CppExtension
    if cuda:
        import torch

        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        macros = [
            ("DIVQAT_CUDA", f'"{torch.version.cuda}"'),
            ("DIVQAT_CUDA_ARCHITECTURES", f'"{architectures}"'),
        ]
        sources += sorted(str(p) for p in Path("csrc/cuda").glob("*.c*") if p.suffix != ".cuh")
        arguments["nvcc"] = Path("csrc/cuda/nvcc_flags.txt").read_text().split()
        make = CUDAExtension
    return make(
        "divqat._C", sources, extra_compile_args=arguments, define_macros=macros,
        include_dirs=pybind11_headers(),
    )  # fmt: skip


def pybind11_headers() -> list[str]:
    """The headers of the installed pybind11; otherwise torch's own copy is used."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


os.chdir(ROOT)
setup(
    version=VERSION,
    # The Triton kernels are in the top-level folder kernels/ and are installed as divqat.kernels;
    # the trained networks are in zoo/, and are installed beside the module that loads them.
    packages=[
        *find_packages(include=["divqat", "divqat.*"]),
        *("divqat.kernels", "divqat.zoo.files"),
    ],
    package_dir={"divqat.kernels": "kernels", "divqat.zoo.files": "zoo"},
    package_data={"divqat": ["py.typed"], "divqat.zoo.files": ["*"]},
    **native_arguments(),
)
