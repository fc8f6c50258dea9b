"""Standard streams that cannot end a command if they are missing, closed, broken or not UTF-8."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """A block in which printing never fails."""
    before = sys.stdout, sys.stderr
    be_lenient()
    try:
        yield
    finally:
        sys.stdout.flush()  # here, as it would fail at exit
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def be_lenient() -> None:
    """Make printing never fail in this process."""
    if None in (sys.stdout, sys.stderr):
        # Opened files must not get the descriptor of a stream, to which libraries print.
        while (handle := os.open(os.devnull, os.O_RDWR)) < 3:
            pass
        os.close(handle)
    sys.stdout, sys.stderr = _Lenient(sys.stdout), _Lenient(sys.stderr)


class _Lenient:
    """A text stream that escapes characters outside its encoding, and drops output if it is
    broken."""

    def __init__(self, stream: Any) -> None:
        self._stream = _nowhere() if stream is None else stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:  # it is closed
            return False

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            known = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            self.write(known)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        """Continue without the stream, and prevent its buffer from failing at exit."""
        stream, self._stream = self._stream, _nowhere()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(self._stream.fileno(), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"divqat: warning: standard output is lost: {error}", file=sys.stderr)


def _nowhere() -> Any:
    return open(os.devnull, "w", encoding="utf-8")
