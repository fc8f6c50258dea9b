"""bench networks: kernels of hand-made files, bars, rows of networks that fail, and the page."""

import argparse

import numpy as np
import pytest
import torch
from torch import nn

from bench import architectures, network_case, networks
from bench.network_case import Plan, measure
from divqat.export.placement import placements

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("one_thread")


class File:
    """An ONNX file, node by node."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, name, values):
        self.constants.append(onnx.numpy_helper.from_array(values, name))
        return name

    def node(self, operation, name, *inputs, **attributes):
        made = onnx.helper.make_node(operation, list(inputs), [name], f"node_{name}", **attributes)
        self.nodes.append(made)
        return name

    def grid(self, x, dtype=np.uint8):
        scale = self.constant(f"{x}.scale", np.float32(0.1))
        zero = self.constant(f"{x}.zero", dtype(0))
        codes = x
        if dtype == np.uint8:
            codes = self.node("QuantizeLinear", f"{x}.codes", x, scale, zero)
        return self.node("DequantizeLinear", f"{x}.grid", codes, scale, zero)

    def weight(self, name, *shape):
        return self.grid(self.constant(name, np.ones(shape, np.int8)), np.int8)

    def save(self, path, x, y):
        info = onnx.helper.make_tensor_value_info
        ends = [[info(name, onnx.TensorProto.FLOAT, None)] for name in (x, y)]
        ends[0] = [info(x, onnx.TensorProto.FLOAT, [1, 4, 8, 8])]
        graph = onnx.helper.make_graph(self.nodes, "graph", *ends, self.constants)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
        model.ir_version = 10
        onnx.save(model, path)
        return path


def test_each_layer_gets_its_kernel_and_its_reason(tmp_path):
    file = File()
    x = file.grid("x")
    x = file.grid(file.node("Conv", "whole", x, file.weight("w1", 4, 4, 1, 1)))
    up = file.node("ConvTranspose", "up", x, file.weight("w2", 4, 4, 1, 1))
    x = file.grid(up)
    raw = file.node("Conv", "raw", x, file.weight("w3", 4, 4, 1, 1))
    x = file.node("Tanh", "tanh", raw)
    plain = file.constant("w4", np.ones((4, 4, 1, 1), np.float32))
    x = file.grid(file.node("Relu", "relu", file.node("Conv", "plain", x, plain)))
    y = file.node("MatMul", "both", x, x)
    rows = placements(file.save(tmp_path / "file.onnx", "x", y))
    assert [(row.module, row.weighted, row.int8, row.reason) for row in rows] == [
        ("node_whole", True, True, ""),
        ("node_up", True, False, "no integer kernel of ConvTranspose"),
        ("node_raw", True, False, "output in float"),
        ("node_plain", True, False, "input and weight in float"),
        ("node_both", False, True, ""),
    ]
    assert rows[0].kernel == "QLinearConv" and rows[1].kernel == "ConvTranspose"


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, architectures.CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Dense(Toy):
    """Answers of each pixel."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(8, architectures.CLASSES, 1)

    def forward(self, x):
        return {"out": self.head(torch.relu(self.norm(self.conv(x))))}


class Broken(Toy):
    def forward(self, x):
        raise RuntimeError("no such thing\nand more")


@pytest.fixture
def toys(monkeypatch):
    """Three networks, without their libraries."""
    builders = {"toy": Toy, "dense": Dense, "broken": Broken}
    entries = dict.fromkeys(builders, architectures.Architecture("toys", size=32))
    monkeypatch.setattr(architectures, "NETWORKS", entries)
    monkeypatch.setattr(architectures, "build", lambda name, seed: builders[name]().eval())
    monkeypatch.setattr(architectures, "missing", list)
    monkeypatch.setattr(architectures, "versions", dict)
    monkeypatch.setattr(network_case, "ROUNDS", 2)


def options(tmp_path, *more):
    parser = argparse.ArgumentParser()
    networks.add_arguments(parser)
    quick = ["--least", "16", "--seconds", "0.01", "--runs", str(tmp_path)]
    return parser.parse_args([*quick, *more])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "dense"])
def test_a_network_is_measured(toys, tmp_path, name):
    torch.manual_seed(0)
    row = measure(name, Plan(least=16, seconds=0.01), tmp_path)
    assert "error" not in row
    assert (row["layers"], row["int8"], row["float"]) == (2, 2, [])
    assert set(row["checks"].values()) == {networks.PASSED}
    assert row["agreement"] == 1 and row["sqnr_db"] > 20 and row["accuracy"] > 0.15
    assert set(row["milliseconds"]) == {"int8", "float"}
    assert not networks.missed_bars([row], [name]) and not list(tmp_path.iterdir())


def test_a_network_that_fails_is_a_row_and_a_missed_bar(toys, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"broken: build: RuntimeError: no such thing$"):
        networks.main(options(tmp_path, "--only", "broken", "--check"))
    assert "no such thing" in capsys.readouterr().out
    networks.main(options(tmp_path, "--only", "broken"))  # is not measured again
    assert "build" not in capsys.readouterr().err


def test_bars():
    layer = {"layer": "a", "kernel": "Conv", "reason": "output in float"}
    row = {
        "network": "n",
        "float": [layer],
        "agreement": 0.99,
        "sqnr_db": 19.0,
        "checks": {"pickle": "KeyError: x"},
    }
    assert len(networks.missed_bars([row], ["n", "other"])) == 5
    assert not networks.missed_bars([row], [])
    fine = {"network": "n", "agreement": 0.996, "sqnr_db": 21.0, "checks": {"pickle": "passed"}}
    fine["float"] = [layer | {"reason": "no integer kernel of ConvTranspose"}]
    assert not networks.missed_bars([fine], ["n"])


def test_without_the_libraries_it_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "missing", lambda: ["timm (No module named 'timm')"])
    with pytest.raises(SystemExit, match=r"timm.*requirements-networks"):
        networks.main(options(tmp_path))
