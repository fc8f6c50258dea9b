"""Proxies of what a thief may ask about: each kind does what it says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing import no_waiting
from torch.utils._python_dispatch import TorchDispatchMode

from divqat.data import proxies
from divqat.data.glyphs import _ellipses, _polygons, _to_strokes, glyphs
from divqat.data.leaves import leaves
from divqat.data.proxies import GRID, MADE, NAMES, READ, proxy_batch, proxy_pools

SHAPES = [(1, 8, 8), (3, 28, 28), (1, 30, 17), (3, 64, 64)]
CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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
    monkeypatch.setattr(proxies, "AT_ONCE", 7 * 64)  # images at once
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


def test_shuffled_images_have_the_same_patches_in_another_order():
    numbers = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    image = numbers.repeat_interleave(3, 2).repeat_interleave(2, 3)
    image = torch.nn.functional.pad(image, (0, 1, 0, 2), value=99)  # 14 x 9
    made = proxies.shuffled(image.expand(50, 1, 14, 9), seeded())
    assert (made[:, :, 12:] == 99).all() and (made[:, :, :, 8:] == 99).all()
    patches = made[:, 0, :12, :8].reshape(50, GRID, 3, GRID, 2).transpose(2, 3).flatten(3)
    assert (patches == patches[..., :1]).all()  # whole patches
    values = patches[..., 0].flatten(1)
    assert torch.equal(values.sort(1).values, numbers.view(1, 16).expand(50, 16))
    assert len({tuple(row.tolist()) for row in values}) == 50


@pytest.mark.parametrize("height,width,away", [(65, 65, 20), (41, 81, 15), (81, 41, 15)])
def test_rotated_images_are_turned_by_more_than_60_degrees(height, width, away):
    """A dot to the right of the center goes round it, on a circle in oblong pictures, too."""
    image = torch.zeros(1, 1, height, width, dtype=torch.uint8)
    y, x = torch.arange(height)[:, None] - height // 2, torch.arange(width) - width // 2
    image[0, 0, (y.abs() <= 1) & ((x - away).abs() <= 1)] = 255
    made = proxies.rotated(image.expand(200, 1, height, width), seeded())[:, 0].double()
    made *= x * x + y * y < (min(height, width) // 2) ** 2  # beyond, mirrored dots come in
    x, y = ((made * axis).sum((1, 2)) / made.sum((1, 2)) for axis in (x, y))
    torch.testing.assert_close(torch.hypot(x, y), torch.full_like(x, away), rtol=0, atol=0.5)
    angle = torch.atan2(y, x).rad2deg() % 360
    assert 59 < angle.min() < 70 and 290 < angle.max() < 301


def test_warped_images_are_bent_smoothly_and_within_reach(monkeypatch):
    ramp = torch.arange(64).mul(4).to(torch.uint8).expand(20, 1, 64, 64)
    made = proxies.warped(ramp, seeded()).float()
    inner = (made - ramp.float())[..., 16:-16]
    # 0.4 halves of 64 pixels, 4 grey levels each; bicubic interpolation overshoots a little
    assert 20 < inner.abs().amax() < 1.3 * 0.4 * 32 * 4
    assert made.diff(dim=2).abs().amax() < 30  # along the ramp's lines it was 0: no tears
    monkeypatch.setattr(proxies, "REACH", 0.0)
    assert torch.equal(proxies.warped(ramp, seeded()), ramp)


def test_zoomed_images_are_small_or_large_and_somewhere_else():
    """A ramp along both axes becomes so much steeper or flatter."""
    ramp = torch.arange(64).mul(2).add(60).to(torch.uint8)
    image = (ramp[:, None] // 2 + ramp // 2).expand(400, 1, 64, 64)
    made = proxies.zoomed(image, seeded()).double()[:, 0]
    across, down = made.diff(dim=2), made.diff(dim=1)
    slope = across.abs().amax((1, 2))  # a grey level per pixel before
    large = across.abs().mean((1, 2)) < 0.55
    assert 150 < large.sum() < 250
    assert 0.25 < across[large].abs().mean() < 0.5  # 2 to 3.5 times as large
    assert (slope[~large] >= 2).all() and (slope[~large] <= 5).all()
    inner = made[~large, 8:-8, 8:-8]
    assert (inner.amax((1, 2)) - inner.amin((1, 2)) > 40).double().mean() > 0.8  # not out of sight
    signs = {(float(a.sum().sign()), float(d.sum().sign()))
             for a, d in zip(across[~large], down[~large], strict=True)}  # fmt: skip
    assert signs == {(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)}


@pytest.mark.parametrize("height,width", [(64, 64), (40, 80)])
def test_a_collage_shows_three_images_as_rectangles_of_the_right_size(height, width, monkeypatch):
    monkeypatch.setattr(proxies, "PASTED", 1)
    white = torch.full((300, 1, height, width), 255, dtype=torch.uint8)
    made = proxies.collage(white, seeded())[:, 0]
    paper = made.flatten(1).median(1).values  # less than half of it is covered
    assert 100 < (paper == 0).sum() < 200  # half of them black
    inked = (made != paper[:, None, None]).double().mean((1, 2))
    shown = inked > 0
    assert shown.double().mean() > 0.8  # inverted ones on black are not to be seen
    # 0.9 of each side of it is shown, of 0.25 to 0.7 of the picture's
    assert inked.max() < 1.05 * (0.9 * 0.7) ** 2
    assert 0.5 * (0.9 * 0.475) ** 2 < inked[shown].mean() < 1.3 * (0.9 * 0.475) ** 2
    monkeypatch.setattr(proxies, "PASTED", 3)
    many = (proxies.collage(white, seeded())[:, 0] != 0).double().mean()
    assert many > (made != 0).double().mean()


def test_leaves_hide_each_other_and_leave_no_ground():
    made = leaves(torch.empty(200, 3, 32, 32), seeded())
    assert not torch.equal(made[:, 0], made[:, 1])  # in color
    steps = made.double().diff(dim=3).abs()
    flat = (steps < 8).double().mean((1, 2, 3))
    assert flat.min() > 0.4 and flat.max() < 0.99  # shades with edges between, unlike noise
    assert (steps.amax((1, 2, 3)) > 60).all()
    one = made[0, 0]
    assert one.unique().numel() > 20


def test_edges_by_hand():
    image = torch.zeros(1, 1, 6, 6, dtype=torch.uint8)
    image[..., 3:] = 100  # Sobel: 4 · 100 beside the step, 0 elsewhere
    wanted = torch.tensor([0, 0, 255, 255, 0, 0], dtype=torch.uint8).expand(1, 1, 6, 6)
    assert torch.equal(proxies.edges(image, seeded()), wanted)
    assert not proxies.edges(torch.full((1, 3, 8, 8), 9, dtype=torch.uint8), seeded()).any()


def test_inverted_and_thresholded_by_hand():
    image = torch.tensor([0, 10, 20, 250], dtype=torch.uint8).view(1, 1, 2, 2)  # mean 70
    assert proxies.inverted(image, seeded()).flatten().tolist() == [255, 245, 235, 5]
    assert proxies.thresholded(image, seeded()).flatten().tolist() == [0, 0, 0, 255]


def test_mixed_images_are_of_two_classes():
    images = torch.tensor([0, 0, 200, 200], dtype=torch.uint8).view(4, 1, 1, 1)
    labels, rows = torch.tensor([0, 0, 1, 1]), torch.arange(4).repeat(100)
    made = proxies.mixed(images, labels, rows, seeded()).view(100, 4)
    assert made[:, :2].min() >= 80 and made[:, :2].max() <= 120
    assert made[:, 2:].min() >= 80 and made[:, 2:].max() <= 120
    alone = proxies.mixed(images, torch.zeros(4).long(), rows, seeded())
    assert len(alone) == 400  # one class in the batch: no error, nobody waits


def test_noise_is_white_or_smooth():
    made = proxies.noise(torch.empty(200, 1, 32, 32), seeded()).double()
    step = made.diff(dim=3).square().mean((1, 2, 3)) / made.var((1, 2, 3))
    white = step > 1  # 2 for independent pixels
    assert 70 < white.sum() < 130
    torch.testing.assert_close(step[white].mean(), torch.tensor(2.0).double(), rtol=0.05, atol=0)
    assert step[~white].max() < 0.2
    assert (made[~white].amin((1, 2, 3)) == 0).all() and (made[~white].amax((1, 2, 3)) == 255).all()


def test_glyphs_are_drawings_of_few_colors():
    made = glyphs(torch.empty(200, 1, 32, 32), seeded())
    for image in made[:50]:
        counts = image.flatten().bincount(minlength=256).sort(descending=True).values
        assert counts[:4].sum() > 0.6 * 32 * 32  # paper and at most three colors; edges are soft
    assert (made.flatten(1).float().std(1) > 0).double().mean() > 0.97
    light = made.flatten(1).float().mean(1) > 127.5
    assert 0.3 < light.double().mean() < 0.7


def test_distances_of_glyphs_by_hand():
    """Ellipses of radii 0.8 and 0.8 turned by 0; a triangle of in-radius 0.65; a stroke."""

    def ones(*shape):
        return torch.ones(shape)

    points = torch.tensor([[[0.0, 0.0], [0.8, 0.0], [0.0, -1.0]]])
    torch.testing.assert_close(_ellipses(ones, 1, points), torch.tensor([[-0.8, 0.0, 0.2]]))
    inside = _polygons(lambda *shape: torch.zeros(shape), 1, points)  # r = 0.15, n_0 = (1, 0)
    torch.testing.assert_close(inside, torch.tensor([[-0.15, 0.65, 3**0.5 / 2 - 0.15]]))
    stroke = torch.tensor([[[[0.0, 0.0], [1.0, 0.0]], [[5.0, 5.0], [5.0, 5.0]]]])
    points = torch.tensor([[0.5, 0.25], [-3.0, 4.0], [2.0, 0.0], [5.0, 6.0]])
    torch.testing.assert_close(_to_strokes(points, stroke), torch.tensor([[0.25, 5.0, 1.0, 1.0]]))


def test_pools_are_bounded_and_of_the_folder(folder, monkeypatch):
    monkeypatch.setattr(proxies, "POOL_BYTES", 7 * 3 * 16 * 16)
    pools = proxy_pools(READ, (3, 16, 16), CPU, folder=folder)
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


@pytest.mark.parametrize("name", [*MADE, "mixed"])
def test_no_kind_copies_from_the_host(name):
    """On a GPU the host would wait for it."""
    images, labels = pictures(6, (3, 12, 9)), torch.arange(6) % 2
    with NoCopies():
        made = proxy_batch([name], images, seeded(), 5, labels=labels)
    assert len(made) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*MADE, "mixed"])
def test_proxies_on_a_gpu_do_not_wait_for_it(name):
    device = torch.device("cuda")
    images, labels = pictures(6, (3, 12, 9)).to(device), (torch.arange(6) % 2).to(device)
    generator = torch.Generator(device)

    def make():
        generator.manual_seed(1)
        return proxy_batch([name], images, generator, 5, labels=labels)

    wanted = make()  # loads the kernels
    with no_waiting():
        made = make()
    assert torch.equal(made, wanted)


def test_refusals():
    images = pictures(2)
    with pytest.raises(ValueError, match="unknown proxy 'glyph'"):
        proxy_batch(["glyph"], images, seeded(), 1)
    with pytest.raises(ValueError, match="pools: wanted photos"):
        proxy_batch(["photos"], images, seeded(), 1)
    with pytest.raises(TypeError, match="images must be uint8, got"):
        proxy_batch(["noise"], images.float(), seeded(), 1)
    assert "openclipart" not in NAMES  # the attackers' query set
