"""What setup.py builds where: without a compiler, with one, and where CUDA was asked for."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from forks import serving
from test_packaging import LEFT_OUT, ROOT, python

from divqat.ops import _native

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def build():
    """Runs setup.py in a copy of the sources; its exit code and what it said."""

    def run(source, what, before="", **environment):
        command = ["setup.py", "-q", what, "--dist-dir", "dist"]
        code, *said = server.run(command, source, environment, before=before)
        return code, "".join(said)

    with serving(["setuptools", "torch.utils.cpp_extension"]) as server:
        yield run


@pytest.fixture
def source(tmp_path):
    return Path(shutil.copytree(ROOT, tmp_path / "divqat", ignore=LEFT_OUT))


def said(text):
    return [line for line in text.splitlines() if line.startswith("divqat: ")]


def test_without_a_compiler_the_package_is_pure_python_and_one_line_says_so(build, source):
    code, text = build(source, "bdist_wheel", CXX="no-such-compiler")
    assert code == 0, text
    assert said(text) == [
        "divqat: building without CPU kernels: there is no C++ compiler (no-such-compiler)"
    ]
    (wheel,) = source.glob("dist/*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_python_only_on_request_without_a_word(build, source):
    code, text = build(source, "bdist_wheel", DIVQAT_BUILD="python")
    assert code == 0 and said(text) == [], text
    assert [path.name for path in source.glob("dist/*-py3-none-any.whl")]


@pytest.mark.parametrize(
    ("mode", "environment", "reason"),
    [
        ("cpu", {"CXX": "no-such-compiler"}, "cannot be built: there is no C++ compiler"),
        ("gpu", {}, "DIVQAT_BUILD: wanted one of auto, python, cpu, cuda, got 'gpu'"),
        ("cuda", {"CUDA_HOME": ""}, "cannot be built: "),
    ],
)
def test_what_was_asked_for_and_cannot_be_built_is_an_error(
    build, source, mode, environment, reason
):
    if mode == "cuda" and torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    code, text = build(source, "bdist_wheel", DIVQAT_BUILD=mode, **environment)
    assert code != 0 and reason in text
    assert not list(source.glob("dist/*"))


def test_a_compiler_that_fails_is_an_error_or_one_line(build, source):
    broken = source / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'cannot create executables' >&2\nexit 1\n")
    broken.chmod(0o755)
    code, text = build(source, "bdist_wheel", CXX=str(broken), DIVQAT_BUILD="cpu")
    assert code != 0
    code, text = build(source, "bdist_wheel", CXX=str(broken))
    assert code == 0, text
    assert any("without native kernels: the compiler failed" in line for line in said(text))


def test_a_cuda_compiler_that_fails_takes_nothing_else_along(build, source):
    for name, text in {
        "broken-compiler": "exit 1",
        "toolkit/bin/nvcc": "echo 'Cuda compilation tools, release 13.0, V13.0.1'; exit 1",
    }.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"#!/bin/sh\n{text}\n")
        (source / name).chmod(0o755)
    # as if this torch had CUDA
    environment = {
        "CXX": str(source / "broken-compiler"),
        "before": "import os, torch, torch.utils.cpp_extension as extension\n"
        "torch.version.cuda, extension.CUDA_HOME = '13.0', os.environ['CUDA_HOME']\n",
    }
    code, text = build(source, "bdist_wheel", CUDA_HOME=str(source / "toolkit"), **environment)
    assert code == 0, text
    lines = "\n".join(said(text))
    assert "without CUDA kernels: the compiler failed" in lines
    assert "without native kernels: the compiler failed" in lines  # tried once more, for the CPU
    code, text = build(source, "bdist_wheel", CUDA_HOME=str(source / "none"), **environment)
    assert code == 0 and "without CUDA kernels: there is no compiler" in "\n".join(said(text))


# Reads all sources with all that they include, at once, as they mostly include the same; what the
# same sources were compiled to by the set-up is what they are linked to.
COMPILER = """#!{python}
import json, os, shutil, subprocess, sys
words = sys.argv[1:]
if "-o" not in words:  # who are you?
    os.execvp("c++", ["c++", *words])
output = words[words.index("-o") + 1]
if "-shared" not in words:
    with open(output, "w") as file:
        json.dump(words, file)
    sys.exit()
commands = [json.load(open(word)) for word in words if word.endswith(".o")]
sources = [words[words.index("-o") - 1] for words in commands]
assert len(set(sources)) == {count}, sources
text = "".join(f'#include "{{source}}"\\n' for source in sources)
out = commands[0][commands[0].index("-o") + 1]
flags = [word for word in commands[0] if word not in ("-c", sources[0], "-o", out)]
command = ["c++", *flags, "-E", "-x", "c++", "-", "-o", output]
subprocess.run(command, input=text, text=True, check=True)
shutil.copy({extension!r}, output)
"""


@pytest.mark.skipif(_native.extension is None, reason="divqat._C is not built")
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_sdist_to_wheel_with_kernels_works_elsewhere(build, fresh, source, tmp_path):
    code, text = build(source, "sdist", DIVQAT_BUILD="python")
    assert code == 0, text
    (archive,) = source.glob("dist/*.tar.gz")
    unpacked = tmp_path / "unpacked"
    with tarfile.open(archive) as files:
        files.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    for path in (ROOT / "csrc").rglob("*.*"):
        assert (folder / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    compiler = tmp_path / "compiler"
    extension = _native.extension.__file__
    count = len(list((ROOT / "csrc").glob("cpu/*.cpp"))) + 1
    compiler.write_text(COMPILER.format(python=sys.executable, extension=extension, count=count))
    compiler.chmod(0o755)
    code, text = build(folder, "bdist_wheel", DIVQAT_BUILD="cpu", CXX=str(compiler))
    assert code == 0, text
    (wheel,) = folder.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "installed")
    code = """
import torch, divqat
y = divqat.ops.fake_quantize(torch.randn(9), torch.tensor(0.1), torch.tensor(0).int(), -8, 7)
print(divqat._C.__file__, divqat.ops.backends()["fake_quantize"]["cpu"][0])
"""
    path, backend = python(fresh, tmp_path, code, tmp_path / "installed")
    assert Path(path).parent == tmp_path / "installed" / "divqat" and backend == "native"


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_no_machine_runs_instructions_it_has_not(name, tmp_path):
    """Of a file for an instruction set, nothing runs at load, and the linker takes nothing for the
    rest: whatever it may merge with other files' code lies in the set's own namespace.
    """
    unit = tmp_path / f"{name}.o"
    command = ["c++", "-O1", "-std=c++17", "-ffp-contract=off", "-c"]
    subprocess.run(
        [*command, ROOT / f"csrc/cpu/instruction_set_{name}.cpp", "-o", unit], check=True
    )
    symbols = subprocess.run(["nm", "-C", unit], check=True, capture_output=True, text=True).stdout
    assert f"divqat::{name}::" in symbols
    assert "_GLOBAL__" not in symbols
    merged = [s for line in symbols.splitlines() for s in re.findall(r"^\S+ [VWu] (.+)", line)]
    assert all(f"divqat::{name}::" in symbol for symbol in merged), merged
