"""RandAugment and Cutout, change by change."""

import pytest
import torch
from testing import seeded

from divqat.data import strong
from divqat.data.strong import CHANGES, GREY, cut_out, strongly_augmented

IMAGES = torch.randint(256, (6, 3, 9, 12), generator=seeded(), dtype=torch.uint8)
X = IMAGES.float()
STRENGTH = torch.tensor([0.0, 0.2, 0.4, 0.5, 0.7, 0.99]).view(6, 1, 1, 1)


def test_a_generator_alone_decides():
    before = torch.get_rng_state()
    one, same, other = (strongly_augmented(IMAGES, seeded(seed)) for seed in (1, 1, 2))
    assert one.dtype == torch.uint8 and one.shape == IMAGES.shape
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(IMAGES.float(), X)  # unchanged


def test_every_change_gives_pixels():
    for shape in ((3, 9, 12), (1, 8, 8), (3, 1, 1)):
        x = torch.randint(256, (6, *shape), generator=seeded()).float()
        for change in CHANGES:
            made = change(x, STRENGTH)
            assert made.shape == x.shape and made.isfinite().all()
            assert made.min() > -1e-3 and made.max() < 255 + 1e-3
            flat = change(torch.full_like(x, 77.0), STRENGTH)  # nothing to stretch or to equalize
            assert flat.isfinite().all() and flat.max() <= 178 + 1e-3


def test_changes_by_hand():
    dark = torch.tensor([10.0, 20.0, 20.0, 60.0]).view(1, 1, 2, 2)
    half = torch.full((1, 1, 1, 1), 0.5)
    wanted = {
        strong.autocontrast: [0, 51, 51, 255],
        strong.equalize: [0, 170, 170, 255],  # 0, 2 and 3 of the 3 pixels that are not the darkest
        strong.brightness: [5, 10, 10, 30],
        strong.contrast: [18.75, 23.75, 23.75, 43.75],  # half way to 27.5
        strong.color: [10, 20, 20, 60],
        strong.sharpness: [18.75, 23.75, 23.75, 43.75],  # each pixel sees all four
        strong.posterize: [8, 20, 20, 60],  # 4 + floor(2.5) = 6 bits
        strong.solarize: [10, 20, 20, 60],
    }
    for change, pixels in wanted.items():
        torch.testing.assert_close(change(dark, half).flatten(), torch.tensor(pixels).float())
    dim = torch.full((1, 1, 1, 1), 0.1)  # a threshold of 25.5
    assert strong.solarize(dark, dim).flatten().tolist() == [10, 20, 20, 195]
    colorful = torch.tensor([30.0, 60.0, 90.0]).view(1, 3, 1, 1)
    assert strong.color(colorful, half).flatten().tolist() == pytest.approx([45, 60, 75])


def test_what_moves_goes_where_it_should():
    rotate, shear_x, shear_y, shift_x, shift_y = CHANGES[-5:]
    middle = torch.full((6, 1, 1, 1), 0.5)
    for change in (rotate, shear_x, shear_y, shift_x, shift_y):
        torch.testing.assert_close(change(X, middle), X, rtol=0, atol=1e-2)
    x = torch.randint(256, (1, 1, 10, 10), generator=seeded()).float()
    most = torch.ones(1, 1, 1, 1)
    right = torch.cat([x[..., 3:], torch.zeros(1, 1, 10, 3)], 3)  # by 0.3 of the side
    torch.testing.assert_close(shift_x(x, most), right, rtol=0, atol=1e-2)
    torch.testing.assert_close(shift_y(x.mT, most), right.mT, rtol=0, atol=1e-2)
    wide = torch.zeros(1, 1, 9, 27)
    wide[..., 4, 13] = 255  # the center stays there
    assert rotate(wide, most)[0, 0, 4, 13] > 254 and shear_x(wide, most)[0, 0, 4, 13] > 254


def test_half_a_side_is_cut_out():
    images = torch.zeros(2000, 1, 8, 12, dtype=torch.uint8)
    cut = cut_out(images, seeded()) == GREY
    rows, columns = cut.any(3).sum(2), cut.any(2).sum(2)
    assert torch.equal(cut.sum((1, 2, 3)), (rows * columns)[:, 0])  # rectangles
    assert set(rows.unique().tolist()) == {2, 3, 4} and columns.max() == 6 and columns.min() >= 3
    assert cut.any(0).all()  # no place is spared
