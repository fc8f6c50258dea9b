"""Readers of picture folders, on small files that the tests write."""

import numpy as np
import pytest
import torch

from divqat import data
from divqat.data import pictures

pytest.importorskip("PIL", reason="needs Pillow")


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class TestPictures:
    def save(self, path, array):
        from PIL import Image

        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
        return path

    def test_gtsrb(self, tmp_path):
        root = tmp_path / "GTSRB"
        header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
        for label in (0, 42):
            folder = root / "Final_Training" / "Images" / f"{label:05d}"
            rows = [f"{track:05d}_{frame:05d}.ppm" for track in range(4) for frame in range(3)]
            for name in rows:  # the red value is the track
                color = np.full((30 + label, 29, 3), int(name[4]), dtype=np.uint8)
                self.save(folder / name, color)
            table = "".join(f"{name};29;30;5;6;24;25;{label}\n" for name in rows)
            (folder / f"GT-{label:05d}.csv").write_text(header + table)
        self.save(root / "Final_Test" / "Images" / "00000.ppm", pixels(40, 41, 3))
        answers = root / "GT-final_test.csv"
        with pytest.raises(ValueError, match=r"GT-final_test\.csv .* is missing in"):
            data.load("gtsrb", data_root=tmp_path)
        answers.write_text(header + "00000.ppm;41;40;5;5;36;35;16\n")
        splits = data.load("gtsrb", data_root=tmp_path, validation_fraction=0.25)
        assert splits.num_classes == 43 and splits.image_size == (32, 32)
        assert splits.test.labels.tolist() == [16] and len(splits.train) == 18
        for label in (0, 42):  # whole tracks
            part = splits.validation.subset(splits.validation.labels == label)
            assert len(part) == 3 and part.images.unique().numel() == 1
        answers.write_text("Filename;Width\n00000.ppm;41\n")
        with pytest.raises(ValueError, match=r"GT-final_test\.csv must have the columns"):
            data.load("gtsrb", data_root=tmp_path)

    def test_folder_with_splits(self, tmp_path):
        for split, count in (("train", 10), ("test", 3), ("val", 2)):
            for label, name in enumerate(["cat", "dog"]):
                for i in range(count):
                    gray = np.full((20, 30, 3), 10 * label + i, dtype=np.uint8)
                    self.save(tmp_path / split / name / f"{i}.png", gray)
        splits = data.load("folder", data_root=tmp_path, image_size=16)
        assert splits.classes == ("cat", "dog") and splits.image_size == (16, 16)
        assert [len(splits.train), len(splits.validation), len(splits.test)] == [20, 4, 6]
        assert splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert splits.test.images[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
        self.save(tmp_path / "test" / "cow" / "0.png", pixels(9, 9, 3))
        with pytest.raises(ValueError, match="not training classes: cow"):
            data.load("folder", data_root=tmp_path)

    def test_folder_without_splits_is_grey_when_its_pictures_are(self, tmp_path):
        for name in ("a", "test"):  # without train/, test is a class as any other
            for i in range(10):
                self.save(tmp_path / name / f"{i}.PNG", pixels(9, 9, seed=i))
        splits = data.load("folder", data_root=tmp_path, validation_fraction=0.25)
        assert splits.classes == ("a", "test") and splits.channels == 1
        assert [len(splits.train), len(splits.validation), len(splits.test)] == [12, 4, 4]

    def test_folder_without_pictures(self, tmp_path):
        (tmp_path / "a").mkdir()
        with pytest.raises(ValueError, match="has no pictures in folders"):
            data.load("folder", data_root=tmp_path)

    def test_decode_fits(self, tmp_path):
        wide = np.zeros((10, 20, 3), dtype=np.uint8)
        wide[:, 5:15] = 200  # the middle square
        paths = [self.save(tmp_path / "wide.png", wide)]

        def column_means(fit):
            return pictures.decode(paths, (8, 8), 3, fit)[0][0, 0].float().mean(0)

        assert (column_means("crop") > 180).all()
        assert (column_means("stretch")[[0, -1]] == 0).all()
        contained = pictures.decode(paths, (8, 8), 3, "contain")[0][0, 0]
        assert (contained[[0, 1, -2, -1]] == 255).all() and (contained[2:6, 3:5] == 200).all()

    def test_transparent_becomes_white(self, tmp_path):
        clear = np.zeros((8, 8, 4), dtype=np.uint8)
        clear[:, :4, 3] = 255  # left half black, right half transparent black
        x = pictures.decode([self.save(tmp_path / "x.png", clear)], (8, 8), 1, "contain")[0][0, 0]
        assert (x[:, :4] == 0).all() and (x[:, 4:] == 255).all()

    def test_damaged_are_left_out_with_one_warning(self, tmp_path):
        good = self.save(tmp_path / "b.png", pixels(9, 9, 3))
        for name, content in (("a.png", b"no"), ("c.png", good.read_bytes()[:100])):
            (tmp_path / name).write_bytes(content)
        with pytest.warns(UserWarning, match=r"left out 2 of 3 .*a\.png") as caught:
            x, kept = pictures.decode(pictures.list_pictures(tmp_path), (8, 8), 3, "crop")
        assert len(caught) == 1 and kept == [1] and x.shape == (1, 3, 8, 8)
        good.unlink()
        with pytest.raises(ValueError, match="none of 2 picture files is readable"):
            pictures.decode(pictures.list_pictures(tmp_path), (8, 8), 3, "crop")

    def test_transfer_set_of_drawings(self, tmp_path):
        for i in range(6):
            drawing = np.zeros((40, 40, 4), dtype=np.uint8)
            drawing[10:30, 10:30] = (i * 20, 0, 0, 255)
            self.save(tmp_path / "openclipart" / "x" / f"{i}.png", drawing)
        first = tmp_path / "openclipart" / "x" / "0.png"
        (tmp_path / "openclipart" / "link.png").symlink_to(first)
        self.save(tmp_path / "victim.png", pixels(9, 9, 3))  # not part of openclipart

        def queries(name="openclipart", **options):
            options = {"channels": 1, "image_size": 10} | options
            return data.transfer_set(name, data_root=tmp_path, **options)

        x = queries()
        assert x.shape == (24, 1, 10, 10)  # four of each, without the link
        assert (x[:6, :, 0] == 0).all() and (x[:6, :, 5, 5] > 200).all()  # inverted
        assert torch.equal(x, queries()) and not torch.equal(x, queries(seed=1))
        assert torch.equal(x[:15], queries(limit=15))
        assert len(queries(limit=30)) == 30  # a fifth variant
        assert x[:6].unique(dim=0).shape[0] == 6  # distinct files first
        rgb = queries(channels=3)
        assert (rgb[:6, :, 0] == 255).all()
        folder = queries("folder")
        assert len(folder) == 8 and (folder[:, :, 0] == 255).all(dim=(1, 2)).sum() == 7

    def test_variants_keep_scale_and_place(self):
        # A centered disc is the same after any rotation; only the crop changes its size.
        y, x = torch.meshgrid(torch.arange(40) - 19.5, torch.arange(40) - 19.5, indexing="ij")
        disc = ((x**2 + y**2 < 100) * 255).to(torch.uint8).expand(200, 1, 40, 40)
        out = data.transfer._vary(disc, torch.Generator().manual_seed(0)).float() / 255
        area = out.sum(dim=(1, 2, 3)) / (torch.pi * 25)  # of the disc at half size
        assert area.max() < 1 / 0.6**2 + 0.05 and area.min() > 0.8 and area.std() > 0.2
