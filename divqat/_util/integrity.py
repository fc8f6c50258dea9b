"""Checksums: what was changed or cut since it was written is noticed before it is used.

A JSON file and a checkpoint carry their own, so that no kill can part them; what others read, like
``model.onnx``, has its checksum in a JSON file beside it. Files of an older divqat have none.
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
# The end of a zip file: a magic number, 16 bytes of sizes, the length of a comment that follows.
END = b"PK\5\6"
NO_COMMENT = b"\0\0"
COMMENT = len(MARK) + 64
CHANGED = "was changed or cut after it was written"


def sealed_json(value: dict[str, Any]) -> str:
    """``value`` as :func:`compact_json` whose last key is the checksum of the text without it.

    Raises:
        ValueError: NaN or Inf, which are no JSON.
    """
    return compact_json(value | {KEY: MARK + _sha256(compact_json(value).encode())})


def unsealed_json(text: str) -> Any:
    """What :func:`sealed_json` was given; JSON without a checksum, of an older divqat, as it is.

    Raises:
        json.JSONDecodeError: it is no JSON. ValueError: it is not as it was written.
    """
    value = json.loads(text, parse_constant=_no_number)
    # Both: a changed byte can hide one of them only.
    if f'"{KEY}"' not in text and f'"{MARK}' not in text:
        _say_unchecked()
        return value
    if not isinstance(value, dict) or not _is_whole(text):
        raise ValueError(f"it {CHANGED}")
    del value[KEY]
    return value


def _is_whole(text: str) -> bool:
    """Whether JSON, compact or indented as by an older divqat, is as its checksum says."""
    before, _, after = text.rpartition(f'  "{KEY}": ')
    unsealed = "{}\n" if before == "{\n" else before.removesuffix(",\n") + "\n}\n"
    return after == f'"{MARK}{_sha256(unsealed.encode())}"\n}}\n'


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def seal_zip(file: io.BytesIO) -> None:
    """Give a zip file, as ``torch.save`` writes it, its checksum as the comment at its end."""
    file.seek(-len(NO_COMMENT), io.SEEK_END)
    file.write(COMMENT.to_bytes(2, "little"))
    file.write((MARK + _sha256(file.getbuffer())).encode())


def check_zip(data: bytes) -> None:
    """See that a zip file is as it was written; of one without a checksum, by its own CRCs, which
    do not cover all of it.

    Raises:
        ValueError, zipfile.BadZipFile: it is not.
    """
    if data[-22:-18] == END and data[-2:] == NO_COMMENT:
        if zipfile.ZipFile(io.BytesIO(data)).testzip() is not None:
            raise ValueError(f"it {CHANGED}")
        _say_unchecked()
    elif data[-COMMENT:] != (MARK + _sha256(memoryview(data)[:-COMMENT])).encode():
        raise ValueError(f"it {CHANGED}")


def sha256(path: str | Path) -> str:
    """64 hexadecimal digits that identify a file's content."""
    return _sha256(Path(path).read_bytes())


def is_intact(path: Path, report: dict[str, Any]) -> bool:
    """Whether a file is the one whose checksum ``report["sha256"]`` has under its name."""
    recorded = report.get("sha256")
    if recorded is None:
        _say_unchecked()
        return True
    return path.name not in recorded or sha256(path) == recorded[path.name]


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _say_unchecked() -> None:
    # One text at one place, so that Python shows it once.
    warnings.warn(
        "files without a checksum, as an older divqat wrote them, are used: whether they were "
        "changed since is not known",
        stacklevel=1,
    )
