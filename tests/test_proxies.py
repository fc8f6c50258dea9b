"""Proxies of what a thief may ask about: as many of each kind, from pools or made."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing import no_waiting, seeded
from torch.utils._python_dispatch import TorchDispatchMode

from divqat.data import proxies
from divqat.data.proxies import MADE, NAMES, proxy_batch, proxy_pools

SHAPES = [(1, 8, 8), (3, 28, 28), (1, 30, 17), (3, 64, 64)]
CPU = torch.device("cpu")


def pictures(n, shape=(1, 8, 8), seed=0):
    return torch.randint(256, (n, *shape), dtype=torch.uint8, generator=seeded(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path_factory.mktemp("pictures")
    for i, color in enumerate(["red", "lime", "blue"]):
        image.new("RGB", (40, 40), color).save(path / f"{i}.png")
    return path


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_gives_its_images_and_follows_the_seed(name, shape, folder, monkeypatch):
    # A fresh machine has no icons of Debian's.
    monkeypatch.setattr("divqat.data.transfer.ICONS_ROOT", str(folder))
    monkeypatch.setattr(proxies, "POOL", 50)
    monkeypatch.setattr(proxies, "DRAWINGS", 50)
    pools = proxy_pools([name], shape, CPU, folder=folder)
    images, labels = pictures(6, shape), torch.arange(6) % 2

    def make(seed):
        return proxy_batch([name], images, seeded(seed), 5, labels=labels, pools=pools)

    made = make(1)
    assert made.shape == (5, *shape) and made.dtype == torch.uint8
    assert torch.equal(made, make(1))
    assert not torch.equal(made, make(2))
    assert made.float().std() > 0


@given(count=st.integers(0, 40), kinds=st.integers(1, len(MADE)), n=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_any_count_of_any_kinds(count, kinds, n):
    assert len(proxy_batch(list(MADE)[:kinds], pictures(n), seeded(), count)) == count


def test_every_name_has_an_equal_share():
    images = pictures(1) // 2  # below 128: what is inverted is above
    pools = {"photos": torch.full((3, 1, 8, 8), 7, dtype=torch.uint8)}
    made = proxy_batch(["inverted", "photos"], images, seeded(), 40, pools=pools)
    is_photo = (made == 7).flatten(1).all(1)
    assert is_photo.sum() == 20 and (made[~is_photo] == 255 - images[0]).all()
    assert 0 < is_photo[:20].sum() < 20  # in random order
    odd = [
        proxy_batch(["inverted", "photos"], images, seeded(seed), 1, pools=pools)
        for seed in range(20)
    ]
    assert 0 < sum(bool((image == 7).all()) for image in odd) < 20  # chance, not the first name


def test_what_is_drawn_is_drawn_once(monkeypatch):
    monkeypatch.setattr(proxies, "DRAWINGS", 20)
    monkeypatch.setattr(proxies, "BATCH_BYTES", 7 * 64)  # images at once
    pools = proxy_pools(["glyphs", "inverted"], (1, 8, 8), CPU, seed=3)
    assert list(pools) == ["glyphs"]
    again = proxy_pools(["glyphs", "leaves", "noise"], (1, 8, 8), CPU, seed=3)
    other = proxy_pools(["glyphs"], (1, 8, 8), CPU, seed=4)
    assert {len(pool) for pool in again.values()} == {20}
    assert torch.equal(again["glyphs"], pools["glyphs"])
    assert not torch.equal(again["glyphs"], other["glyphs"])
    for name, pool in again.items():
        assert len(pool.unique(dim=0)) > 15
        made = proxy_batch([name], pictures(3), seeded(), 100, pools=again)
        assert (made[:, None] == pool).flatten(2).all(2).any(1).all()
        assert len(made.unique(dim=0)) > 10
    monkeypatch.setattr(proxies, "DRAWN_BYTES", 3 * 64 * 3)
    assert len(proxy_pools(["noise"], (3, 8, 8), CPU)["noise"]) == 3


def test_pools_are_bounded_and_of_the_folder(folder, monkeypatch):
    monkeypatch.setattr(proxies, "POOL_BYTES", 7 * 3 * 16 * 16)
    pools = proxy_pools(("photos", "folder"), (3, 16, 16), CPU, folder=folder)
    assert {name: len(pool) for name, pool in pools.items()} == {"photos": 7, "folder": 7}
    made = proxy_batch(["folder"], pictures(1, (3, 16, 16)), seeded(), 30, pools=pools)
    assert {tuple(image[:, 8, 8].tolist()) for image in made} == {
        (255, 0, 0), (0, 255, 0), (0, 0, 255)
    }  # fmt: skip


class NoCopies(TorchDispatchMode):
    """Refuses tensors from Python's numbers, and those that go to another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name != "lift_fresh" and (name != "_to_copy" or "device" not in kwargs), name
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", [*MADE, "mixed", "composed"])
def test_no_kind_copies_from_the_host(name):
    """On a GPU the host would wait for it."""
    images, labels = pictures(6, (3, 12, 9)), torch.arange(6) % 2
    pools = dict.fromkeys(proxies.PARTS, pictures(4, (3, 12, 9)))
    with NoCopies():
        made = proxy_batch([name], images, seeded(), 5, labels=labels, pools=pools)
    assert len(made) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*MADE, "mixed", "composed"])
def test_proxies_on_a_gpu_do_not_wait_for_it(name):
    device = torch.device("cuda")
    images, labels = pictures(6, (3, 12, 9)).to(device), (torch.arange(6) % 2).to(device)
    pools = dict.fromkeys(proxies.PARTS, images)
    generator = torch.Generator(device)

    def make():
        generator.manual_seed(1)
        return proxy_batch([name], images, generator, 5, labels=labels, pools=pools)

    wanted = make()  # loads the kernels
    with no_waiting():
        made = make()
    assert torch.equal(made, wanted)


def test_compositions_are_neither_their_parts_nor_the_images():
    images = pictures(6, (1, 16, 16))
    pools = proxy_pools(["composed"], (1, 16, 16), CPU)
    assert list(pools) == list(proxies.PARTS)
    made = proxy_batch(["composed"], images, seeded(), 300, pools=pools).float()
    assert len(made.unique(dim=0)) > 280
    for part in (images, *pools.values()):
        assert (torch.cdist(made.flatten(1), part.float().flatten(1)).amin(1) > 1).all()
    # On the grounds that are most frequent: black, white, that of an image.
    corner = made[:, 0, 0, 0]
    assert (corner == 0).float().mean() > 0.2 and (corner == 255).float().mean() > 0.05


def test_refusals():
    images = pictures(2)
    with pytest.raises(ValueError, match="pools: wanted glyphs"):
        proxy_batch(["composed"], images, seeded(), 1)
    with pytest.raises(ValueError, match="unknown proxy 'glyph'"):
        proxy_batch(["glyph"], images, seeded(), 1)
    with pytest.raises(ValueError, match="pools: wanted photos"):
        proxy_batch(["photos"], images, seeded(), 1)
    with pytest.raises(TypeError, match="images must be uint8, got"):
        proxy_batch(["noise"], images.float(), seeded(), 1)
    assert "openclipart" not in NAMES  # the attackers' query set
