"""What is wrong with a data set is said before it is trained on."""

import numpy as np
import pytest
from toys import toy_images

from divqat import data
from divqat._util.settings import ConfigError
from divqat.data import checks
from divqat.data.checks import check_classes, find_copies
from divqat.data.sets import ImageSet, Splits
from divqat.train import TrainConfig, train
from divqat.train import run as loop

Image = pytest.importorskip("PIL.Image")


def picture(path, seed, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def make_folder(root, classes=("cat", "dog"), count=6):
    """train/ and test/ with a folder per class; no two pictures are the same."""
    for split, start in (("train", 0), ("test", 1000)):
        for number, name in enumerate(classes):
            for i in range(count):
                picture(root / split / name / f"{i}.png", start + 100 * number + i)
    return root


def load(root, stream):
    return data.load("folder", data_root=root, image_size=8, stream=stream, workers=0)


def config(root, stream="auto", **changes):
    settings = {"method": "fp", "dataset": "folder", "model": "lenet", "epochs": 1, "batch_size": 4}
    settings |= {"data_root": str(root), "image_size": 32, "stream": stream, "workers": 0}
    return TrainConfig(**settings | {"device": "cpu"} | changes)


streams = pytest.mark.parametrize("stream", ["always", "never"])


@streams
def test_nothing_is_said_of_a_sound_folder(tmp_path, stream):
    splits = load(make_folder(tmp_path), stream)
    assert check_classes(splits) == find_copies(splits) == []


@streams
def test_copies_in_train_and_test(tmp_path, monkeypatch, stream):
    root = make_folder(tmp_path)
    picture(root / "test" / "dog" / "copy.png", 3)  # train/cat/3.png
    if stream == "always":  # of its size, and with its end
        near = b"\x00" + (root / "train" / "cat" / "3.png").read_bytes()[1:]
        (root / "test" / "dog" / "near.png").write_bytes(near)
        monkeypatch.setattr(checks, "TAIL", 100)
    splits = load(root, stream)
    (line,) = find_copies(splits)
    count = len(splits.test)
    assert line.startswith(f"folder: 1 of {count} test images are also in ")
    if stream == "always":
        assert (
            f"{root / 'test' / 'dog' / 'copy.png'} (as {root / 'train' / 'cat' / '3.png'})" in line
        )


def test_the_same_picture_in_another_file_format_is_a_copy_where_it_is_decoded(tmp_path):
    root = make_folder(tmp_path)
    picture(root / "test" / "dog" / "copy.bmp", 3)
    (line,) = find_copies(load(root, "never"))
    assert "1 of 13 test images are also in " in line


def test_copies_of_a_set_in_memory():
    images, labels = toy_images(50, seed=0)
    train = ImageSet(images[:30], labels[:30])
    validation, test = ImageSet(images[30:40], labels[30:40]), ImageSet(images[25:], labels[25:])
    lines = find_copies(Splits("toys", tuple("abcd"), train, validation, test))
    assert lines == [
        "toys: 5 of 25 test images are also in train: "
        "0 (as 25), 1 (as 26), 2 (as 27), 3 (as 28), 4 (as 29)",
        "toys: 10 of 25 test images are also in validation: "
        "5 (as 0), 6 (as 1), 7 (as 2), 8 (as 3), 9 (as 4) and 5 more",
    ]


def test_labels_that_never_occur():
    images, labels = toy_images(40, seed=0)
    sets = [ImageSet(images[part], labels[part]) for part in (slice(20), slice(20, 30))]
    kept = labels[30:] != 2
    test = ImageSet(images[30:][kept], labels[30:][kept])
    splits = Splits("toys", (*"abcd", "never"), *sets, test)
    assert check_classes(splits) == [
        "toys: classes without a train image: never",
        "toys: classes without a test image: c, never",
    ]
    (one,) = labels.unique()[:1]
    alone = sets[0].subset(sets[0].labels == one)
    with pytest.raises(ValueError, match=r"toys: wanted training images of two classes, got a$"):
        check_classes(Splits("toys", tuple("abcd"), alone, sets[1], test))


@streams
def test_class_folders_without_a_picture(tmp_path, stream):
    root = make_folder(tmp_path)
    (root / "train" / "bird").mkdir()
    (root / "train" / "fish").mkdir()
    (root / "train" / "fish" / "readme.txt").touch()
    with pytest.raises(
        ValueError, match="class folders without a picture: bird, fish; fill or delete them"
    ):
        load(root, stream)


@streams
def test_a_training_says_it_before_it_begins(tmp_path, monkeypatch, stream):
    root = make_folder(tmp_path / "data")
    for path in (root / "test" / "dog").iterdir():
        path.unlink()
    picture(root / "test" / "cat" / "copy.png", 3)
    said = []

    def begun(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "Trainer", begun)
    with pytest.raises(KeyboardInterrupt):
        train(config(root, stream), tmp_path / "run", log=said.append)
    assert "warning: folder: classes without a test image: dog" in said
    assert any("1 of 7 test images are also in " in line for line in said)


@streams
def test_one_class_is_an_error_before_the_training(tmp_path, stream):
    root = make_folder(tmp_path / "data", classes=("cat",))
    with pytest.raises(ValueError, match="folder: wanted training images of two classes, got cat"):
        train(config(root, stream), tmp_path / "run", log=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_non_label_with_two_classes_is_an_error_before_the_training(tmp_path):
    root = make_folder(tmp_path / "data")
    teacher = tmp_path / "fp"
    train(config(root), teacher, log=lambda line: None)
    settings = {"method": "divqat", "teacher": str(teacher), "classes": "non_label"}
    with pytest.raises(ConfigError, match="classes: wanted all with two classes, got non_label"):
        train(config(root, **settings), tmp_path / "run", log=lambda line: None)
    assert not (tmp_path / "run").exists()
