"""Parts of a job in processes of their own."""

import multiprocessing
import os
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from divqat._util import progress
from divqat.experiments.side_by_side import side_by_side


def noted(folder, name):
    unfinished = folder / f".{name}"  # a process that is ended here leaves half a note
    unfinished.write_text(f"{os.getpid()} {torch.get_num_threads()} {progress._hidden}")
    unfinished.rename(folder / name)


def failing(folder, name):
    """The second raises while the first has much to do."""
    noted(folder, name)
    if name == "second":
        while not (folder / "first").exists():
            time.sleep(0.01)
        raise FloatingPointError("no number")
    time.sleep(600)


def dying(name):
    os._exit(9)


@pytest.mark.slow
def test_each_is_done_once_and_the_threads_are_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    side_by_side(noted, [(tmp_path, name) for name in "abcde"], 2)
    found = [(tmp_path / name).read_text().split() for name in "abcde"]
    processes = {pid for pid, _, _ in found}
    assert 1 <= len(processes) <= 2 and str(os.getpid()) not in processes
    assert {tuple(rest) for _, *rest in found} == {("3", "True")}
    assert not progress._hidden


@pytest.mark.slow
def test_the_first_error_ends_all(tmp_path):
    names = ("first", "second", "third", "fourth", "fifth", "last")  # a few begin ahead
    start = time.perf_counter()
    with pytest.raises(FloatingPointError, match="no number"):
        side_by_side(failing, [(tmp_path, name) for name in names], 2)
    assert time.perf_counter() - start < 300
    assert not (tmp_path / "last").exists()
    assert not multiprocessing.active_children()
    for file in tmp_path.glob("[!.]*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text().split()[0]), 0)


@pytest.mark.slow
def test_a_killed_process_is_told():
    with pytest.raises(BrokenProcessPool):
        side_by_side(dying, [("a",), ("b",)], 2)
