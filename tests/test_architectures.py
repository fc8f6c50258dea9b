"""A build serves the GPUs that it has code for; on others, Triton does, and the reason is said."""

import ctypes
from types import SimpleNamespace

import pytest

from divqat.ops import _architectures, _backend, _native


@pytest.mark.parametrize(
    ("architectures", "capability", "wanted"),
    [
        ("8.0;9.0+PTX", (8, 0), True),
        ("8.0;9.0+PTX", (8, 6), True),  # machine code runs on later minor versions
        ("8.0;9.0+PTX", (7, 5), False),
        ("8.6 9.0", (8, 0), False),  # … not on earlier ones
        ("8.0", (9, 0), False),
        ("8.0;9.0+PTX", (12, 0), True),  # the driver compiles PTX
        ("8.0+PTX 9.0", (7, 5), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("Ampere", (8, 0), True),
    ],
)
def test_what_a_build_runs_on(architectures, capability, wanted):
    assert _architectures.covers(architectures, capability) is wanted


@pytest.mark.parametrize(
    ("gpus", "reason"),
    [
        ((), ""),  # unknown
        (((8, 0),), ""),
        (((7, 5), (9, 0)), ""),
        (((7, 5), (7, 5)), "compute capability 8.0;9.0+PTX, and this one has 7.5"),
    ],
)
def test_a_gpu_without_code_is_served_by_others_and_the_reason_is_said(monkeypatch, gpus, reason):
    extension = SimpleNamespace(
        cuda_version="13.0",
        cuda_architectures="8.0;9.0+PTX",
        instruction_sets=lambda: ["avx2"],
        instruction_set=lambda: "avx2",
    )
    monkeypatch.setattr(_native, "extension", extension)
    monkeypatch.setattr(_native, "capabilities", lambda: gpus)
    monkeypatch.setattr(_backend._triton, "missing", lambda device: "")
    assert _native.missing("cuda").endswith(reason) and bool(_native.missing("cuda")) == bool(
        reason
    )
    assert _native.missing("cpu") == ""
    assert _backend.best("cuda") == ("triton" if reason else "cuda")
    line = _native.describe()["cuda"]
    assert line == (f"none: {_native.missing('cuda')}" if reason else "CUDA 13.0 for 8.0;9.0+PTX")


class Driver:
    """NVML with two GPUs, of which one answers."""

    def __init__(self, name):
        assert name == "libnvidia-ml.so.1"
        self.open = 0

    def nvmlInit_v2(self):
        self.open += 1
        return 0

    def nvmlShutdown(self):
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, gpu):
        gpu._obj.value = 100 + index
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, gpu, major, minor):
        if gpu.value == 100:
            return 15  # the GPU is lost
        major._obj.value, minor._obj.value = 7, 5
        return 0


def test_the_driver_is_asked(monkeypatch):
    driver = Driver("libnvidia-ml.so.1")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert _architectures.capabilities.__wrapped__() == ((7, 5),) and driver.open == 0


def test_a_machine_without_a_driver_is_unknown(monkeypatch):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert _architectures.capabilities.__wrapped__() == ()
