"""Parts of a job in processes of their own."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from divqat._util import progress, streams


def side_by_side(part: Callable[..., object], calls: Sequence[tuple[Any, ...]], jobs: int) -> None:
    """Call ``part`` with each of ``calls``, so many at a time, each in a process.

    The processes share the CPU threads that torch has here, and show no progress bars. The first
    error ends all of them and is raised, and so does Ctrl-C.

    Args:
        part: a function of a module, as processes look it up by name.
        calls: arguments, which can be pickled, of at least one call. jobs: at least 1.

    Raises:
        BrokenProcessPool: a process was killed.
        Others: as ``part``.
    """
    jobs = min(jobs, len(calls))  # all processes start at once, needed or not
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")  # a fork has torch's locks without its threads
    with ProcessPoolExecutor(jobs, context, _start, (threads,)) as pool:
        done = [pool.submit(part, *arguments) for arguments in calls]
        try:
            for call in as_completed(done):
                call.result()
        except BaseException:
            # Nothing is cancelled: Python before 3.12 loses its processes over that.
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _start(threads: int) -> None:
    streams.be_lenient()
    torch.set_num_threads(threads)
    progress.hide()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process has it, and ends the others
