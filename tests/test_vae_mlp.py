"""The intrusion detector of examples/: its readers, and its PTQ and QAT."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from bench import ptq

ROOT = Path(__file__).parent.parent
KINDS = ("tcp", "udp", "icmp")


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("vae_mlp")
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def traffic(example):
    return importlib.import_module("traffic")


def connection(number):
    """A row of NSL-KDD's form; attacks have more bytes."""
    draw = random.Random(number)
    attack = number % 2
    numbers = [str(draw.random() + attack) for _ in range(37)]
    row = [numbers[0], draw.choice(KINDS), "http", "SF", str(100 ** (attack + 1)), *numbers[1:]]
    return ",".join([*row[:41], "neptune" if attack else "normal", "21"])


@pytest.fixture
def nsl_kdd(tmp_path):
    path = tmp_path / "KDDTest+.txt"
    path.write_text("\n".join(map(connection, range(300))) + "\n")
    return path


def test_nsl_kdd_by_hand(traffic, tmp_path):
    path = tmp_path / "two.txt"
    zeros = ["0"] * 36
    header = ["duration", *["x"] * 42]
    rows = [["9", "udp", "http", "SF", "-3", *zeros, "normal", "21"],
            ["0", "tcp", "http", "S0", "0", *zeros, "smurf", "3"]]  # fmt: skip
    path.write_text("\n".join(",".join(row) for row in [header, *rows]))
    features, labels = traffic.read_nsl_kdd(path)
    assert labels.tolist() == [0, 1] and features.shape == (2, 38 + 2 + 1 + 2)
    expected = torch.tensor([10.0, -4.0]).abs().log() * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(features[0, :2], expected)
    assert features[:, 38:].tolist() == [[0, 1, 1, 0, 1], [1, 0, 1, 1, 0]]  # tcp, udp, http, S0, SF
    path.write_text("1,2,3\n")
    with pytest.raises(ValueError, match="wanted rows of 43 columns, got row 1"):
        traffic.read_nsl_kdd(path)


@pytest.mark.parametrize("nested", [False, True])
def test_n_baiot_in_both_layouts(traffic, tmp_path, nested):
    names = ["1.benign.csv", "1.mirai.ack.csv", "2.gafgyt.combo.csv", "features.csv"]
    if nested:
        names = ["Door/benign_traffic.csv", "Door/mirai_attacks/ack.csv",
                 "Bell/gafgyt_attacks/combo.csv", "info.csv"]  # fmt: skip
    header = ",".join(f"f{i}" for i in range(115))
    for number, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([header, *[",".join([str(number)] * 115)] * 5]) + "\n")
    features, labels = traffic.read_n_baiot(tmp_path, rows=3)
    assert features.shape == (9, 115) and sorted(labels.tolist()) == [0] * 3 + [1] * 6
    assert features[labels == 0].unique().tolist() == [0.0]  # log(1 + 0), of the first file
    (tmp_path / names[0]).write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="wanted 115 features, got 2"):
        traffic.read_n_baiot(tmp_path, rows=3)
    (tmp_path / names[0]).write_text(header + "\n" + ",".join(["x"] * 115))
    with pytest.raises(ValueError, match="benign"):
        traffic.read_n_baiot(tmp_path, rows=3)
    with pytest.raises(FileNotFoundError, match="no CSV file of N-BaIoT"):
        traffic.read_n_baiot(tmp_path / "none", rows=3)


def test_the_split_is_normalized_by_its_training_part(traffic):
    features = torch.randn(200, 3) * 7 + 2
    features[:, 2] = 1.0  # a constant feature
    data = traffic.split(features, torch.arange(200) % 2)
    assert len(data.train) == 140 and len(data.test) == 60
    assert data.train.abs().max() <= 5 and not data.train[:, 2].any()
    assert data.train[:, :2].mean(0).abs().max() < 0.1


@pytest.mark.slow
def test_the_example_measures_every_method(example, nsl_kdd, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(example.BEST, "rounding_steps", 5)
    out = tmp_path / "rows.json"
    example.main(["--nsl-kdd", str(nsl_kdd), "--seeds", "0", "--bits", "3", "--epochs", "100",
                  "--json", str(out)])  # fmt: skip
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert [row["method"] for row in rows] == ["full precision", *example.METHODS]
    assert all(row["accuracy"] > 0.8 and row["bytes"] and row["microseconds"] for row in rows)
    assert all(0 <= row["false_alarms"] <= 1 and 0.8 < row["f1"] <= 1 for row in rows)
    assert rows[0]["packed_bytes"] * 3 // 32 == rows[1]["packed_bytes"]
    assert str(tmp_path) not in result["command"]
    assert example.table(rows) in capsys.readouterr().out


def test_the_published_tables_are_those_of_the_committed_rows(example):
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "bench/results/vae-mlp.json").read_text())["rows"]
    assert example.table(rows) in page
    assert ptq.table(json.loads((ROOT / "bench/results/ptq.json").read_text())) in page
