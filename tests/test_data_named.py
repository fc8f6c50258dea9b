"""Data sets and transfer sets by their names; the file formats are in test_data_files.py."""

import importlib.util
from pathlib import Path

import pytest
import torch

from divqat import data
from divqat.data import DataNotFound

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

    def test_no_other_copy_is_taken_than_the_one_asked_for(self, tmp_path, monkeypatch):
        system, asked = tmp_path / "system", tmp_path / "asked"
        for folder in (system, asked):
            folder.mkdir()
            (folder / "train-images-idx3-ubyte.gz").touch()
        source = data.catalog._SOURCES["fashion-mnist"]
        found = []
        layouts = (("", "train-images-idx3-ubyte*", lambda folder, _: found.append(folder)),)
        here = type(source)(layouts, source.remedy, system=str(system))
        monkeypatch.setitem(data.catalog._SOURCES, "fashion-mnist", here)
        for root in (None, asked):
            with pytest.raises(AttributeError):  # what was found is not read
                data.load("fashion-mnist", data_root=root)
        assert found == [system, asked]
        with pytest.raises(
            DataNotFound, match=r"'fashion-mnist' was not found in .*/none: apt-get"
        ):
            data.load("fashion-mnist", data_root=tmp_path / "none")

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
        with pytest.raises(
            DataNotFound, match=r"'photos' was not found in .*: pass data_root \(--query-root"
        ):
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

    @pytest.mark.slow
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

    @pytest.mark.parametrize("name", ["openclipart", "icons"])
    def test_a_folder_without_it_is_no_reason_to_take_another(self, name, tmp_path, monkeypatch):
        monkeypatch.setattr(data.transfer, f"{'ICONS' if name == 'icons' else 'CLIPART'}_ROOT", "/")
        with pytest.raises(DataNotFound, match=f"'{name}' was not found in {tmp_path}/{name}: "):
            data.transfer_set(name, channels=1, image_size=8, data_root=tmp_path)

    def test_missing_says_what_to_do(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data.transfer, "CLIPART_ROOT", str(tmp_path))
        with pytest.raises(DataNotFound, match="apt-get install openclipart-png"):
            data.transfer_set("openclipart", channels=1, image_size=8)
        monkeypatch.setattr(data.transfer, "ICONS_ROOT", str(tmp_path))
        with pytest.raises(DataNotFound, match="apt-get install oxygen-icon-theme"):
            data.transfer_set("icons", channels=1, image_size=8)
        wanted = r"'folder' was not found: pass data_root \(--query-root, of proxies --proxy-root\)"
        with pytest.raises(DataNotFound, match=wanted):
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
