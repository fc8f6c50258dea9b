"""Tasks in other processes."""

import multiprocessing
import os
import time
from concurrent.futures import BrokenExecutor

import pytest
import torch

from divqat._util import progress
from divqat.experiments.workers import Task, process_executor, run_tasks

pytestmark = pytest.mark.slow


def note(folder, name):
    """Write the id of this process and its settings to a file."""
    unfinished = folder / f".{name}"  # a process that is killed here leaves a partial file
    unfinished.write_text(f"{os.getpid()} {torch.get_num_threads()} {progress._hidden}")
    unfinished.rename(folder / name)


def note_after(folder, name, *others):
    assert all((folder / other).exists() for other in others)
    note(folder, name)


def fail(folder, name):
    """The second task raises while the first is busy."""
    note(folder, name)
    if name == "second":
        while not (folder / "first").exists():
            time.sleep(0.01)
        raise FloatingPointError("no number")
    time.sleep(600)


def die(folder, name, times):
    """Kill the process, as the out-of-memory killer would, in the first ``times`` calls."""
    with open(folder / f"{name} tried", "a") as file:
        print(os.getpid(), file=file)
    if len((folder / f"{name} tried").read_text().split()) <= times:
        os.kill(os.getpid(), 9)
    note(folder, name)


def run(tasks, count, log=print):
    with process_executor(count) as executor:
        run_tasks(tasks, executor, log)


def test_each_task_runs_once_and_processes_share_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    run([Task(name, note, (tmp_path, name)) for name in "abcde"], 2)
    found = [(tmp_path / name).read_text().split() for name in "abcde"]
    pids = {pid for pid, _, _ in found}
    assert 1 <= len(pids) <= 2 and str(os.getpid()) not in pids
    assert {tuple(rest) for _, *rest in found} == {("3", "True")}
    assert not progress._hidden and not multiprocessing.active_children()


def test_a_task_waits_for_those_that_it_reads(tmp_path):
    after = {"d": "bc", "c": "a", "b": "a", "a": ""}  # not in order of dependencies
    run([Task(n, note_after, (tmp_path, n, *o), tuple(o)) for n, o in after.items()], 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == list("abcd")


def test_without_a_terminal_the_log_says_how_far_it_is(tmp_path, monkeypatch):
    for shown, wanted in ((False, ["1 of 3 tasks", "2 of 3 tasks"]), (True, [])):
        monkeypatch.setattr(progress, "is_shown", lambda shown=shown: shown)
        lines = []
        run([Task(name, note, (tmp_path, name)) for name in "abc"], 1, lines.append)
        assert [line.partition(",")[0] for line in lines] == wanted
        assert all(line.endswith(" left") for line in lines)


def test_the_first_error_ends_all_processes(tmp_path):
    names = ("first", "second", "third", "last")
    start = time.perf_counter()
    with pytest.raises(FloatingPointError, match="no number"):
        run([Task(name, fail, (tmp_path, name)) for name in names], 2)
    assert time.perf_counter() - start < 300
    assert not (tmp_path / "last").exists()
    assert not multiprocessing.active_children()
    for file in tmp_path.glob("[!.]*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text().split()[0]), 0)


def test_a_process_that_dies_affects_only_its_own_task(tmp_path):
    lines = []
    tasks = [Task("dying", die, (tmp_path, "dying", 2)), Task("other", die, (tmp_path, "other", 0))]
    run(tasks, 2, lines.append)
    lines = [line for line in lines if " tasks, about " not in line]
    assert lines == ["dying: its process died, running it again"] * 2
    tried = {name: (tmp_path / f"{name} tried").read_text().split() for name in ("dying", "other")}
    assert len(set(tried["dying"])) == 3 and len(tried["other"]) == 1
    assert (tmp_path / "dying").exists() and (tmp_path / "other").exists()


def test_a_task_whose_process_always_dies_is_given_up(tmp_path):
    with pytest.raises(BrokenExecutor):
        run([Task("dying", die, (tmp_path, "dying", 9))], 2, lambda line: None)
    assert len((tmp_path / "dying tried").read_text().split()) == 3
