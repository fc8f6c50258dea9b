"""Units of work in other processes, of this machine or of a cluster.

A unit is a call that leaves its results in files and can be made again. What runs units is a
:class:`concurrent.futures.Executor`: :func:`processes` of this machine, or :func:`cluster`.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from divqat._util import progress, streams
from divqat._util.errors import require
from divqat._util.foreign import trust, trusted

# What the server of processes imports, if it is installed: units need it, and it takes seconds.
IMPORTED = [
    "divqat.experiments.units",
    "matplotlib.figure",
    "onnxscript",
    "onnxruntime",
    "sklearn.datasets",
]
ATTEMPTS = 3  # at a unit whose process dies each time
_alone = threading.Lock()  # the number of threads and the random state belong to a whole process


@dataclass(frozen=True)
class Unit:
    """A part of a job.

    Attributes:
        name: unique; for people.
        call, arguments: what it does: a function of a module, and arguments that can be pickled.
        after: names of the units whose results it reads.
    """

    name: str
    call: Callable[..., object]
    arguments: tuple[Any, ...]
    after: tuple[str, ...] = ()


def run_units(units: Sequence[Unit], executor: Executor, log: Callable[[str], object]) -> None:
    """Run units, each as soon as those that it comes after are done.

    A unit whose process dies is run again. The first error ends this: no other unit is submitted.

    Args:
        units: what is to be done.
        executor: runs them. Where a process dies, the future of its unit alone raises
            BrokenExecutor, or the executor runs the unit again by itself.
        log: takes a line when a unit is run again.

    Raises:
        BrokenExecutor: a unit's process died three times.
        Others: as the units.
    """
    for _ in progress.progress(_finished(units, executor, log), "units", total=len(units)):
        pass


def _finished(
    units: Sequence[Unit], executor: Executor, log: Callable[[str], object]
) -> Iterator[str]:
    """The names of units as they are finished."""
    waiting, done, deaths = list(units), set[str](), Counter[str]()
    running: dict[Future[None], Unit] = {}
    while waiting or running:
        for unit in [unit for unit in waiting if done.issuperset(unit.after)]:
            waiting.remove(unit)
            running[executor.submit(_run, unit, trusted())] = unit
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            unit = running.pop(future)
            try:
                future.result()
            except BrokenExecutor:
                deaths[unit.name] += 1
                if deaths[unit.name] == ATTEMPTS:
                    raise
                log(f"{unit.name}: its process died, it is run again")
                waiting.append(unit)
            else:
                done.add(unit.name)
                yield unit.name


def _run(unit: Unit, names: tuple[str, ...]) -> None:
    """Run a unit in the process of a worker; ``names`` are trusted, as where it was submitted."""
    progress.hide()
    with _alone, trust(*names):
        unit.call(*unit.arguments)


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    """An executor of so many processes of this machine, which share torch's CPU threads. An error
    in the block, and so Ctrl-C, ends them."""
    executor = _Processes(count)
    try:
        yield executor
    except BaseException:
        executor.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """An executor of the dask workers behind a scheduler.

    Where a worker dies, dask gives its unit to another one, three times. After an error in the
    block nothing is begun, but a worker finishes what it is at.

    Args:
        address: of the scheduler, such as ``tcp://10.0.0.1:8786``.

    Raises:
        ImportError: dask.distributed is missing. OSError: nobody answers there.
    """
    distributed = require("distributed", "cluster")
    with distributed.Client(address) as client:
        executor = client.get_executor(pure=False)
        try:
            yield executor
        finally:
            executor.shutdown(wait=False)


class _Processes(Executor):
    """Processes of one call at a time. One that dies fails its own call, and another takes its
    place; in a ProcessPoolExecutor of several, one that dies fails all calls."""

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count)  # each waits for one process
        self._share = max(1, torch.get_num_threads() // count)
        self._idle: SimpleQueue[ProcessPoolExecutor | None] = SimpleQueue()
        for _ in range(count):
            self._idle.put(None)
        self._lock, self._ended = threading.Lock(), False

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._threads.submit(self._wait, functools.partial(call, *args, **kwargs))

    def _wait(self, call: Callable[[], Any]) -> Any:
        pool = self._idle.get()
        try:
            with self._lock:  # no process is started while terminate() looks for them
                if self._ended:
                    raise BrokenExecutor("the processes were ended")
                pool = pool or self._new()
                result = pool.submit(call)
            return result.result()
        except BrokenExecutor:
            pool = None
            raise
        finally:
            self._idle.put(pool)

    def _new(self) -> ProcessPoolExecutor:
        # A fork of this process has torch's locks without its threads. One of a server has neither,
        # and need not import everything again.
        methods = multiprocessing.get_all_start_methods()
        method = "forkserver" if "forkserver" in methods else "spawn"
        multiprocessing.set_forkserver_preload(IMPORTED)
        context = multiprocessing.get_context(method)
        return ProcessPoolExecutor(1, context, _start, (self._share,))

    def terminate(self) -> None:
        """End all processes, whatever they are at."""
        with self._lock:
            self._ended = True
            for process in multiprocessing.active_children():
                process.terminate()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        while not self._idle.empty():
            pool = self._idle.get()
            if pool is not None:
                pool.shutdown(wait)


def _start(threads: int) -> None:
    streams.be_lenient()
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process has it, and ends the others
