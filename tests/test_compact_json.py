"""JSON in few lines says what it said, and is laid out as it is promised."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divqat._util.compact_json import WIDTH, compact_json
from divqat._util.integrity import sealed_json, unsealed_json

TEXT = st.text(max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
FINITE = SCALARS.filter(lambda value: value not in (float("inf"), -float("inf")))
VALUES = st.recursive(
    FINITE,
    lambda some: st.lists(some, max_size=6) | st.dictionaries(TEXT, some, max_size=6),
    max_leaves=12,
)


@given(VALUES)
def test_any_value_is_read_as_it_was(value):
    text = compact_json(value)
    assert text.endswith("\n") and repr(json.loads(text)) == repr(value)
    assert compact_json(json.loads(text)) == text


@given(st.dictionaries(TEXT.filter(lambda key: key != "checksum"), VALUES, max_size=6))
def test_any_sealed_object_is_read_as_it_was(value):
    assert repr(unsealed_json(sealed_json(value))) == repr(value)


def test_a_row_is_a_line():
    row = {"op": "observe", "on": [128, 16, 32, 32], "milliseconds": {"median": 0.7, "rounds": 92}}
    value = {
        "none": {}, "short": {"a": 1, "b": [1, 2]}, "shape": (1, 2), 5: None,
        "long": {"name": "x" * 70, "numbers": [1.5, 2] * 20, "rest": [[1], [2]]},
        "rows": [row, row | {"note": "y" * 100}],
    }  # fmt: skip
    numbers = ",\n".join(["      1.5", "      2"] * 20)
    assert (
        compact_json(value)
        == f'''{{
  "none": {{}},
  "short": {{"a": 1, "b": [1, 2]}},
  "shape": [1, 2],
  "5": null,
  "long": {{
    "name": "{"x" * 70}",
    "numbers": [
{numbers}
    ],
    "rest": [[1], [2]]
  }},
  "rows": [
    {json.dumps(row)},
    {json.dumps(row | {"note": "y" * 100})}
  ]
}}
'''
    )


def test_what_fits_on_a_line_stands_on_it():
    for count in range(20, 50):
        line = f'  "a": {json.dumps([1] * count)},'
        lines = compact_json({"a": [1] * count, "b": 0}).splitlines()
        assert (line in lines) == (len(line) <= WIDTH) == (len(lines) == 4)


def test_a_change_of_one_row_changes_one_line():
    rows = [{"seed": i, "accuracy": i / 7} for i in range(20)]
    before = compact_json({"rows": rows}).splitlines()
    rows[9]["accuracy"] = 0.5
    after = compact_json({"rows": rows}).splitlines()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": {"b": -float("inf")}}])
def test_what_is_no_json_is_refused(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        compact_json(value)


def test_what_is_empty_or_no_object():
    assert [compact_json(value) for value in ({}, [], 1, "ü")] == [
        "{}\n", "[]\n", "1\n", '"\\u00fc"\n'
    ]  # fmt: skip
    assert compact_json([1, [2, 3]]) == "[\n  1,\n  [2, 3]\n]\n"
