"""Nothing that standard output does ends a command."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from divqat import cli
from divqat._util import progress, streams
from divqat.cli import commands
from divqat.experiments import workers

ROOT = Path(__file__).parent.parent
LINE = "93.0 ± 0.1 → ✓"


@pytest.fixture
def speaking(monkeypatch):
    """``divqat info`` prints much; a list of how often it came to its end."""
    ends = []

    def info(args):
        assert list(progress.progress([1], "a bar")) == [1]
        for _ in range(2000):
            print(LINE)
        print("a warning: ±", file=sys.stderr)
        ends.append(True)
        return 0

    monkeypatch.setattr(commands, "info", info)
    return ends


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "absent": lambda: None,
    "closed": closed,
    "broken pipe": lambda: Broken(BrokenPipeError(32, "Broken pipe")),
    "full disk": lambda: Broken(OSError(28, "No space left on device")),
    "bad handle": lambda: Broken(OSError(9, "Bad file descriptor")),
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"),
    "cp1252": lambda: io.TextIOWrapper(io.BytesIO(), "cp1252"),
}


@pytest.mark.parametrize("err", ["as it is", *STREAMS])
@pytest.mark.parametrize("out", STREAMS)
def test_a_command_comes_to_its_end(monkeypatch, speaking, out, err):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", STREAMS[out]())
        if err != "as it is":
            patch.setattr(sys, "stderr", STREAMS[err]())
        before = sys.stdout, sys.stderr
        assert cli.main(["info"]) == 0
        assert (sys.stdout, sys.stderr) == before
    assert speaking == [True]


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", LINE),
        ("cp1252", r"93.0 ± 0.1 \u2192 \u2713"),
        ("ascii", r"93.0 \xb1 0.1 \u2192 \u2713"),
    ],
)
def test_what_an_encoding_lacks_is_escaped(monkeypatch, speaking, encoding, shown):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, newline="\n"))
    assert cli.main(["info"]) == 0
    assert raw.getvalue() == 2000 * f"{shown}\n".encode(encoding)


def test_output_that_is_lost_is_told_where_somebody_may_read_it(monkeypatch, speaking, capsys):
    monkeypatch.setattr(sys, "stdout", STREAMS["full disk"]())
    assert cli.main(["info"]) == 0
    error = capsys.readouterr().err
    assert error.count("standard output is lost: [Errno 28] No space left on device") == 1
    monkeypatch.setattr(sys, "stdout", STREAMS["broken pipe"]())  # somebody has read enough
    assert cli.main(["info"]) == 0
    assert "lost" not in capsys.readouterr().err


def test_streams_that_are_absent_keep_their_numbers(monkeypatch, speaking):
    monkeypatch.setattr(sys, "stdout", None)
    kept = os.dup(1)
    try:
        os.close(1)
        with streams.lenient(), open(os.devnull) as file:
            assert file.fileno() != 1
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def test_workers_are_lenient_too(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(progress, "_hidden", False)
    monkeypatch.setattr(workers.signal, "signal", lambda *args: None)
    monkeypatch.setattr(workers.torch, "set_num_threads", lambda threads: None)
    workers._init_process(1)
    print("±", flush=True)
    sys.stdout.write("±")


# A process of its own, as what is left in a buffer fails when Python ends: exit code 120.
AT_THE_EXIT = {
    "a pipe nobody reads": ('"$@" | true; exit ${PIPESTATUS[0]}', {}),
    "none": ('exec "$@" >&- 2>&- <&-', {}),
    "a full disk": ('exec "$@" > /dev/full 2>&1', {}),
    "ascii": ('exec "$@" > /dev/null', {"PYTHONIOENCODING": "ascii", "LANG": "C"}),
}


def test_python_ends_with_0(tmp_path):
    """Of a program that imports no torch, once for each."""
    program = tmp_path / "run.py"
    program.write_text(
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        f"spec = spec_from_file_location('streams', {str(ROOT / 'divqat/_util/streams.py')!r})\n"
        "streams = module_from_spec(spec); spec.loader.exec_module(streams)\n"
        f"with streams.lenient(): print(10000 * {LINE!r}); print('a')\n"
        f"with streams.lenient(): print('short')\n"
    )
    for name, (shell, settings) in AT_THE_EXIT.items():
        command = ["bash", "-c", shell, "bash", sys.executable, str(program)]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b""), name
