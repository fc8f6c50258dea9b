"""What is built and installed: whole, importable elsewhere, and light to import."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# What is not part of the sources, whether git ignores it or not.
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "results", "*.so"
)
OPTIONAL = (
    *("sklearn", "scipy", "PIL", "onnx", "onnxscript", "onnxruntime", "matplotlib"),
    *("yaml", "tqdm", "triton", "pytest", "art"),
)


def python(server, folder, code, *path):
    """Run code with ``path`` in front of everything; what it printed."""
    code, output, errors = server.run(code, folder, path=path)
    assert code == 0, output + errors
    return output.split()


def pip(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"DIVQAT_BUILD": "python"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def wheel(source, folder):
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clean copy of the sources."""
    return Path(
        shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "divqat", ignore=LEFT_OUT)
    )


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    return wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", target, built, cwd=target)
    return target


def test_wheel_holds_the_package_and_nothing_else(built, checkout):
    names = set(zipfile.ZipFile(built).namelist())
    wanted = {
        *(f"divqat/{p.relative_to(checkout / 'divqat')}" for p in checkout.glob("divqat/**/*.py")),
        *(f"divqat/kernels/{p.name}" for p in checkout.glob("kernels/*.py")),
        *(f"divqat/zoo/files/{p.name}" for p in checkout.glob("zoo/*")),
        "divqat/py.typed",
    }
    assert "divqat/zoo/files/gtsrb-divqat.onnx" in wanted
    assert "divqat/kernels/__init__.py" in wanted
    information = {name for name in names if ".dist-info/" in name}
    assert names - information == wanted
    assert any(name.endswith("/LICENSE") for name in information)


def test_installed_package_works_elsewhere(fresh, installed, tmp_path):
    code = """
import torch, divqat, divqat.kernels
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
prepared = divqat.prepare(net, "x86", torch.randn(2, 3, 8, 8))
prepared(torch.randn(2, 3, 8, 8)).sum().backward()
assert divqat.zoo.load("gtsrb-divqat")(torch.zeros(1, 3, 32, 32)).shape == (1, 43)
print(divqat.__file__, divqat.kernels.__file__, divqat.__version__)
"""
    package, kernels, version = python(fresh, tmp_path, code, installed)
    assert Path(package) == installed / "divqat" / "__init__.py"
    assert Path(kernels) == installed / "divqat" / "kernels" / "__init__.py"
    assert list(installed.glob(f"divqat-{version}.dist-info"))


def test_checkout_works_without_being_installed(fresh, checkout, tmp_path):
    code = "import divqat, divqat.kernels as k; print(divqat.__file__, k.__file__)"
    package, kernels = python(fresh, tmp_path, code, checkout)
    assert Path(package) == checkout / "divqat" / "__init__.py"
    assert Path(kernels) == checkout / "kernels" / "__init__.py"


def test_sdist_builds_the_same_wheel(fresh, built, checkout, tmp_path):
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    python(fresh, checkout, code)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [
        p for part in ("csrc", "kernels", "configs", "zoo") for p in (checkout / part).rglob("*")
    ]
    sources = [str(p.relative_to(checkout)) for p in sources if p.is_file()]
    assert {*sources, "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    other = wheel(sdist, tmp_path)

    def contents(path):
        with zipfile.ZipFile(path) as archive:
            return {
                info.filename: info.CRC
                for info in archive.infolist()
                if not info.filename.endswith("RECORD")
            }

    assert contents(other) == contents(built)


def test_extras_are_declared_for_every_optional_package(built):
    with zipfile.ZipFile(built) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    always = {line.split()[1].partition(">")[0] for line in required if "extra ==" not in line}
    assert always == {"torch", "numpy"}
    extras = " ".join(line for line in required if "extra ==" in line)
    for package in ("scikit-learn", "pillow", "onnx", "onnxruntime", "matplotlib", "pyyaml"):
        assert f" {package};" in extras


def test_every_module_imports_without_the_optional_packages(fresh, checkout, tmp_path):
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # importing it fails
import importlib, pkgutil, divqat
for module in pkgutil.walk_packages(divqat.__path__, "divqat."):
    if not module.name.startswith("divqat.kernels") and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
"""
    names = set(python(fresh, tmp_path, code, checkout))
    here = {
        ".".join(p.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__")
        for p in checkout.glob("divqat/**/*.py")
    }
    assert names == here - {"divqat", "divqat.__main__"}
    parts = {"data", "models", "victim", "attacks", "evaluate", "export", "nn", "quantize", "ops"}
    assert {f"divqat.{part}" for part in parts} <= names


def test_importing_is_quiet_and_touches_neither_gpu_nor_random_state(fresh, checkout, tmp_path):
    code = """
import torch, warnings
warnings.simplefilter("error")
before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
import divqat, divqat.export, divqat.data, divqat.models, divqat.attacks, divqat.evaluate
import sys
assert "triton" not in sys.modules  # or Triton's options could not be set any more
after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
assert not torch.cuda.is_initialized()
"""
    assert python(fresh, tmp_path, code, checkout) == []
