"""Splits, batches and augmentation."""

from functools import partial

import pytest
import torch
from testing import seeded

from divqat import data
from divqat.data import ImageSet, Splits
from divqat.data.batches import to_uint8


def images(n=20, channels=1, height=6, width=5, seed=0):
    shape = (n, channels, height, width)
    return torch.randint(256, shape, dtype=torch.uint8, generator=seeded(seed))


def image_set(n=20, classes=4, **shape):
    return ImageSet(images(n, **shape), torch.arange(n) % classes)


class TestSets:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"images": images().float()}, TypeError, "images must be uint8, got torch.float32"),
            ({"labels": torch.zeros(20)}, TypeError, "labels must be int64, got torch.float32"),
            ({"images": images()[:, 0]}, ValueError, r"\[N, C, H, W\], got \[20, 6, 5\]"),
            (
                {"labels": torch.arange(19)},
                ValueError,
                r"must be \[20\], one per image, got \[19\]",
            ),
            ({"labels": torch.zeros(20, 1).long()}, ValueError, r"got \[20, 1\]"),
            ({"labels": torch.arange(20) - 1}, ValueError, "must not be negative, got -1"),
        ],
    )
    def test_image_set_refuses(self, change, error, message):
        with pytest.raises(error, match=message):
            ImageSet(**({"images": images(), "labels": torch.arange(20)} | change))

    def test_subset(self):
        full = image_set()
        for chosen in (torch.tensor([3, 1]), full.labels == 2, slice(2, 9)):
            part = full.subset(chosen)
            assert torch.equal(part.images, full.images[chosen])
            assert torch.equal(part.labels, full.labels[chosen])
        assert len(full.subset(slice(0))) == 0

    def test_splits(self):
        part = image_set(channels=3)
        splits = Splits("toy", ("a", "b", "c", "d"), part, part.subset(slice(0)), part)
        assert (splits.num_classes, splits.channels, splits.image_size) == (4, 3, (6, 5))

    @pytest.mark.parametrize("classes", [4, ["a", "b", "c", "d"], (0, 1, 2, 3)])
    def test_splits_want_the_names_of_their_classes(self, classes):
        part = image_set()
        with pytest.raises(TypeError, match="classes: wanted a tuple of their names, got"):
            Splits("toy", classes, part, part, part)

    def test_splits_refuse_other_shapes_and_unknown_labels(self):
        part = image_set()
        with pytest.raises(ValueError, match=r"test images must be \[1, 6, 5\] .*\[1, 6, 7\]"):
            Splits("toy", tuple("abcd"), part, part, image_set(width=7))
        with pytest.raises(ValueError, match=r"validation labels must be below 3, .* got 3"):
            Splits("toy", tuple("abc"), part.subset(part.labels < 3), part, part)


class TestHoldOut:
    def test_is_stratified_disjoint_complete_and_fixed(self):
        full = ImageSet(images(200), torch.arange(200) % 4)
        # The first pixel pair numbers the images.
        full.images[:, 0, 0, 0] = torch.arange(200).to(torch.uint8)
        rest, held = data.hold_out(full, 0.2)
        assert held.labels.bincount().tolist() == [10] * 4
        numbers = torch.cat([rest.images, held.images])[:, 0, 0, 0]
        assert numbers.unique().numel() == 200
        assert torch.equal(held.images, data.hold_out(full, 0.2)[1].images)
        assert not torch.equal(held.images, data.hold_out(full, 0.2, seed=1)[1].images)

    def test_keeps_groups_together(self):
        labels, groups = torch.arange(120) % 2, torch.arange(120) // 10
        full = ImageSet(groups.to(torch.uint8).view(-1, 1, 1, 1).clone(), labels)
        rest, held = data.hold_out(full, 0.25, groups=groups)
        for label in (0, 1):
            sides = [set(s.images[s.labels == label].flatten().tolist()) for s in (rest, held)]
            assert not sides[0] & sides[1] and len(sides[1]) == 3

    @pytest.mark.parametrize("fraction", [-0.1, 1.0])
    def test_refuses_fraction(self, fraction):
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\)"):
            data.hold_out(image_set(), fraction)


class TestBatches:
    def test_to_uint8_undoes_to_float_rounds_and_clips(self):
        levels = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(to_uint8(data.to_float(levels)), levels)
        # 127.5 is the middle: 0.4 and 1.6 levels above it, and beyond both ends.
        floats = torch.tensor([-9, -1, 0.4 / 127.5, 1.6 / 127.5, 1, 9])
        assert to_uint8(floats).tolist() == [0, 0, 128, 129, 255, 255]

    def test_to_float_is_exact_at_the_ends(self):
        x = data.to_float(torch.tensor([0, 255, 127, 128], dtype=torch.uint8))
        assert x.dtype == torch.float32
        assert x[0] == -1 and x[1] == 1
        torch.testing.assert_close(x[2:], torch.tensor([-1 / 255, 1 / 255]))
        with pytest.raises(TypeError, match="must be uint8, got"):
            data.to_float(x)

    def test_in_order(self):
        full = image_set(10)
        parts = list(data.batches(full, 4))
        assert [len(labels) for _, labels in parts] == [4, 4, 2]
        assert torch.equal(torch.cat([x for x, _ in parts]), data.to_float(full.images))
        assert torch.equal(torch.cat([y for _, y in parts]), full.labels)
        assert [len(y) for _, y in data.batches(full, 4, drop_last=True)] == [4, 4]
        assert list(data.batches(full.subset(slice(0)), 4)) == []

    def test_generator_alone_determines_order_and_augmentation(self):
        full = image_set(50)
        augment = partial(data.augment, pad=2, flip=True)

        def epoch(seed):
            parts = list(data.batches(full, 16, generator=seeded(seed), augment=augment))
            return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

        torch.manual_seed(1)
        first = epoch(0)
        torch.manual_seed(2)
        again = epoch(0)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert not torch.equal(first[0], epoch(1)[0])

    def test_shuffles_images_with_their_labels(self):
        full = ImageSet(torch.arange(50).to(torch.uint8).view(-1, 1, 1, 1), torch.arange(50))
        generator = seeded()
        for _ in range(2):  # another order in the second epoch
            parts = list(data.batches(full, 8, generator=generator))
            x, y = (torch.cat(column) for column in zip(*parts, strict=True))
            assert torch.equal((x.flatten() + 1).mul(127.5).round().long(), y)
            assert torch.equal(y.sort().values, full.labels) and not torch.equal(y, full.labels)

    def test_refuses(self):
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            data.batches(image_set(), 0)
        with pytest.raises(ValueError, match="augment needs a generator"):
            data.batches(image_set(), 2, augment=partial(data.augment, pad=1))


class TestAugment:
    @pytest.mark.parametrize("flip", [False, True])
    def test_agrees_with_one_image_at_a_time(self, flip):
        x, pad = images(200, channels=3), 2
        result = data.augment(x, seeded(), pad=pad, flip=flip)
        assert result.shape == x.shape and result.dtype == torch.uint8
        seen = set()
        for image, out in zip(x, result, strict=True):
            padded = torch.nn.functional.pad(image, (pad,) * 4)
            matches = [
                (y, x, mirrored)
                for y in range(2 * pad + 1)
                for x in range(2 * pad + 1)
                for mirrored in (False, True)
                for crop in [padded[:, y : y + 6, x : x + 5]]
                if torch.equal(crop.flip(2) if mirrored else crop, out)
            ]
            assert len(matches) == 1
            seen.add(matches[0])
        assert len(seen) > (45 if flip else 23)  # of 50 and 25
        assert {mirrored for *_, mirrored in seen} == ({False, True} if flip else {False})

    def test_float_agrees_with_uint8(self):
        x = images(30)
        expected = data.to_float(data.augment(x, seeded(), pad=3, flip=True))
        assert torch.equal(data.augment(data.to_float(x), seeded(), pad=3, flip=True), expected)

    def test_no_shift_no_flip_is_the_identity(self):
        assert torch.equal(data.augment(images(), seeded(), pad=0), images())

    def test_refuses(self):
        with pytest.raises(ValueError, match="pad must not be negative, got -1"):
            data.augment(images(), seeded(), pad=-1)
        with pytest.raises(ValueError, match=r"\[N, C, H, W\], got \[6, 5\]"):
            data.augment(images()[0, 0], seeded(), pad=1)
