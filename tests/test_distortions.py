"""What proxies are made of: each way to bend or draw an image does what it says."""

import pytest
import torch
from testing import seeded

from divqat.data import distortions
from divqat.data.distortions import GRID
from divqat.data.glyphs import _ellipses, _polygons, _to_strokes, glyphs
from divqat.data.leaves import leaves


def test_shuffled_images_have_the_same_patches_in_another_order():
    numbers = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    image = numbers.repeat_interleave(3, 2).repeat_interleave(2, 3)
    image = torch.nn.functional.pad(image, (0, 1, 0, 2), value=99)  # 14 x 9
    made = distortions.shuffled(image.expand(50, 1, 14, 9), seeded())
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
    made = distortions.rotated(image.expand(200, 1, height, width), seeded())[:, 0].double()
    made *= x * x + y * y < (min(height, width) // 2) ** 2  # beyond, mirrored dots come in
    x, y = ((made * axis).sum((1, 2)) / made.sum((1, 2)) for axis in (x, y))
    torch.testing.assert_close(torch.hypot(x, y), torch.full_like(x, away), rtol=0, atol=0.5)
    angle = torch.atan2(y, x).rad2deg() % 360
    assert 59 < angle.min() < 70 and 290 < angle.max() < 301


def test_warped_images_are_bent_smoothly_and_within_reach(monkeypatch):
    ramp = torch.arange(64).mul(4).to(torch.uint8).expand(20, 1, 64, 64)
    made = distortions.warped(ramp, seeded()).float()
    inner = (made - ramp.float())[..., 16:-16]
    # 0.4 halves of 64 pixels, 4 grey levels each; bicubic interpolation overshoots a little
    assert 20 < inner.abs().amax() < 1.3 * 0.4 * 32 * 4
    assert made.diff(dim=2).abs().amax() < 30  # along the ramp's lines it was 0: no tears
    monkeypatch.setattr(distortions, "REACH", 0.0)
    assert torch.equal(distortions.warped(ramp, seeded()), ramp)


def test_zoomed_images_are_small_or_large_and_somewhere_else():
    """A ramp along both axes becomes so much steeper or flatter."""
    ramp = torch.arange(64).mul(2).add(60).to(torch.uint8)
    image = (ramp[:, None] // 2 + ramp // 2).expand(400, 1, 64, 64)
    made = distortions.zoomed(image, seeded()).double()[:, 0]
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
    monkeypatch.setattr(distortions, "PASTED", 1)
    white = torch.full((300, 1, height, width), 255, dtype=torch.uint8)
    made = distortions.collage(white, seeded())[:, 0]
    paper = made.flatten(1).median(1).values  # less than half of it is covered
    assert 100 < (paper == 0).sum() < 200  # half of them black
    inked = (made != paper[:, None, None]).double().mean((1, 2))
    shown = inked > 0
    assert shown.double().mean() > 0.8  # inverted ones on black are not to be seen
    # 0.9 of each side of it is shown, of 0.25 to 0.7 of the picture's
    assert inked.max() < 1.05 * (0.9 * 0.7) ** 2
    assert 0.5 * (0.9 * 0.475) ** 2 < inked[shown].mean() < 1.3 * (0.9 * 0.475) ** 2
    monkeypatch.setattr(distortions, "PASTED", 3)
    many = (distortions.collage(white, seeded())[:, 0] != 0).double().mean()
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
    assert torch.equal(distortions.edges(image, seeded()), wanted)
    assert not distortions.edges(torch.full((1, 3, 8, 8), 9, dtype=torch.uint8), seeded()).any()


def test_inverted_and_thresholded_by_hand():
    image = torch.tensor([0, 10, 20, 250], dtype=torch.uint8).view(1, 1, 2, 2)  # mean 70
    assert distortions.inverted(image, seeded()).flatten().tolist() == [255, 245, 235, 5]
    assert distortions.thresholded(image, seeded()).flatten().tolist() == [0, 0, 0, 255]


def test_mixed_images_are_of_two_classes():
    images = torch.tensor([0, 0, 200, 200], dtype=torch.uint8).view(4, 1, 1, 1)
    labels, rows = torch.tensor([0, 0, 1, 1]), torch.arange(4).repeat(100)
    made = distortions.mixed(images, labels, rows, seeded()).view(100, 4)
    assert made[:, :2].min() >= 80 and made[:, :2].max() <= 120
    assert made[:, 2:].min() >= 80 and made[:, 2:].max() <= 120
    alone = distortions.mixed(images, torch.zeros(4).long(), rows, seeded())
    assert len(alone) == 400  # one class in the batch: no error, nobody waits


def test_noise_is_white_or_smooth():
    made = distortions.noise(torch.empty(200, 1, 32, 32), seeded()).double()
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


def test_augmented_images_are_turned_a_little_and_every_second_one_mirrored():
    """Of a ramp along x the gradient turns, whatever happens to its size and sign."""
    ramp = (64 + 4 * torch.arange(32)).to(torch.uint8).expand(1, 3, 32, 32)
    made = distortions.augmented(ramp.expand(400, 3, 32, 32), seeded()).double()
    middle = made[:, 0, 8:24, 8:24]  # what is moved in is outside
    x, y = middle.diff(dim=2).mean((1, 2)), middle.diff(dim=1).mean((1, 2))
    angle = torch.atan2(-y, x).rad2deg()
    mirrored = angle.abs() > 90
    assert 140 < mirrored.sum() < 260  # six standard deviations
    tilt = torch.where(mirrored, angle.abs() - 180, angle.abs()).abs()
    assert 13 < tilt.max() < 17  # 15, up to rounding
    change = torch.hypot(x, y) / 4
    assert 0.3 < change.min() < 0.6 and 1.3 < change.max() < 2.0  # 0.6² 0.85 ... 1.4² 1.1
    assert ((made > 0).double().mean((1, 2, 3)) > 0.5).all()


def test_augmented_images_are_lighter_darker_and_sometimes_gray():
    color = torch.tensor([70, 80, 95], dtype=torch.uint8).view(1, 3, 1, 1)
    made = distortions.augmented(color.expand(500, 3, 9, 7), seeded())[:, :, 4, 3].double()
    gray = (made.amax(1) - made.amin(1)) <= 1
    assert 46 < gray.sum() < 154  # six standard deviations
    mean = made @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64) / 78.72
    assert 0.59 < mean.min() < 0.65 and 1.35 < mean.max() < 1.41
    spread = (made.amax(1) - made.amin(1))[~gray] / 25 / mean[~gray]
    assert 0.29 < spread.min() < 0.5 and 1.5 < spread.max() < 2.03  # 0.6², 1.4², rounded
    one = distortions.augmented(color[:, :1].expand(4, 1, 8, 8), seeded())
    assert one.shape == (4, 1, 8, 8)
