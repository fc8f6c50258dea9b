"""Checksums, which detect files that were changed or cut after they were written.

JSON files and checkpoints contain their own checksum, so that no kill can separate them; that of a
file for other programs, like ``model.onnx``, is in a JSON file beside it. Files of an older divqat
have none.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

from divqat._util.compact_json import compact_json

KEY, MARK = "checksum", "sha256:"
# The end of a zip file: a magic number, 16 bytes of sizes, the length of the comment, the comment.
END = b"PK\5\6"
NO_COMMENT = b"\0\0"
COMMENT = len(MARK) + 64
CHANGED = "was changed or cut after it was written"


def sealed_json(value: dict[str, Any]) -> str:
    """``value`` as :func:`compact_json`, with the checksum of the text without it as the last key.

    Raises:
        ValueError: NaN or Inf, which are not JSON.
    """
    return compact_json(value | {KEY: MARK + _sha256(compact_json(value).encode())})


def unsealed_json(text: str) -> Any:
    """The value of a text by :func:`sealed_json`, or of JSON without a checksum (older divqat).

    Raises:
        json.JSONDecodeError: it is not JSON.
        ValueError: it was changed.
    """
    value = json.loads(text, parse_constant=_refuse_constant)
    # Both, as one changed byte can hide only one of them.
    if f'"{KEY}"' not in text and f'"{MARK}' not in text:
        _warn_unchecked()
        return value
    if not isinstance(value, dict) or not _is_whole(text):
        raise ValueError(f"it {CHANGED}")
    del value[KEY]
    return value


def _is_whole(text: str) -> bool:
    """Whether JSON, compact or indented (older divqat), matches its checksum."""
    before, _, after = text.rpartition(f'  "{KEY}": ')
    unsealed = "{}\n" if before == "{\n" else before.removesuffix(",\n") + "\n}\n"
    return after == f'"{MARK}{_sha256(unsealed.encode())}"\n}}\n'


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def seal_zip(file: io.BytesIO) -> None:
    """Append the checksum of a zip file, as written by ``torch.save``, as its comment."""
    file.seek(-len(NO_COMMENT), io.SEEK_END)
    file.write(COMMENT.to_bytes(2, "little"))
    with file.getbuffer() as data:  # a profiler may hold on to frames, but now not to the buffer
        checksum = MARK + _sha256(data)
    file.write(checksum.encode())


def check_zip(data: bytes) -> None:
    """Check that a zip file is unchanged; without a checksum only by its CRCs, which do not cover
    all of it.

    Raises:
        ValueError, zipfile.BadZipFile: it was changed.
    """
    if data[-22:-18] == END and data[-2:] == NO_COMMENT:
        if zipfile.ZipFile(io.BytesIO(data)).testzip() is not None:
            raise ValueError(f"it {CHANGED}")
        _warn_unchecked()
    elif data[-COMMENT:] != (MARK + _sha256(memoryview(data)[:-COMMENT])).encode():
        raise ValueError(f"it {CHANGED}")


def sha256(path: str | Path) -> str:
    """64 hexadecimal digits that identify a file's content."""
    return _sha256(Path(path).read_bytes())


def is_intact(path: Path, report: dict[str, Any]) -> bool:
    """Whether a file matches its checksum in ``report["sha256"]``, by name."""
    recorded = report.get("sha256")
    if recorded is None:
        _warn_unchecked()
        return True
    return path.name not in recorded or sha256(path) == recorded[path.name]


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _warn_unchecked() -> None:
    # One text from one line, so that Python shows it only once.
    warnings.warn(
        "using files without a checksum, as written by an older divqat: changes cannot be detected",
        stacklevel=1,
    )
