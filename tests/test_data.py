"""Splits, batches and named data sets; the file formats are in test_data_files.py."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from testing import seeded

from divqat import data
from divqat.data import DataNotFound, ImageSet, Splits
from divqat.data.batches import to_uint8

FASHION = Path("/usr/share/datasets/fashion-mnist")
CLIPART = Path("/usr/share/openclipart/png")
needs_fashion = pytest.mark.skipif(
    not FASHION.is_dir(), reason="needs apt-get install dataset-fashion-mnist"
)
needs_clipart = pytest.mark.skipif(
    not CLIPART.is_dir(), reason="needs apt-get install openclipart-png"
)
needs_sklearn = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn"
)
needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs Pillow")


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


class TestLoad:
    @needs_sklearn
    def test_digits(self):
        splits = data.load("digits")
        sizes = [len(s) for s in (splits.train, splits.validation, splits.test)]
        assert sum(sizes) == 1797 and abs(sizes[2] - 359) < 6 and abs(sizes[1] - 144) < 6
        assert (splits.channels, splits.image_size, splits.num_classes) == (1, (8, 8), 10)
        assert splits.train.images.max() == 255 and splits.train.images.min() == 0
        again = data.load("digits", validation_fraction=0.2)
        assert torch.equal(again.test.images, splits.test.images)  # validation does not touch it
        assert len(again.validation) > sizes[1]

    @needs_fashion
    def test_fashion_mnist(self):
        splits = data.load("fashion-mnist")
        assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [
            54000,
            6000,
            10000,
        ]
        assert splits.validation.labels.bincount().tolist() == [600] * 10
        assert (splits.channels, splits.image_size) == (1, (28, 28))
        assert splits.test.labels[:5].tolist() == [9, 2, 1, 1, 6]
        assert splits.classes[9] == "Ankle boot"

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"'fashionmnist' \(did you mean 'fashion-mnist'\?\)"):
            data.load("fashionmnist")
        with pytest.raises(ValueError, match=r"validation_fraction must be in \[0, 1\), got 1"):
            data.load("digits", validation_fraction=1)

    @pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "gtsrb", "folder"])
    def test_missing_data_says_what_to_do(self, name, tmp_path):
        with pytest.raises(DataNotFound, match="--data-root DIR"):
            data.load(name)
        with pytest.raises(FileNotFoundError, match=f"'{name}' was not found in {tmp_path}/x: "):
            data.load(name, data_root=tmp_path / "x")

    def test_missing_fashion_mnist_names_the_package(self, tmp_path, monkeypatch):
        source = data.catalog._SOURCES["fashion-mnist"]
        gone = type(source)(source.layouts, source.remedy, system=str(tmp_path))
        monkeypatch.setitem(data.catalog._SOURCES, "fashion-mnist", gone)
        with pytest.raises(DataNotFound, match="apt-get install dataset-fashion-mnist, or pass"):
            data.load("fashion-mnist")

    def test_missing_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r"pip install 'divqat\[data\]'"):
            data.load("digits")


class TestTransferSet:
    @pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, (9, 12))])
    def test_noise(self, channels, size):
        x = data.transfer_set("noise", channels=channels, image_size=size, limit=50)
        height, width = (size, size) if isinstance(size, int) else size
        assert x.shape == (50, channels, height, width) and x.dtype == torch.uint8
        assert 100 < x.float().mean() < 155
        again = data.transfer_set("noise", channels=channels, image_size=size, limit=50)
        other = data.transfer_set("noise", channels=channels, image_size=size, limit=50, seed=1)
        assert torch.equal(x, again) and not torch.equal(x, other)

    @needs_sklearn
    @needs_pillow
    @pytest.mark.parametrize("channels", [1, 3])
    def test_photos(self, channels):
        x = data.transfer_set("photos", channels=channels, image_size=28, limit=500)
        assert x.shape == (500, channels, 28, 28) and x.dtype == torch.uint8
        assert (x.float().std(dim=(1, 2, 3)) > 1).float().mean() > 0.9  # not one color
        assert x.unique(dim=0).shape[0] > 480

    @needs_pillow
    def test_photos_of_a_folder(self, tmp_path):
        from PIL import Image

        Image.new("L", (40, 64), 90).save(tmp_path / "a.png")
        Image.new("L", (20, 30), 7).save(tmp_path / "small.png")  # less than a patch
        x = data.transfer_set("photos", channels=1, image_size=28, limit=9, data_root=tmp_path)
        assert x.shape == (9, 1, 28, 28) and (x == 90).all()
        with pytest.raises(DataNotFound, match=r"'photos' was not found in .*: pass --data-root"):
            empty = tmp_path / "empty"
            data.transfer_set("photos", channels=1, image_size=28, data_root=empty)

    @needs_sklearn
    @needs_pillow
    def test_of_scikit_image_only_photos_are_taken(self, tmp_path, monkeypatch):
        """It ships files that are broken on purpose."""
        from PIL import Image

        (tmp_path / "data").mkdir()
        Image.new("L", (64, 64), 90).save(tmp_path / "data" / "moon.png")
        (tmp_path / "data" / "multipage_rgb.tif").write_bytes(b"none")
        (tmp_path / "__init__.py").touch()
        spec = importlib.util.spec_from_file_location(
            "skimage", tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)]
        )
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        x = data.transfer_set("photos", channels=1, image_size=28, limit=500)
        moon = (x == 90).all(dim=(1, 2, 3)).float().mean()
        assert 0.05 < moon < 0.5

    @needs_pillow
    def test_icons_of_a_folder_are_darkened(self, tmp_path):
        from PIL import Image

        (tmp_path / "icons").mkdir()
        Image.new("L", (48, 48), 250).save(tmp_path / "icons" / "a.png")
        x = data.transfer_set("icons", channels=1, image_size=28, limit=2, data_root=tmp_path)
        assert (x == 5).all()

    @needs_clipart
    @needs_pillow
    @pytest.mark.filterwarnings("ignore:left out")
    def test_openclipart(self):
        x = data.transfer_set("openclipart", channels=1, image_size=28, limit=200)
        assert x.shape == (200, 1, 28, 28)
        assert x[:, :, 0].float().mean() < 60  # dark background
        rgb = data.transfer_set("openclipart", channels=3, image_size=32, limit=200)
        assert rgb.shape == (200, 3, 32, 32)
        assert rgb[:, :, 0].float().mean() > 180  # light background

    def test_missing_says_what_to_do(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data.transfer, "CLIPART_ROOT", str(tmp_path))
        with pytest.raises(DataNotFound, match="apt-get install openclipart-png"):
            data.transfer_set("openclipart", channels=1, image_size=8)
        monkeypatch.setattr(data.transfer, "ICONS_ROOT", str(tmp_path))
        with pytest.raises(DataNotFound, match="apt-get install oxygen-icon-theme"):
            data.transfer_set("icons", channels=1, image_size=8)
        with pytest.raises(DataNotFound, match="'folder' was not found: pass --data-root DIR"):
            data.transfer_set("folder", channels=1, image_size=8)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"name": "clipart"}, r"'clipart' \(did you mean 'openclipart'\?\)"),
            ({"channels": 2}, "channels must be 1 or 3, got 2"),
            ({"image_size": 0}, r"image_size must be \(H, W\), both at least 1, got 0"),
            ({"limit": 0}, "limit must be at least 1, got 0"),
        ],
    )
    def test_refuses(self, change, message):
        arguments = {"name": "noise", "channels": 1, "image_size": 8} | change
        with pytest.raises(ValueError, match=message):
            data.transfer_set(arguments.pop("name"), **arguments)
