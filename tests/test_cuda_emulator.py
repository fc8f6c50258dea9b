"""The emulator of CUDA itself: what the kernels' tests rest on."""

import struct

import pytest
import torch
from cuda_emulator import build

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


@pytest.fixture(scope="module")
def emulator():
    return build.build()


@pytest.fixture(params=range(3))
def probe(request, emulator):
    """Runs a kernel with each of some orders of its threads and blocks."""
    emulator.set_seed(request.param)
    return emulator.probe


def test_barrier_lets_writes_through(probe):
    assert probe("barrier") == [63 - i + 2 for i in range(64)] * 2


def test_missing_barrier_shows(probe):
    assert probe("missing_barrier") != [63 - i + 2 for i in range(64)]


def test_barrier_votes(probe):
    assert probe("barrier_votes") == [14 * 10000 + 1000 + 10] * 40


def test_votes(probe):
    assert probe("votes") == [(0xAAAAAAAA << 2) + 2] * 64


def test_halves_of_a_warp_vote_apart(probe):
    assert probe("halves") == [0x5555] * 16 + [0x11110000] * 16


def test_shuffles(probe):
    out = torch.tensor(probe("shuffles")).view(32, 7).T.tolist()
    lanes = range(32)
    assert out == [
        [i ^ 5 for i in lanes],
        [i + 3 if i < 29 else i for i in lanes],
        [(i - 3 if i >= 3 else i) << 40 for i in lanes],
        [19] * 32,
        [2 * (i // 8 * 8 + 1) + 1 for i in lanes],
        [i + 2 if i % 4 < 2 else i for i in lanes],
        [i ^ 8 if i & 8 else i for i in lanes],
    ]


@pytest.mark.parametrize("name", ["atomics", "atomics_together"])
def test_atomics(probe, name):
    out = probe(name)
    half = struct.unpack("d", struct.pack("q", out[5]))[0]
    assert out[:5] == [5 * 2016, 63, 0, 1, 7] and half == 160


def test_grid_barrier(probe):
    assert probe("grid_sync") == [6] * 6 + [36] * 6


def test_indices(probe):
    assert probe("indices") == list(range(24)) * 12


def test_block_order_varies_and_follows_from_the_seed(emulator):
    emulator.set_seed(1)
    first, second = emulator.probe("block_order"), emulator.probe("block_order")
    emulator.set_seed(1)
    assert first == emulator.probe("block_order") != second
    assert sorted(first) == list(range(20))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lane_returns_early", r"kernel .*lane_returns_early\(.*block \(0, 0, 0\): deadlock: "
         r"1 thread\(s\) returned \(3\); 31 thread\(s\) waiting in __ballot_sync at "
         r"probes.cu:\d+, mask 0xffffffff"),
        ("thread_misses_barrier", r"thread_misses_barrier.*returned \(40\).*in __syncthreads at"),
        ("lanes_diverge", r"lanes_diverge.*diverged: .*24 .* in __ballot_sync.*8 .* in __syncwarp"),
        ("reads_lane_outside", "lane 0 reads lane 8, which takes no part in __shfl_xor_sync"),
        ("block_misses_grid", r"block_misses_grid.*some blocks wait at this_grid\(\).sync\(\)"),
        ("lane_returns_before_grid", r"block \(1, 0, 0\).*returned \(2\).*in this_grid\(\).sync"),
        ("grid_sync_alone", "not cooperative"),
        ("too_many_blocks", "too many blocks in cooperative launch"),
        ("misaligned", "on 16 bytes to an address that ends in .* at probes.cu"),
    ],
)  # fmt: skip
def test_what_would_hang_or_be_undefined_is_an_error(probe, name, message):
    with pytest.raises(RuntimeError, match=message):
        probe(name)
    assert probe("grid_sync") == [6] * 6 + [36] * 6  # and does no harm to what follows


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("half", torch.half)])
def test_conversions_agree_with_torch(emulator, name, dtype):
    wide, narrow, between, rounded = torch.tensor(emulator.probe(name)).view(-1, 4).unbind(1)
    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    assert torch.equal(floats(wide).nan_to_num(7.5), every.float().nan_to_num(7.5))
    for bits, wanted in [(narrow, every), (rounded, floats(between).to(dtype))]:
        number = ~wanted.isnan()
        assert torch.equal(bits[number].to(torch.int16), wanted[number].view(torch.int16))
        assert (bits[~number] == 0x7FFF).all()  # the device's NaN


def floats(bits):
    return bits.to(torch.int32).view(torch.float32)
