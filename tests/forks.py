"""Python processes that need not import torch: forks of one that has, and has done nothing else.

As a program, it is that one. It takes jobs line by line, forks for each, and answers with the exit
code and what was said.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@contextmanager
def serving(modules, options=(), environment=None) -> Iterator[Server]:
    """A server that has the modules, as it is started with options and environment variables."""
    command = [sys.executable, *options, __file__, *modules]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield Server(process)


@dataclass
class Server:
    """Runs programs in forks of a process."""

    process: subprocess.Popen

    def run(self, program, folder, environment=(), path=(), before="") -> tuple[int, str, str]:
        """Exit code, output and errors of a program, as a list like sys.argv or as code; run in a
        folder, with more environment variables, ``path`` in front of all others, and after the code
        ``before``."""
        job = dict(program=program, folder=str(folder), environment=dict(environment))
        job.update(path=[str(part) for part in path], before=before)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))


def work(program, folder, environment, path, before) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    sys.path[:0] = path
    exec(before, {})
    if isinstance(program, str):
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(program[0]).resolve().parent))
        runpy.run_path(program[0], run_name="__main__")


def fork(job, outputs) -> int:
    """The exit code of a job."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, output in enumerate(outputs, 1):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        work(**job)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("out", "err")]
        for line in sys.stdin:
            code = fork(json.loads(line), outputs)
            print(json.dumps([code, *(path.read_text() for path in outputs)]), flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    for module in sys.argv[1:]:
        __import__(module)
    serve()
