"""Let the tests import their vocabulary, tests/testing.py, and what several files share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import backends
import trainings


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
