"""Run tasks in other processes, on this machine or on a cluster.

A task is a function call that writes its results to files and can be repeated. Tasks are run by a
:class:`concurrent.futures.Executor` from :func:`process_executor` (this machine) or
:func:`cluster_executor`.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
import threading
import time
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

# What the server of processes imports, if it is installed: tasks need it, and it takes seconds.
PRELOADED = [
    "divqat.experiments.tasks",
    "matplotlib.figure",
    "onnxscript",
    "onnxruntime",
    "sklearn.datasets",
]
ATTEMPTS = 3  # of a task whose process dies
# One task at a time: the number of threads and the random state belong to the whole process.
_process_lock = threading.Lock()


@dataclass(frozen=True)
class Task:
    """A function call to run in another process.

    Attributes:
        name: unique, for messages.
        call, arguments: a module-level function, and arguments that can be pickled.
        after: names of the tasks that have to finish first.
    """

    name: str
    call: Callable[..., object]
    arguments: tuple[Any, ...]
    after: tuple[str, ...] = ()


def run_tasks(tasks: Sequence[Task], executor: Executor, log: Callable[[str], object]) -> None:
    """Run tasks, each as soon as the tasks in its ``after`` have finished.

    A task whose process dies is run again. After the first exception no more tasks are submitted.

    Args:
        tasks: the tasks.
        executor: if a process dies, it either fails only that process's task with BrokenExecutor,
            or runs the task again itself.
        log: is called with a line when a task is run again; and where no bar can be shown, when one
            has finished.

    Raises:
        BrokenExecutor: a task's process died three times.
        Others: the exceptions of the tasks.
    """
    start = time.monotonic()
    finished = _run_in_order(tasks, executor, log)
    shown = progress.progress(finished, "tasks", total=len(tasks))
    for done, _ in enumerate(shown, 1):
        left = len(tasks) - done
        if left and not progress.is_shown():
            seconds = (time.monotonic() - start) / done * left
            log(f"{done} of {len(tasks)} tasks, about {progress.duration(seconds)} left")


def _run_in_order(
    tasks: Sequence[Task], executor: Executor, log: Callable[[str], object]
) -> Iterator[str]:
    """Run tasks and yield the name of each when it has finished."""
    waiting, done, deaths = list(tasks), set[str](), Counter[str]()
    running: dict[Future[None], Task] = {}
    while waiting or running:
        for task in [task for task in waiting if done.issuperset(task.after)]:
            waiting.remove(task)
            running[executor.submit(_run_task, task, trusted())] = task
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            try:
                future.result()
            except BrokenExecutor:
                deaths[task.name] += 1
                if deaths[task.name] == ATTEMPTS:
                    raise
                log(f"{task.name}: its process died, running it again")
                waiting.append(task)
            else:
                done.add(task.name)
                yield task.name


def _run_task(task: Task, names: tuple[str, ...]) -> None:
    """Run a task in a worker process, and trust the same ``names`` as the submitting process."""
    progress.hide()
    with _process_lock, trust(*names):
        task.call(*task.arguments)


@contextmanager
def process_executor(count: int) -> Iterator[Executor]:
    """An executor with ``count`` processes on this machine, which share torch's CPU threads. An
    exception in the block, including Ctrl-C, ends them."""
    executor = _ProcessExecutor(count)
    try:
        yield executor
    except BaseException:
        executor.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def cluster_executor(address: str) -> Iterator[Executor]:
    """An executor that runs tasks on the workers of a dask scheduler.

    If a worker dies, dask gives its task to another one, up to three times. After an exception in
    the block no task starts, but running ones finish.

    Args:
        address: of the scheduler, such as ``tcp://10.0.0.1:8786``.

    Raises:
        ImportError: dask.distributed is missing.
        OSError: the scheduler does not respond.
    """
    distributed = require("distributed", "cluster")
    with distributed.Client(address) as client:
        executor = client.get_executor(pure=False)
        try:
            yield executor
        finally:
            executor.shutdown(wait=False)


class _ProcessExecutor(Executor):
    """Processes that run one call at a time. If one dies, only its call fails, and a new process
    replaces it; in a ProcessPoolExecutor all calls would fail."""

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count)  # each waits for one process
        self._threads_each = max(1, torch.get_num_threads() // count)
        self._idle: SimpleQueue[ProcessPoolExecutor | None] = SimpleQueue()
        for _ in range(count):
            self._idle.put(None)
        self._lock, self._ended = threading.Lock(), False

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._threads.submit(self._run_call, functools.partial(call, *args, **kwargs))

    def _run_call(self, call: Callable[[], Any]) -> Any:
        pool = self._idle.get()
        try:
            with self._lock:  # starts no process while terminate() lists them
                if self._ended:
                    raise BrokenExecutor("the processes have been terminated")
                pool = pool or self._new_pool()
                result = pool.submit(call)
            return result.result()
        except BrokenExecutor:
            if pool is not None:
                pool.shutdown()  # waits for the end of its process
                pool = None
            raise
        finally:
            self._idle.put(pool)

    def _new_pool(self) -> ProcessPoolExecutor:
        # A fork of this process would copy torch's locks, but not its threads. A fork of a server
        # has neither, and does not import everything again.
        methods = multiprocessing.get_all_start_methods()
        method = "forkserver" if "forkserver" in methods else "spawn"
        multiprocessing.set_forkserver_preload(PRELOADED)
        context = multiprocessing.get_context(method)
        return ProcessPoolExecutor(1, context, _init_process, (self._threads_each,))

    def terminate(self) -> None:
        """Terminate all processes at once."""
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


def _init_process(threads: int) -> None:
    streams.be_lenient()
    torch.set_num_threads(threads)
    # Ctrl-C is for the parent, which then terminates its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
