"""Files are whole or absent, also where a process is killed, a disk is full or a folder goes."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from divqat._util import files, temporaries
from divqat._util.figures import save_plot
from divqat._util.files import (
    WriteError,
    read_json,
    save_checkpoint,
    write_atomic,
    write_json,
    write_text,
)
from divqat._util.held import FolderLost, held

STATE = {"weights": torch.arange(20_000.0), "epoch": 3}
WRITERS = {
    "text.md": lambda path: write_text(path, "word " * 20_000),
    "numbers.json": lambda path: write_json(path, {"numbers": list(range(20_000))}),
    "state.pt": lambda path: save_checkpoint(path, STATE),
    "plot.png": lambda path: save_plot(path, (3, 2), lambda figure: figure.subplots()),
}


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def kill_while_writing(folder):
    """A process that dies in the middle of a file; the name of what it leaves."""

    def half(file):
        file.write_text("{")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        write_atomic(folder / "summary.json", half)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (name,) = left(folder)
    return name


def test_what_a_killed_writer_leaves_is_found_by_no_pattern_and_removed(tmp_path):
    name = kill_while_writing(tmp_path)
    assert name.startswith(".divqat-") and name.endswith(".tmp")
    assert not list(tmp_path.glob("**/*.json")) and not list(tmp_path.glob("*summary*"))
    write_text(tmp_path / "other.md", "done")
    assert left(tmp_path) == ["other.md"]


def test_what_works_in_a_folder_begins_by_removing_it(tmp_path):
    (tmp_path / "seed0").mkdir()
    kill_while_writing(tmp_path / "seed0")
    with held("out", tmp_path):
        assert left(tmp_path / "seed0") == []


def test_writers_that_live_or_are_elsewhere_are_left_alone(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        mine = temporaries.make_temporary(tmp_path).name
        head, host, _, life, tail = mine.rsplit("-", 4)
        foreign = "-".join([head, "0123abcd", "1", life, tail])  # of another machine
        living = "-".join([head, host, str(other.pid), "0123abcd", tail])
        reborn = "-".join([head, host, str(os.getpid()), "0123abcd", tail])  # our number, long ago
        kept = {mine, foreign, living, ".divqat-notes.tmp", ".checkpoint-abc.pt"}
        for name in {*kept, reborn}:
            (tmp_path / name).touch()
        write_text(tmp_path / "a.md", "done")
        assert set(left(tmp_path)) == {*kept, "a.md"}
        other.communicate()
    write_text(tmp_path / "a.md", "done")
    assert set(left(tmp_path)) == {*kept, "a.md"} - {living}


@contextmanager
def files_of_at_most(size):
    """As a full disk: no file grows beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("painted")
@pytest.mark.parametrize("size", [0, 1000])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_told_and_harms_nothing(tmp_path, name, size):
    path = tmp_path / name
    path.write_bytes(b"old")
    with files_of_at_most(size), pytest.raises(WriteError) as caught:
        WRITERS[name](path)
    assert str(caught.value).startswith(f"could not write {path}: File too large; ")
    assert "repeat the command to resume" in str(caught.value)
    assert left(tmp_path) == [name] and path.read_bytes() == b"old"
    WRITERS[name](path)
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_last_is_told_too(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(WriteError, match="No space left on device"):
        patch.setattr(files.os, call, full)
        write_text(tmp_path / "a.md", "new")
    assert not left(tmp_path)


def test_other_errors_pass_and_leave_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_atomic(tmp_path / "a.md", lambda file: file.write_text("half") / 0 and 1 / 0)
    assert not left(tmp_path)


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(WriteError, match=r"could not write .*b\.md: File exists"):
        write_text(tmp_path / "a" / "b.md", "")
    wanted = pytest.raises(NotADirectoryError, match="out: wanted a folder, got the file")
    with wanted, held("out", tmp_path / "a"):
        pass


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


GONE = {
    "deleted": shutil.rmtree,
    "made anew": empty,
    "moved": lambda folder: folder.rename(folder.with_name("elsewhere")),
}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("how", GONE)
def test_a_folder_that_goes_while_it_is_worked_in_is_an_error(tmp_path, how, there):
    out = tmp_path / "out"
    write = partial(write_text, out / "deep" / "a.md", "text")
    if there:
        out.mkdir()
    lost = pytest.raises(FolderLost, match=f"{out} was deleted, moved or replaced")
    with lost, held("out", out):
        write()
        GONE[how](out)
        with pytest.raises(FolderLost):
            write()
        assert not (out / "deep").exists()
    write()  # held no more


def test_a_folder_that_stays_is_no_error_and_is_made_when_it_is_needed(tmp_path):
    with held("out", tmp_path / "a") as folder:
        assert not folder.exists()
        write_text(folder / "b" / "c.md", "text")
        shutil.rmtree(folder / "b")  # one's own parts may go
        write_text(folder / "b" / "c.md", "text")
    with pytest.raises(ZeroDivisionError), held("out", folder):
        shutil.rmtree(folder)
        raise ZeroDivisionError  # tells more


def test_what_is_no_json_object_names_the_file_and_the_line(tmp_path):
    path = tmp_path / "a.json"
    for data, message in (
        (b'{\n "a": 1,\n "b" 2\n}', "a.json, line 3: not JSON: "),
        (b'{\n "a": "\xff"\n}', "a.json, line 2: not UTF-8: "),
        (b"[" * 100_000, "a.json: .*recursion"),
        (b'{"a": NaN}', "a.json: NaN is not JSON"),
        (b"[1]", "a.json: wanted an object, got list"),
        (b"", "a.json, line 1: not JSON"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{message}.*delete it and repeat the command"):
            read_json(path)
    path.write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"a\.json: the key 'accuracy' is missing; .*delete it"):
        read_json(path)["accuracy"]


@pytest.mark.usefixtures("painted")
def test_a_plot_has_few_colors_and_is_small(tmp_path):
    image = pytest.importorskip("PIL.Image")

    def draw(figure):
        axes = figure.subplots()
        for i in range(7):
            axes.plot([0, 1, 2], [i, i * i, 3], "o-")

    with image.open(save_plot(tmp_path / "plot.png", (4, 3), draw)) as plot:
        assert plot.mode == "P" and plot.size == (600, 450)
        shown = plot.convert("RGB")
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert len(shown.getcolors(1000)) <= 128
    assert save_plot(tmp_path / "plot.svg", (4, 3), draw).read_text().startswith("<?xml")
