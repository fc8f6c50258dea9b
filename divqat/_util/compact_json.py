"""JSON that is short, and that people and ``git diff`` read line by line."""

from __future__ import annotations

import json
from typing import Any

WIDTH = 100  # of a line, where it can be kept


def compact_json(value: Any) -> str:
    """``value`` as JSON: one line per key, and per element of a list that is too long for the line
    of its key. An element stays on one line however long it is: a row of a table, say.

    Raises:
        ValueError: NaN or Inf, which are no JSON.
    """
    plain = json.loads(json.dumps(value, allow_nan=False))  # keys are texts, tuples are lists
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
