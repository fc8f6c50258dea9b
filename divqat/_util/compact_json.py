"""Compact JSON that is readable line by line, also in ``git diff``."""

from __future__ import annotations

import json
from typing import Any

WIDTH = 100  # of a line, if possible


def compact_json(value: Any) -> str:
    """``value`` as JSON with one line per key. A list that is too long for the line of its key has
    one line per element, however long (a row of a table, for example).

    Raises:
        ValueError: NaN or Inf, which are not JSON.
    """
    plain = json.loads(json.dumps(value, allow_nan=False))  # keys become strings, tuples lists
    return _block(plain, "") + "\n"


def _block(value: Any, indent: str) -> str:
    inner = indent + "  "
    if value and isinstance(value, dict):
        lines = [_entry(key, item, inner) for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if value and isinstance(value, list):
        return "[\n" + ",\n".join(inner + json.dumps(item) for item in value) + f"\n{indent}]"
    return json.dumps(value)


def _entry(key: str, value: Any, indent: str) -> str:
    start = f"{indent}{json.dumps(key)}: "
    line = start + json.dumps(value)
    return line if len(line) < WIDTH else start + _block(value, indent)  # a comma may follow
