"""Shared fixtures and options; makes the modules in tests/ importable, such as testing.py."""

import functools
import gc
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import backends
import forks
import trainings
from hypothesis import HealthCheck, settings

from divqat._util import figures, files
from divqat.data import ImageSet, catalog

# No deadlines: the time of an example depends on the machine and its load.
settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any")

# Imports and traces make millions of objects, few of them garbage in cycles.
gc.set_threshold(20_000, 10, 10)

BLANK = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="session", autouse=True)
def trainings_are_quick():
    """Replace what takes longer than training a tiny network: figures are drawn, but not rendered
    (see ``painted``); the digits and torch's ONNX registry are loaded once."""
    read, write = functools.cache(catalog._digits), figures.write_atomic

    def digits():
        catalog.require("sklearn.datasets", "data")
        train = read().train
        return replace(read(), train=ImageSet(train.images.clone(), train.labels.clone()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "_digits", digits)
        patch.setattr(
            figures, "write_atomic", lambda path, _: write(path, lambda f: f.write_bytes(BLANK))
        )
        patch.setitem(figures.STYLE, "axes.grid", False)  # half of what is drawn are its ticks
        registry = _onnx_registry()
        if registry is not None:
            cached = staticmethod(functools.cache(registry.from_torchlib))
            patch.setattr(registry, "from_torchlib", cached)
        yield


def _onnx_registry():
    """The class that torch rebuilds for every export, in a second; None if it is not there."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return None
    return ONNXRegistry


@pytest.fixture(scope="module")
def painted():
    """Figures of this module are rendered as for a user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "write_atomic", files.write_atomic)
        patch.setitem(figures.STYLE, "axes.grid", True)
        yield


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one case of each test that is not slow")
    parser.addoption("--by-worth", action="store_true", help="a case of every test first")


def pytest_collection_modifyitems(config, items):
    """Files with slow tests start first, so that no worker waits long for the last one."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    if config.getoption("quick"):
        select_core(config, items)
    if config.getoption("by_worth"):
        items.sort(key=worth(items).__getitem__)


def worth(items):
    """item → its turn: on each backend the first case of a test, that of each dtype, the others."""
    met, turns = set(), {}
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        test = item.nodeid.partition("[")[0], params.get("backend") or params.get("kernels")
        typed = *test, params.get("dtype")
        turns[item] = 0 if test not in met else 1 if typed not in met else 2
        met |= {test, typed}
    return turns


def select_core(config, items):
    """Keep the first case of each test that is not slow."""
    first = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            first.setdefault(item.nodeid.partition("[")[0], item)
    selected = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = [item for item in items if item in selected]


def pytest_collection_finish():
    """What torch and all tests are made of stays: garbage is looked for elsewhere."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """What is frozen is never freed, of which nanobind warns when Python ends."""
    gc.unfreeze()


def pytest_make_parametrize_id(val):
    """Name dtypes in test ids, so that ``-k float32`` selects them."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.fixture(scope="module", params=backends.names())
def backend(request):
    """Run the module's tests once with each backend."""
    with backends.serving(request.param):
        yield request.param


@pytest.fixture(scope="module")
def emulated_kernels():
    """Run the module's tests with the CUDA kernels in the emulator."""
    with backends.serving(backends.EMULATED):
        module = backends.build()
        yield module
        # every launch has to reset the counters for its last block
        assert module.counters_are_zero()


@pytest.fixture(scope="session")
def fresh():
    """Runs code in processes that know no editable install of divqat, and have imported torch."""
    here = Path(__file__).parent
    others = [p for p in sys.path if p and Path(p) != here and not (Path(p) / "divqat").exists()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(others)}
    with forks.serving(["torch"], ["-S"], environment) as server:  # -S: no .pth files
        yield server


@pytest.fixture(scope="module")  # so that module-scoped fixtures run on one thread, too
def one_thread():
    """One thread: with several, tiny layers mostly wait, very long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def new_garbage_only():
    """Every measurement collects, which takes longer than it does where packages fill the heap."""
    gc.freeze()


@pytest.fixture(scope="session")
def vgg_teacher(tmp_path_factory):
    """The run folder of a full-precision training."""
    return trainings.teach(tmp_path_factory.mktemp("teacher") / "fp")


@pytest.fixture(scope="session")
def lenet_teacher(tmp_path_factory):
    """The same with a smaller network, for slow tests: CPUs emulate float16 convolutions."""
    return trainings.teach(tmp_path_factory.mktemp("teacher") / "fp", model="lenet")


@pytest.fixture(scope="session")
def vgg_divqat(vgg_teacher, tmp_path_factory):
    """The run folder of a DivQAT training from ``vgg_teacher``, in float32 and eager mode."""
    folder = tmp_path_factory.mktemp("plain")
    trainings.trained(vgg_teacher, folder)
    return folder
