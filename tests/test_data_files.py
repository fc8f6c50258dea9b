"""Readers of data set files, on small files that the tests write in the original formats."""

import gzip
import importlib.util
import pickle
import struct
import warnings

import numpy as np
import pytest

from divqat import data
from divqat.data import formats

needs_scipy = pytest.mark.skipif(
    importlib.util.find_spec("scipy") is None, reason="needs scipy (scikit-learn brings it)"
)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + bytes(array)
    )


class TestIdx:
    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_round_trip(self, tmp_path, suffix):
        array, path = pixels(5, 4, 3), tmp_path / f"images-idx3-ubyte{suffix}"
        path.write_bytes(gzip.compress(idx(array)) if suffix else idx(array))
        assert np.array_equal(formats.read_idx(path), array)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "not an idx file of bytes"),
            (b"\x00\x00\x0d\x01" + bytes(8), "not an idx file of bytes"),  # floats
            (b"\x89PNG and so on", "not an idx file of bytes"),
            (b"\x00\x00\x08\x03\x00", "ends within its header"),
            (idx(pixels(5, 4))[:-1], r"promises \[5, 4\] bytes, 19 follow"),
            (idx(pixels(5, 4)) + b"x", r"promises \[5, 4\] bytes, 21 follow"),
            (b"\x00\x00\x08\x01\xff\xff\xff\xff", "promises"),
        ],
    )
    def test_damaged(self, tmp_path, content, message):
        path = tmp_path / "damaged"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} .*{message}"):
            formats.read_idx(path)

    @pytest.mark.parametrize("cut", [5, 30, -4])
    def test_truncated_gzip(self, tmp_path, cut):
        path = tmp_path / "truncated.gz"
        path.write_bytes(gzip.compress(idx(pixels(50, 4)))[:cut])
        with pytest.raises(ValueError, match=f"{path} is not a whole gzip file"):
            formats.read_idx(path)

    def test_no_gzip(self, tmp_path):
        path = tmp_path / "plain.gz"
        path.write_bytes(idx(pixels(5)))
        with pytest.raises(ValueError, match=f"{path} is not a whole gzip file"):
            formats.read_idx(path)

    @pytest.mark.parametrize("folder", ["", "fashion-mnist", "FashionMNIST/raw"])
    def test_load(self, tmp_path, folder):
        root = tmp_path / folder
        root.mkdir(parents=True, exist_ok=True)
        labels = np.arange(40, dtype=np.uint8) % 10
        for stem in ("train", "t10k"):
            (root / f"{stem}-images-idx3-ubyte.gz").write_bytes(
                gzip.compress(idx(pixels(40, 28, 28)))
            )
            (root / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))
        splits = data.load("fashion-mnist", data_root=tmp_path, validation_fraction=0.25)
        assert [len(splits.train), len(splits.validation), len(splits.test)] == [30, 10, 40]
        assert np.array_equal(splits.test.images[:, 0], pixels(40, 28, 28))
        assert np.array_equal(splits.test.labels, labels)

    def test_pair_must_fit(self, tmp_path):
        for name, array in (("images", pixels(5, 2, 2)), ("four", pixels(4)), ("flat", pixels(5))):
            (tmp_path / name).write_bytes(idx(array))
        with pytest.raises(ValueError, match=r"four must hold 5 labels, .* got \[4\]"):
            formats.read_idx_pair(tmp_path / "images", tmp_path / "four")
        with pytest.raises(ValueError, match=r"flat must hold \[N, H, W\] images, got \[5\]"):
            formats.read_idx_pair(tmp_path / "flat", tmp_path / "flat")


def python2_pickle(content):
    """Protocol 2 as Python 2 and numpy 1 write it; so are the files of the original site."""

    def dump(value):
        if isinstance(value, bytes):
            return b"T" + struct.pack("<i", len(value)) + value  # BINSTRING, str of Python 2
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(dump, value)) + b"e"
        assert value.dtype == np.uint8
        array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + dump(-1) * 2 + b"K\x00tb"
        shape = b"(" + b"".join(map(dump, value.shape)) + b"t"
        return array + b"(K\x01" + shape + dtype + b"\x89" + dump(value.tobytes()) + b"tb"

    items = b"".join(dump(key) + dump(value) for key, value in content.items())
    return b"\x80\x02}(" + items + b"u."


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


CIFAR = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch"),
    "cifar100": ("cifar-100-python", ["train"], "test"),
}
DUMPS = {
    "python 2": python2_pickle,
    "protocol 2": lambda content: pickle.dumps(content, 2),
    "protocol 4": lambda content: pickle.dumps(content, 4),
}


class TestCifar:
    def write(self, root, name, dumps=python2_pickle):
        """Four images per batch; returns all train pixels and the test pixels."""
        folder, train, test = CIFAR[name]
        (root / folder).mkdir(parents=True)
        classes = 10 if name == "cifar10" else 100
        key = b"labels" if name == "cifar10" else b"fine_labels"
        for i, batch in enumerate([*train, test]):
            labels = [i, 3, 9, classes - 1]
            content = {b"batch_label": b"x", b"data": pixels(4, 3072, seed=i), key: labels}
            (root / folder / batch).write_bytes(dumps(content))
        meta = {"cifar10": "batches.meta", "cifar100": "meta"}[name]
        names = [f"class{i}".encode() for i in range(classes)]
        key = b"label_names" if name == "cifar10" else b"fine_label_names"
        (root / folder / meta).write_bytes(dumps({key: names}))
        return np.concatenate([pixels(4, 3072, seed=i) for i in range(len(train))])

    @pytest.mark.parametrize("name", CIFAR)
    @pytest.mark.parametrize("dumps", DUMPS.values(), ids=DUMPS)
    def test_python_version(self, tmp_path, name, dumps):
        train = self.write(tmp_path / name, name, dumps)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy warns about what numpy 1 wrote
            splits = data.load(name, data_root=tmp_path, validation_fraction=0)
        assert np.array_equal(splits.train.images.flatten(1), train)
        assert splits.train.labels[:4].tolist() == [0, 3, 9, splits.num_classes - 1]
        assert splits.classes[3] == "class3" and len(splits.test) == 4
        assert (splits.channels, splits.image_size) == (3, (32, 32))

    @pytest.mark.parametrize(("name", "label_bytes"), [("cifar10", 1), ("cifar100", 2)])
    def test_binary_version(self, tmp_path, name, label_bytes):
        root = tmp_path / {1: "cifar-10-batches-bin", 2: "cifar-100-binary"}[label_bytes]
        root.mkdir()
        train = [f"data_batch_{i}" for i in range(1, 6)] if label_bytes == 1 else ["train"]
        for batch in [*train, "test_batch" if label_bytes == 1 else "test"]:
            labels = np.array([[1, 7], [0, 9]], dtype=np.uint8)[:, 2 - label_bytes :]
            records = np.concatenate([labels, pixels(2, 3072)], axis=1)
            (root / f"{batch}.bin").write_bytes(records.tobytes())
        meta = "batches.meta.txt" if label_bytes == 1 else "fine_label_names.txt"
        (root / meta).write_text("\n".join(f"class{i}" for i in range(10)) + "\n\n")
        splits = data.load(name, data_root=tmp_path, validation_fraction=0)
        assert np.array_equal(splits.test.images.flatten(1), pixels(2, 3072))
        assert splits.test.labels.tolist() == [7, 9] and splits.num_classes == 10
        assert len(splits.train) == 2 * len(train)

    def test_refuses_code(self, tmp_path):
        path = tmp_path / "data_batch_1"
        path.write_bytes(pickle.dumps({b"data": Evil()}, 2))
        with pytest.raises(ValueError, match=r"data_batch_1 .*(builtins|__builtin__)\.exec"):
            formats.read_cifar_pickles([path], b"labels")

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"no pickle",
            python2_pickle({b"data": pixels(4, 3072), b"labels": [1] * 4})[:-100],
            python2_pickle({b"data": pixels(4, 3072)}),
            python2_pickle({b"data": pixels(4, 3072), b"labels": [1] * 3}),
            python2_pickle({b"data": pixels(4, 3000), b"labels": [1] * 4}),
            python2_pickle({b"data": [1], b"labels": [1]}),
        ],
    )
    def test_damaged_pickle(self, tmp_path, content):
        path = tmp_path / "data_batch_1"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} is not a whole CIFAR batch"):
            formats.read_cifar_pickles([path], b"labels")

    @pytest.mark.parametrize("size", [0, 3072, 2 * 3073 - 1])
    def test_damaged_binary(self, tmp_path, size):
        path = tmp_path / "test_batch.bin"
        path.write_bytes(bytes(size))
        with pytest.raises(ValueError, match=f"{path} is truncated or not a CIFAR"):
            formats.read_cifar_binary([path], label_bytes=1)

    def test_incomplete_folder_names_the_file(self, tmp_path):
        self.write(tmp_path, "cifar10")
        (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
        with pytest.raises(FileNotFoundError, match="test_batch"):
            data.load("cifar10", data_root=tmp_path)


@needs_scipy
class TestSvhn:
    def test_load(self, tmp_path):
        from scipy.io import savemat

        array = pixels(32, 32, 3, 12)
        labels = np.array([[10], [1], [9]] * 4, dtype=np.uint8)
        for name in ("train_32x32.mat", "test_32x32.mat"):
            savemat(tmp_path / name, {"X": array, "y": labels})
        splits = data.load("svhn", data_root=tmp_path)
        assert splits.test.labels[:3].tolist() == [0, 1, 9]
        assert np.array_equal(splits.test.images[5], array[..., 5].transpose(2, 0, 1))

    def test_damaged(self, tmp_path):
        from scipy.io import savemat

        path = tmp_path / "train_32x32.mat"
        savemat(path, {"X": pixels(32, 32, 3, 4), "y": np.ones((4, 1))})
        whole = path.read_bytes()
        for content in (b"", b"no mat file", whole[:-3000]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=f"{path} is not a whole SVHN"):
                formats.read_svhn(path)
        savemat(path, {"X": pixels(32, 32, 3), "y": np.ones((4, 1))})
        with pytest.raises(ValueError, match=r"X must be uint8 \[32, 32, 3, N\]"):
            formats.read_svhn(path)
