"""Pictures that are decoded while they are iterated over."""

import os
import signal
import threading
import time
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from testing import assert_same_batches, no_waiting, seeded
from torch.utils.data import get_worker_info

from divqat import data
from divqat._util.files import load_checkpoint
from divqat.data import ImageSet, StreamedSet, streaming
from divqat.metrics import predict
from divqat.train import TrainConfig, objective, train

pytest.importorskip("PIL", reason="needs Pillow")
SHIFT = partial(data.augment, pad=2, flip=True)
COUNT = 70  # training pictures: more than one piece
pytestmark = pytest.mark.usefixtures("one_thread")


def save(path, array):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_folder(root, train=COUNT, modes=(3, 3, None, 4)):
    """PNG and JPEG of several sizes; color, grey (None) and with transparency."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", 20), ("test", 9)):
        for i in range(count):
            mode = modes[i % len(modes)]
            shape = (12 + i % 7, 11 + i % 5, *([mode] if mode else []))
            suffix = "jpg" if mode == 3 and i % 3 else "png"
            array = random.integers(0, 256, shape, dtype=np.uint8)
            save(root / split / "abc"[i % 3] / f"{i}.{suffix}", array)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def held(folder):
    return load(folder, stream="never")


def load(root, **options):
    return data.load("folder", data_root=root, image_size=8, **options)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streamed_batches_are_those_in_memory(folder, held, workers):
    streamed = load(folder, stream="always", workers=workers)
    assert streamed.classes == held.classes and streamed.image_size == held.image_size
    assert streamed.channels == held.channels == 3
    for name in ("train", "validation", "test"):
        there, here = getattr(held, name), getattr(streamed, name)
        assert isinstance(here, StreamedSet) and isinstance(there, ImageSet)
        assert torch.equal(here.labels, there.labels) and len(here) == len(there)
        assert_same_batches(data.batches(here, 16), data.batches(there, 16))
    state = torch.get_rng_state()
    for options in (
        dict(batch_size=64),  # two pieces
        dict(batch_size=16, augment=SHIFT),
        dict(batch_size=64, augment=SHIFT, drop_last=True),
        dict(batch_size=16, augment=SHIFT, shard=(1, 3)),
    ):
        here, there = (
            data.batches(splits.train, generator=seeded(3), **options)
            for splits in (streamed, held)
        )
        assert_same_batches(here, there)
    assert torch.equal(torch.get_rng_state(), state)  # a training's dropout depends on it


def test_grey_pictures_and_a_split_that_is_held_out(tmp_path):
    for i in range(40):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", np.full((9, 10 + i), i, dtype=np.uint8))
    there, here = (load(tmp_path, stream=stream, workers=0) for stream in ("never", "always"))
    assert here.channels == 1
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(here, name).images, getattr(there, name).images)
        assert torch.equal(getattr(here, name).labels, getattr(there, name).labels)


def test_subsets(folder, held):
    whole = load(folder, stream="always", workers=0).train
    for chosen in (torch.tensor([3, 1]), whole.labels == 2, slice(2, 9), slice(0)):
        part, wanted = whole.subset(chosen), held.train.subset(chosen)
        assert torch.equal(part.images, wanted.images) and torch.equal(part.labels, wanted.labels)


def test_images_of_a_set_beyond_the_memory_are_refused(folder, monkeypatch):
    whole = load(folder, stream="always", workers=0).train
    monkeypatch.setattr(streaming, "STREAM_ABOVE", whole.nbytes - 1)
    with pytest.raises(ValueError, match=r"70 streamed images are .* GiB: take a subset\(\)"):
        _ = whole.images
    assert len(whole.subset(slice(69)).images) == 69


def test_workers_stay_from_pass_to_pass_and_use_one_thread():
    decoder = streaming.Decoder(whoami, (1, 1, 2), workers=2)
    streamed = StreamedSet([str(i) for i in range(80)], torch.zeros(80).long(), decoder)

    def seen():
        return {tuple(image.flatten().tolist()) for image in streamed.images}

    first = seen()
    assert len(first) == 2 and {threads for _, threads in first} == {1}
    assert seen() == first


def test_two_passes_at_once_and_one_that_is_left_early():
    numbers = numbered(number, 1)
    assert len(list(islice(data.batches(numbers, 8), 2))) == 2
    assert len(list(data.batches(numbers, 8))) == 13  # leaves a worker behind
    pair = zip(data.batches(numbers, 8), data.batches(numbers, 8, generator=seeded()), strict=True)
    for both in pair:
        for images, labels in both:
            assert torch.equal(images.flatten(), data.to_float(labels.to(torch.uint8)))


def whoami(path):
    assert get_worker_info() is not None
    return np.array([[[os.getpid() % 251, torch.get_num_threads()]]], dtype=np.uint8)


def number(path):
    return np.full((1, 1, 1), int(path), dtype=np.uint8)


def dies_at_70(path):
    if int(path) == 70:
        os.kill(os.getpid(), signal.SIGKILL)
    return number(path)


def stops_at_20(path):
    if int(path) == 20:
        time.sleep(600)
    return number(path)


def numbered(read, workers):
    decoder = streaming.Decoder(read, (1, 1, 1), workers)
    return StreamedSet([str(i) for i in range(100)], torch.arange(100), decoder)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_is_an_error_with_the_file(workers):
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="decodes images died at 70: "):
        list(data.batches(numbered(dies_at_70, workers), 16))
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error():
    streamed = numbered(stops_at_20, 1)
    others = torch.multiprocessing.active_children()

    def kill():
        while not (own := set(torch.multiprocessing.active_children()) - set(others)):
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(own.pop().pid, signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="died at 20: "):
        list(data.batches(streamed, 100))
    assert time.monotonic() - started < 20
    thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_named(tmp_path, workers):
    root = make_folder(tmp_path, train=40)
    bad = root / "train" / "b" / "4.jpg"
    bad.write_bytes(bad.read_bytes()[:60])
    streamed = load(root, stream="always", workers=workers).train
    with pytest.raises(ValueError, match=rf"^{bad} cannot be decoded .* delete or replace it$"):
        list(data.batches(streamed, 8, generator=seeded()))
    bad.unlink()
    with pytest.raises(ValueError, match=rf"^{bad} cannot be decoded .*FileNotFound"):
        list(data.batches(streamed, 8, generator=seeded()))
    whole = load(root, stream="always", workers=workers).train
    assert len(list(data.batches(whole, 13))) == 3


def test_a_picture_beyond_pillows_limit_is_named(folder, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 140)
    with pytest.raises(ValueError, match=r"cannot be decoded \(DecompressionBomb"):
        _ = load(folder, stream="always", workers=0).train.images


def test_auto_streams_what_is_larger_than_the_limit(folder, monkeypatch):
    size = (COUNT + 20 + 9) * 3 * 8 * 8  # of all splits
    monkeypatch.setattr(streaming, "STREAM_ABOVE", size)
    assert isinstance(load(folder).train, ImageSet)
    monkeypatch.setattr(streaming, "STREAM_ABOVE", size - 1)
    splits = load(folder)
    assert all(isinstance(s, StreamedSet) for s in (splits.train, splits.validation, splits.test))
    assert isinstance(load(folder, stream="never").train, ImageSet)


def test_workers_by_default(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert streaming.default_workers() == 15
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # what torchrun sets
    assert streaming.default_workers() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert streaming.default_workers() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": "yes"}, "stream must be one of auto, always, never, got 'yes'"),
        ({"stream": "always", "workers": -1}, "workers must not be negative, got -1"),
    ],
)
def test_load_refuses(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load(folder, **options)
    with pytest.raises(ValueError, match="stream must be auto or never for digits"):
        data.load("digits", stream="always")


def test_gtsrb(tmp_path):
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    random = np.random.default_rng(0)
    for label in (0, 1):
        place = tmp_path / "Final_Training" / "Images" / f"{label:05d}"
        names = [f"{track:05d}_{frame:05d}.ppm" for track in range(4) for frame in range(3)]
        for name in names:
            save(place / name, random.integers(0, 256, (30, 29, 3), dtype=np.uint8))
        rows = "".join(f"{name};29;30;5;6;24;25;{label}\n" for name in names)
        (place / f"GT-{label:05d}.csv").write_text(header + rows)
    save(tmp_path / "Final_Test" / "Images" / "00000.ppm", np.zeros((40, 41, 3), dtype=np.uint8))
    (tmp_path / "GT-final_test.csv").write_text(header + "00000.ppm;41;40;5;5;36;35;1\n")
    there, here = (
        data.load("gtsrb", data_root=tmp_path, validation_fraction=0.25, stream=s, workers=0)
        for s in ("never", "always")
    )
    for name in ("train", "validation", "test"):
        assert_same_batches(
            data.batches(getattr(here, name), 5), data.batches(getattr(there, name), 5)
        )


def test_predict_takes_a_set(folder, held):
    model = torch.nn.Flatten().eval()
    wanted = predict(model, held.test.images)
    streamed = load(folder, stream="always", workers=1).test
    for images in (held.test, streamed):
        assert torch.equal(predict(model, images, batch_size=4), wanted)
    with pytest.raises(ValueError, match=r"N of at least 1, got \[0, 3, 8, 8\]"):
        predict(model, streamed.subset(slice(0)))


@pytest.mark.slow
def test_a_training_that_streams_is_the_one_in_memory(folder, tmp_path, monkeypatch):
    """Another run, interrupted in the middle of an epoch, changes over to streaming."""
    options = dict(
        dataset="folder", data_root=str(folder), image_size=8, model="lenet", epochs=3,
        batch_size=16, threads=1, pad=1, flip=True,
    )  # fmt: skip
    lines, steps, loss = [], [], objective.Objective.loss_on_images

    def failing(self, *args):
        steps.append(1)
        if len(steps) == 8:  # of 5 per epoch
            raise KeyboardInterrupt
        return loss(self, *args)

    train(TrainConfig(**options), tmp_path / "memory", log=lines.append)
    assert not any("decoded" in line for line in lines)
    monkeypatch.setattr(streaming, "STREAM_ABOVE", 15_000)  # of 19,008
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(objective.Objective, "loss_on_images", failing)
        train(TrainConfig(**options, stream="never"), tmp_path / "streamed", log=lines.append)
    del lines[:]
    train(TrainConfig(**options, workers=1), tmp_path / "streamed", log=lines.append)
    assert lines[0].endswith("decoded on demand; worker processes: 1")
    there, here = (load_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("memory", "streamed"))
    for name, value in there["model"].items():
        assert torch.equal(here["model"][name], value), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streamed_batches_on_a_gpu_do_not_wait_for_it(folder, held):
    on_gpu = load(folder, stream="always", workers=1).train.to(torch.device("cuda"))
    options = dict(augment=SHIFT, shard=(1, 2))
    wanted = list(data.batches(held.train, 16, generator=seeded(), **options))
    list(data.batches(on_gpu, 16, generator=seeded(), **options))  # starts the workers
    with no_waiting():
        got = list(data.batches(on_gpu, 16, generator=seeded(), **options))
    assert_same_batches([(x.cpu(), y.cpu()) for x, y in got], wanted)
