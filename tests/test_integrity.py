"""No damage to a file that carries a checksum goes unnoticed."""

import io
import json
import random
import sys
import warnings
import zipfile

import pytest
import torch

from divqat._util.files import (
    check_beside,
    load_checkpoint,
    read_json,
    save_checkpoint,
    step,
    write_json,
)
from divqat._util.integrity import sealed_json, sha256

VALUE = {"accuracy": 0.8125, "rows": [1, None, True, 2.5e-7], "name": "ünï", "in": {"5": []}}
# as divqat 0.1.0 wrote it
INDENTED = """{
  "accuracy": 0.8125,
  "in": {
    "rows": [
      1,
      null
    ]
  },
  "checksum": "sha256:6d897c1f2d8ad6cccc24360f507139f3d46886caaf0610d7b3a2002cc72d8d7f"
}
"""
STATE = {"weights": torch.linspace(-1, 1, 300), "model": {"a": torch.arange(6)}, "rows": [{"x": 1}]}


def flips(data, count, seed=0):
    """``data`` with one other byte, at so many places and at every one of its last 200."""
    chance = random.Random(seed)
    places = {*chance.sample(range(len(data)), min(count, len(data))), *range(len(data))[-200:]}
    for place in sorted(places):
        changed = bytearray(data)
        changed[place] ^= chance.randrange(1, 256)
        yield bytes(changed)


def cuts(data, count, seed=0):
    """The beginning of ``data``, of so many lengths and of all that lack up to 200 bytes."""
    lengths = {*random.Random(seed).sample(range(len(data)), min(count, len(data)))}
    for length in sorted({*lengths, *range(max(0, len(data) - 200), len(data))}):
        yield data[:length]


def damaged(data):
    yield from flips(data, 400)
    yield from cuts(data, 100)
    yield data + b" "
    yield data + b"\0"


def test_no_damaged_json_is_read(tmp_path):
    path = write_json(tmp_path / "a.json", VALUE)
    assert read_json(path) == VALUE
    for data in damaged(path.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.json.*delete it and repeat the command"):
            read_json(path)


def test_an_indented_file_of_an_older_divqat_is_read_unless_it_is_damaged(tmp_path, recwarn):
    path = tmp_path / "a.json"
    path.write_text(INDENTED)
    assert read_json(path) == {"accuracy": 0.8125, "in": {"rows": [1, None]}} and not recwarn
    for data in damaged(INDENTED.encode()):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.json"):
            read_json(path)


@pytest.mark.parametrize("value", [VALUE, {"in": {"checksum": "sha256:0"}}])
def test_what_was_added_or_removed_is_noticed(value, tmp_path):
    path, text = tmp_path / "a.json", sealed_json(value)
    lines = text.splitlines(keepends=True)
    for i in range(len(lines)):
        for other in (lines[:i] + lines[i + 1 :], lines[: i + 1] + lines[i:]):
            path.write_text("".join(other))
            with pytest.raises(ValueError):
                read_json(path)
    for other in (text + "\n", text.replace(": ", ":  ", 1), text.replace("\n", "\r\n")):
        path.write_bytes(other.encode())
        with pytest.raises(ValueError):
            read_json(path)
    path.write_text(text)
    assert read_json(path) == value


def test_no_damaged_checkpoint_is_loaded(tmp_path):
    path = save_checkpoint(tmp_path / "a.pt", STATE)
    assert torch.equal(load_checkpoint(path)["weights"], STATE["weights"])
    for data in damaged(path.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.pt is not a readable .*delete it and repeat the"):
            load_checkpoint(path)


def test_everybody_can_read_what_carries_a_checksum(tmp_path):
    path = save_checkpoint(tmp_path / "a.pt", STATE)
    for options in ({}, {"mmap": True}):
        state = torch.load(path, weights_only=True, **options)
        assert torch.equal(state["weights"], STATE["weights"])
    archive = zipfile.ZipFile(path)
    assert archive.testzip() is None and archive.comment.startswith(b"sha256:")
    value = json.loads(write_json(tmp_path / "a.json", VALUE).read_text())
    assert value.pop("checksum").startswith("sha256:") and value == VALUE


def test_the_same_content_gives_the_same_bytes(tmp_path):
    names = "ab"
    for name in names:
        save_checkpoint(tmp_path / name, STATE)
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1


def test_older_files_are_read_and_that_nobody_checked_them_is_told_once(tmp_path, recwarn):
    warnings.simplefilter("default")  # as Python has it
    for i in range(2):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(VALUE))
        assert read_json(path) == VALUE
        torch.save(STATE, tmp_path / f"{i}.pt")
        assert load_checkpoint(tmp_path / f"{i}.pt")["rows"] == STATE["rows"]
    (told,) = recwarn
    assert "without a checksum" in str(told.message)


def test_an_older_checkpoint_is_tested_by_its_crcs(tmp_path):
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    data = bytearray(buffer.getvalue())
    data[data.index(STATE["weights"].numpy().tobytes()) + 100] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.pt is not .*changed or cut after it was written"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_file_with_its_checksum_beside_it(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(range(64)))
    check_beside(path, "export.json", "what to do")  # nothing is known of it
    write_json(tmp_path / "export.json", {"sha256": {"model.onnx": sha256(path)}})
    check_beside(path, "export.json", "what to do")
    for data in damaged(path.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.onnx was changed or cut .*: what to do$"):
            check_beside(path, "export.json", "what to do")
    write_json(tmp_path / "export.json", {"sha256": {"another.onnx": ""}})
    check_beside(path, "export.json", "what to do")
    (tmp_path / "export.json").write_text("{}")
    with pytest.warns(UserWarning, match="without a checksum"):
        check_beside(path, "export.json", "what to do")


def test_a_step_whose_product_was_changed_is_done_again(tmp_path):
    report, product = tmp_path / "export.json", tmp_path / "model.onnx"

    def make():
        assert not report.exists()  # it would be that of another product
        product.write_bytes(b"model")
        return {"size": 5}

    done = step(report, "source", make, product=product)
    assert step(report, "source", None, product=product) == done
    product.write_bytes(b"mudel")
    with pytest.warns(UserWarning, match=r"model\.onnx was changed .*: it is rebuilt"):
        step(report, "source", make, product=product)
    assert product.read_bytes() == b"model"


def test_a_checksum_is_of_the_value(tmp_path):
    assert sealed_json({"a": 1}) != sealed_json({"a": 1.0})
    with pytest.raises(ValueError):
        sealed_json({"a": float("nan")})


def test_a_checkpoint_can_be_sealed_while_a_profiler_holds_its_frames(tmp_path):
    """As dask's does, by ``sys._current_frames``: their locals then outlive the calls."""
    frames = []
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: frames.append(frame))
    try:
        save_checkpoint(tmp_path / "state.pt", {"x": 1})
    finally:
        sys.setprofile(before)
    assert load_checkpoint(tmp_path / "state.pt") == {"x": 1} and frames
