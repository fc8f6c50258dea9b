"""Data sets that somebody else made: SECURITY.md, held to its word."""

import importlib.util
import io
import os
import pickle
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data_files import needs_scipy, pixels, python2_pickle

from divqat import data
from divqat.data import formats, pictures
from divqat.data.plain_pickle import load_plain_pickle

has_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
MIB = 2**20

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False)
    | st.text() | st.binary(max_size=300),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(
        st.text() | st.binary(), inner),
    max_leaves=20,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 3, 4])
@settings(deadline=None, max_examples=60)
@given(value=plain)
@example(value=[b"x" * 300, "y" * 300, (1,) * 5, {}, (), [0] * 2000])
def test_plain_pickles_are_read_as_the_unpickler_reads_them(protocol, value):
    assert load_plain_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("kind", ["u1", "<i2", "<i4", "<i8", "<u8"])
def test_arrays_are_read_as_the_unpickler_reads_them(protocol, kind):
    for array in (np.arange(12).reshape(3, 4), np.arange(12).reshape(3, 4).T, np.zeros((0, 4))):
        array = array.astype(kind)
        read = load_plain_pickle(pickle.dumps({"x": array}, protocol))["x"]
        assert read.dtype == array.dtype and np.array_equal(read, array)


def reduced(name, *arguments):
    """A pickle that calls ``name``, in protocol 4."""
    module, _, name = name.rpartition(".")
    parts = [pickle.dumps(argument, 4)[2:-1] for argument in arguments]
    parts = [part[9:] if part[:1] == b"\x95" else part for part in parts]  # without a frame
    called = f"c{module}\n{name}\n".encode()
    return b"\x80\x04" + called + b"(" + b"".join(parts) + b"tR."


NDARRAY, KIND = b"cnumpy\nndarray\n", b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1tR"
EMPTY = b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n(" + NDARRAY + b"K\x00\x85C\x01btR"


def built(shape=b"K\x04\x85", kind=KIND, raw=b"C\x04abcd", order=b"\x89"):
    return EMPTY + b"(K\x01" + shape + kind + order + raw + b"tb."


def test_what_is_built_here_is_an_array_where_nothing_is_wrong():
    assert bytes(load_plain_pickle(built())) == b"abcd"
    assert load_plain_pickle(reduced("_codecs.encode", "é", "latin1")) == b"\xe9"


@pytest.mark.parametrize(
    "content",
    [
        # the array that the issue is about: its own buffer, shape, strides and offset
        reduced("numpy.ndarray", (2**40,), "u1", b"abcd", 0, (2**20,)),
        reduced("numpy.ndarray", (4,)),
        b"\x80\x04" + NDARRAY + b"(K\x04\x85C\x02u1C\x04abcdtR.",
        b"\x80\x04" + NDARRAY + b")\x81.",  # NEWOBJ
        b"\x80\x04(K\x04inumpy\nndarray\n.",  # INST
        b"\x80\x04(" + NDARRAY + b"K\x04o.",  # OBJ
        b"\x80\x04" + NDARRAY + b"(K\x04\x85tb.",  # BUILD of a name
        b"\x80\x04" + NDARRAY + b"}b.",
        # arrays of something else, or of another size than their data
        EMPTY.replace(b"ndarray", b"matrix") + b".",
        EMPTY.replace(b"ndarray", b"dtype") + b".",
        EMPTY.replace(b"K\x00\x85", b"K\x09\x85") + b".",
        EMPTY.replace(b"C\x01b", b"C\x01O") + b".",
        built(shape=b"K\x05\x85"),
        built(shape=b"\x8a\x08\0\0\0\0\0\0\0\x40\x85"),
        built(kind=KIND.replace(b"u1", b"|O")),
        built(kind=KIND.replace(b"\x02\x00\x00\x00u1", b"\x01\x00\x00\x00O")),
        built(kind=KIND.replace(b"\x02\x00\x00\x00u1", b"\x05\x00\x00\x00u1,O8")),
        built(kind=b"X\x02\x00\x00\x00u1"),
        built(raw=b"](" + b"K\x01" * 4 + b"e"),
        built(raw=NDARRAY),
        # other functions, and the allowed ones with other arguments
        reduced("builtins.eval", "1"),
        reduced("numpy.frombuffer", b"abcd", "u1"),
        reduced("numpy.core.multiarray.frombuffer", b"abcd", "u1"),
        reduced("numpy.core.multiarray._reconstruct", int, (0,), b"b"),
        reduced("numpy.dtype", "O"),
        reduced("numpy.dtype", "u1,O8"),
        reduced("numpy.dtype", [("a", "O")]),
        reduced("_codecs.encode", "x", "bz2"),
        reduced("_codecs.encode", "x"),
        reduced("__builtin__.bytes", 2**40),
        reduced("_codecs.lookup", "x"),
        b"\x80\x04\x8c\x05numpy\x8c\x07fromfile\x93.",  # STACK_GLOBAL
        # operations that files of data have no use for
        b"\x80\x04\x82\x01.",  # EXT1
        b"\x80\x04Px\n.",  # PERSID
        b"\x80\x05\x97.",  # NEXT_BUFFER
        b"\x80\x04}K\x01K\x01s.",  # a number as a key, of which many can collide
        b"\x80\x04K\x01K\x01a.",  # APPEND to a number
        b"\x80\x04K\x01K\x02.",
        b"\x80\x04.",
    ],
)
def test_a_pickle_calls_nothing(tmp_path, content):
    with pytest.raises(Exception):  # noqa: B017 (a damaged one may raise anything; see below)
        load_plain_pickle(content)
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is not a whole CIFAR batch"):
        formats.read_cifar_pickles([path], b"labels")
    with pytest.raises(ValueError, match=f"{path} is not a whole CIFAR meta file"):
        formats.read_cifar_names(path, b"label_names")


def test_a_pickle_of_five_bytes_takes_no_gigabytes():
    """To note something under the number 2^31 - 1, the unpickler makes a list as long."""
    tracemalloc.start()
    assert load_plain_pickle(b"\x80\x04K\x07r\xff\xff\xff\x7f.") == 7
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


def test_labels_are_numbers(tmp_path):
    laughs = [1] * 9
    for _ in range(8):
        laughs = [laughs] * 9  # 43 million numbers
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": pixels(4, 3072), b"labels": laughs}, 2))
    with pytest.raises(ValueError, match="labels must be numbers"):
        formats.read_cifar_pickles([path], b"labels")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pickletools, about escapes in it
@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_damaged_pickle_is_an_error_or_an_array(seed):
    draw = np.random.default_rng(seed)
    whole = bytearray(pickle.dumps({b"data": pixels(2, 3072), b"labels": [1, 2]}, 2))
    for place in draw.integers(0, len(whole), 3):
        place = int(place) % 150 if draw.random() < 0.9 else int(place)  # all but the pixels
        whole[place] = draw.integers(256)
    try:
        read = load_plain_pickle(bytes(whole))
    except Exception:
        return
    assert type(read) in (dict, list, tuple, bytes, str, int, float, bool, np.ndarray, type(None))


@pytest.fixture
def small(monkeypatch):
    """A bound that a small file is above."""
    monkeypatch.setattr(formats, "MAX_IMAGES", MIB)
    if importlib.util.find_spec("scipy"):
        import scipy.io  # noqa: F401 (its own memory does not count)
    tracemalloc.start()
    yield
    assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    tracemalloc.stop()


def test_gz_that_unpacks_to_more(tmp_path, small):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    start = packed.compress(bytes([0, 0, 8, 3]) + struct.pack(">3i", 64 * 1024, 32, 32))
    rest = b"".join(packed.compress(bytes(MIB)) for _ in range(64)) + packed.flush()
    path.write_bytes(start + rest)
    assert path.stat().st_size < MIB / 8
    with pytest.raises(ValueError, match=f"{path}: wanted at most {MIB} bytes unpacked, got more"):
        formats.read_idx(path)


def test_files_that_are_larger(tmp_path, small):
    path = tmp_path / "x"
    with open(path, "wb") as file:
        file.truncate(2**40)  # it takes no room on the disk
    for read in (
        formats.read_idx,
        lambda path: formats.read_cifar_binary([path], 1),
        lambda path: formats.read_cifar_pickles([path], b"labels"),
        formats.read_cifar_names,
    ):
        with pytest.raises(ValueError, match=rf"{path}.*wanted at most \d+ bytes, got {2**40}"):
            read(path)


@needs_scipy
def test_mat_files_that_unpack_to_more(tmp_path, small):
    path = tmp_path / "train_32x32.mat"
    packed = zlib.compressobj(9)
    bomb = b"".join(packed.compress(bytes(MIB)) for _ in range(64)) + packed.flush()
    path.write_bytes(mat_header() + struct.pack("<II", 15, len(bomb)) + bomb)
    with pytest.raises(ValueError, match=rf"{path} .*at most {MIB} bytes unpacked, got more"):
        formats.read_svhn(path)


def mat_header():
    from scipy.io import savemat

    file = io.BytesIO()
    savemat(file, {})
    return file.getvalue()[:128]


@needs_scipy
@pytest.mark.parametrize("name", ["X", "y"])
def test_mat_files_whose_header_promises_more(tmp_path, small, name):
    """A cell of 2^27 parts is allocated before the first of them is looked for."""

    def element(kind, content):
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)

    flags = element(6, struct.pack("<II", 1, 0))  # mxCELL_CLASS
    cell = element(14, flags + element(5, struct.pack("<ii", 2**27, 1)) + element(1, name.encode()))
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(mat_header() + cell)
    with pytest.raises(ValueError, match=rf"{name} must be .* got cell \[134217728, 1\]"):
        formats.read_svhn(path)


@has_pipes
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fashion-mnist", "train-images-idx3-ubyte.gz"),
        ("cifar10", "data_batch_1"),
        ("cifar10", "data_batch_1.bin"),
        ("cifar100", "meta"),
        ("cifar100", "fine_label_names.txt"),
        ("svhn", "train_32x32.mat"),
    ],
)
def test_a_pipe_is_no_data_set(tmp_path, name, file):
    os.mkfifo(tmp_path / file)
    for other in ("train", "train.bin", "test", "test.bin", "test_32x32.mat"):
        if not (tmp_path / other).exists():
            os.mkfifo(tmp_path / other)
    with pytest.raises(ValueError, match="wanted a file, got a pipe"):
        data.load(name, data_root=tmp_path)


pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs Pillow")


def save(path, array):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, "PNG")
    return path


def picture_folder(root):
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        for number in range(4):
            save(root / name / f"{number}.png", pixels(8, 8))
    return root


@pillow
@has_pipes
@pytest.mark.parametrize("stream", ["never", "always"])
def test_pictures_are_files_and_stay_in_their_folder(tmp_path, stream):
    root = picture_folder(tmp_path / "data")
    outside = save(tmp_path / "outside" / "x.png", pixels(8, 8))

    def load():
        return data.load("folder", data_root=root, stream=stream, workers=0, image_size=8)

    def wrong(path, make, message):
        make(path)
        with pytest.raises(ValueError, match=message):
            load()
        path.unlink()

    for place in (root / "train" / "cat" / "5.png", root / "test" / "dog" / "5.png"):
        wrong(place, os.mkfifo, r"5\.png: wanted a file, got a pipe")
        wrong(place, lambda path: path.symlink_to(outside), r"5\.png is a link that leads out of")
        wrong(place, lambda path: path.symlink_to("/dev/zero"), "leads out of .*, to /dev/zero")
    for folder in ("val", "train/cow"):
        wrong(root / folder, lambda path: path.symlink_to(outside.parent), "leads out of")
    (root / "train" / "cat" / "5.png").symlink_to("../dog/1.png")  # inside
    assert len(load().train) + len(load().validation) == 9
    for name in ("folder", "photos"):
        (root / "6.png").symlink_to(outside)
        with pytest.raises(ValueError, match=r"6\.png is a link that leads out of"):
            data.transfer_set(name, channels=1, image_size=8, data_root=root)
        (root / "6.png").unlink()


@pillow
def test_tables_of_signs_name_files_beside_them(tmp_path):
    root = tmp_path / "GTSRB"
    train = root / "Final_Training" / "Images" / "00000"
    for path in (train / "0_0.ppm", root / "Final_Test" / "Images" / "0.ppm"):
        save(path, pixels(8, 8, 3))
    save(tmp_path / "x.ppm", pixels(8, 8, 3))
    header = "Filename;ClassId\n"
    (root / "GT-final_test.csv").write_text(header + "0.ppm;1\n")
    table = train / "GT-00000.csv"
    for row in ("../../../../x.ppm;1", f"{tmp_path}/x.ppm;1", "0_0.ppm;43", "0_0.ppm;-1",
                f"0_0.ppm;{2**70}", f"{'x' * 200_000};1"):  # fmt: skip
        table.write_text(f"{header}{row}\n")
        with pytest.raises(ValueError, match=rf"{table}"):
            data.load("gtsrb", data_root=tmp_path)
    table.write_text(header + "0_0.ppm;1\n")
    (train / "1_0.ppm").symlink_to(tmp_path / "x.ppm")
    with pytest.raises(ValueError, match=r"1_0\.ppm is a link that leads out of"):
        data.load("gtsrb", data_root=tmp_path)


def png(width, height):
    """A PNG of nothing, which takes 100,000 times less than its pixels."""
    packed = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    content = b"".join(packed.compress(row) for _ in range(height)) + packed.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", content), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in parts
    )


@pillow
def test_pictures_that_unpack_to_more(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64 * 64)
    good, large = save(tmp_path / "a.png", pixels(64, 64)), tmp_path / "b.png"
    large.write_bytes(png(64, 65))
    with pytest.warns(UserWarning, match=r"left out 1 of 2 .*b\.png"):
        assert pictures.decode([good, large], (8, 8), 1, "crop")[1] == [0]
    with pytest.raises(ValueError, match=r"wanted at most 4096 pixels, got \[64, 65\]"):
        pictures._open_alone(str(large), size=(8, 8), channels=1, fit="crop")
    with pytest.raises(ValueError, match=r"b\.png cannot be decoded .*at most 4096 pixels"):
        data.transfer_set("photos", channels=1, image_size=8, data_root=tmp_path)


@pillow
def test_a_bomb_of_today_is_refused(tmp_path):
    large = tmp_path / "b.png"
    large.write_bytes(png(8192, 8193))
    assert large.stat().st_size < MIB
    with pytest.raises(ValueError, match="none of 1 picture files is readable"):
        pictures.decode([large], (8, 8), 1, "crop")


@pillow
@has_pipes
def test_no_picture_is_a_program(tmp_path, monkeypatch):
    """Pillow tells formats by what is in a file, and gives EPS to Ghostscript."""
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch '{tmp_path}/it-ran'\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=os.pathsep)
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # found anew
    script = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("a.png", "b.jpg", "c.tif"):
        (tmp_path / name).write_text(script)
    paths = pictures.list_pictures(tmp_path)
    assert pictures.is_grey(paths)  # none can be opened
    with pytest.raises(ValueError, match="none of 3 picture files is readable"):
        pictures.decode(paths, (8, 8), 1, "crop")
    with pytest.raises(ValueError, match="cannot be decoded"):
        data.transfer_set("photos", channels=1, image_size=8, data_root=tmp_path)
    assert not Path(tmp_path / "it-ran").exists()


def test_what_the_originals_hold_is_read(tmp_path):
    """The files of the original site have more in them than is used."""
    path = tmp_path / "data_batch_1"
    content = {b"batch_label": b"training batch 1 of 5", b"labels": [3] * 4,
               b"data": pixels(4, 3072), b"filenames": [b"a.png"] * 4}  # fmt: skip
    path.write_bytes(python2_pickle(content))
    read = formats.read_cifar_pickles([path], b"labels")
    assert np.array_equal(read.images.flatten(1), pixels(4, 3072))
