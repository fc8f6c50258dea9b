"""The other runtimes than ONNX Runtime, without them: what the errors say, what a file is."""

import sys

import pytest
import torch
from torch import nn

import divqat
from divqat._util.files import file_fingerprint
from divqat.export import export_executorch, export_openvino
from divqat.victim import Victim


@pytest.fixture
def prepared():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    model = divqat.prepare(net, "x86", torch.randn(4, 1, 8, 8))
    model(torch.randn(4, 1, 8, 8))
    return model.eval()


@pytest.mark.parametrize(
    ("package", "export", "suffix"),
    [
        ("executorch", export_executorch, ".pte"),
        ("openvino", export_openvino, ".xml"),
    ],
)
def test_a_runtime_that_is_not_installed_is_named(
    package, export, suffix, prepared, tmp_path, monkeypatch
):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    missing = rf"{package}\S* is missing: pip install 'divqat\[{package}\]'"
    path = tmp_path / f"model{suffix}"
    with pytest.raises(ImportError, match=missing):
        export(prepared, torch.zeros(2, 1, 8, 8), path)
    assert not any(tmp_path.iterdir())
    path.write_bytes(b"some")
    path.with_suffix(".bin").write_bytes(b"weights")
    with pytest.raises(ImportError, match=missing):
        Victim(path)(torch.zeros(1, 1, 8, 8))


def test_the_weights_of_openvino_are_part_of_its_model(tmp_path):
    graph, weights = tmp_path / "model.xml", tmp_path / "model.bin"
    graph.write_text("<net/>")
    with pytest.raises(FileNotFoundError, match=r"model\.bin"):
        file_fingerprint(graph)
    found = set()
    for text in ("a", "b"):
        weights.write_text(text)
        found.add(file_fingerprint(graph))
    graph.write_text("<net></net>")
    found.add(file_fingerprint(graph))
    assert {len(digits) for digits in found} == {16} and len(found) == 3


def test_openvino_wants_its_suffix(prepared, tmp_path):
    with pytest.raises(ValueError, match=r"path: wanted a file \*\.xml, got .*model\.onnx"):
        export_openvino(prepared, torch.zeros(2, 1, 8, 8), tmp_path / "model.onnx")
