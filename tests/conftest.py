"""Let the tests import their vocabulary, tests/testing.py, and what several files share."""

import functools
import gc
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import backends
import trainings
from hypothesis import HealthCheck, settings

from divqat._util import figures, files
from divqat.data import ImageSet, catalog

# How long an example takes says something of the machine, and of who else is on it.
settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any")

# Imports and traces make millions of objects, few of them garbage in cycles.
gc.set_threshold(20_000, 10, 10)

BLANK = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="session", autouse=True)
def trainings_are_quick():
    """What takes longer than a tiny network trains: pictures are drawn, but not painted (see
    ``painted``), the digits are read from their file once, and so is what torch knows of ONNX."""
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
            known = staticmethod(functools.cache(registry.from_torchlib))
            patch.setattr(registry, "from_torchlib", known)
        yield


def _onnx_registry():
    """What torch makes anew for every export, in a second; None where it is elsewhere."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return None
    return ONNXRegistry


@pytest.fixture(scope="module")
def painted():
    """The module's pictures are those that a user sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "write_atomic", files.write_atomic)
        patch.setitem(figures.STYLE, "axes.grid", True)
        yield


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one case of each test that is not slow")


def pytest_collection_modifyitems(config, items):
    """Files with slow tests begin first, so that no worker waits long for the last one."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    if config.getoption("quick"):
        keep_the_core(config, items)


def keep_the_core(config, items):
    """Of a test that is run over many cases and backends, the first is its core."""
    first = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            first.setdefault(item.nodeid.partition("[")[0], item)
    kept = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_finish():
    """What torch and all tests are made of stays: garbage is looked for elsewhere."""
    gc.collect()
    gc.freeze()


def pytest_make_parametrize_id(val):
    """Dtypes by name, so that ``-k float32`` finds them."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.fixture(scope="module", params=backends.names())
def backend(request):
    """Run the module's tests once with each kind of kernels."""
    with backends.serving(request.param):
        yield request.param


@pytest.fixture(scope="module")
def emulated_kernels():
    """The CUDA kernels, run by the emulator, serve the module's tests."""
    with backends.serving(backends.EMULATED):
        module = backends.build()
        yield module
        # every launch leaves the counters of its last block as it found them
        assert module.counters_are_zero()


@pytest.fixture(scope="module")  # so that what a module makes once is made on one thread, too
def one_thread():
    """Tiny layers on several threads mostly wait, very long where other processes run."""
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
    """Another one for what is slow: float16 convolutions, which a CPU only imitates."""
    return trainings.teach(tmp_path_factory.mktemp("teacher") / "fp", model="lenet")


@pytest.fixture(scope="session")
def vgg_divqat(vgg_teacher, tmp_path_factory):
    """The run folder of a DivQAT training from it, in float32 and eager."""
    folder = tmp_path_factory.mktemp("plain")
    trainings.trained(vgg_teacher, folder)
    return folder
