"""verify: its numbers on a case worked by hand, and on a wrong export."""

import json
import sys

import pytest
import torch
from networks import build, images, settle
from testing import tensor
from torch import nn

import divqat
from divqat.export import export_onnx, verify

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Added(nn.Module):
    """Logits: the three channels of a 1x1 image, plus an offset."""

    def __init__(self, offset):
        super().__init__()
        self.offset = nn.Parameter(tensor(offset))

    def forward(self, x):
        return x.flatten(1) + self.offset


@pytest.fixture
def flatten(tmp_path):
    """An ONNX model whose logits are the three channels themselves."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["logits"])],
        "flatten",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 1, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
    )
    path = tmp_path / "flatten.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_numbers_worked_by_hand(flatten, batch_size):
    # 0 -> -1, 255 -> 1, 153 -> 0.2: logits of the runtime, then those of the model (0.5 on the
    # third): classes 0, 1, 0, 2 against 0, 1, 2, 2.
    pixels = [[255, 0, 0], [0, 255, 0], [153, 0, 127], [0, 0, 255]]
    uint8 = torch.tensor(pixels, dtype=torch.uint8).view(4, 3, 1, 1)
    labels = torch.tensor([0, 2, 2, 2])
    report = verify(Added([0.0, 0.0, 0.5]), flatten, uint8, labels, batch_size=batch_size)
    assert (report.n, report.argmax_agreement) == (4, 0.75)
    assert (report.accuracy_fake, report.accuracy_onnx) == (0.75, 0.5)
    assert report.max_diff == pytest.approx(0.5, rel=1e-6)
    assert report.mean_diff == pytest.approx(0.5 / 3, rel=1e-6)
    assert report.step == pytest.approx(2.5 / 255, rel=1e-6)  # the model's logits: -1 … 1.5
    assert report.max_diff_steps == pytest.approx(51.0, rel=1e-5)
    json.dumps(report.to_dict(), allow_nan=False)
    assert "75.00%" in str(report) and report.runtime in str(report)


@pytest.mark.slow
def test_an_export_agrees_and_that_of_another_model_does_not(tmp_path):
    prepared = settle(divqat.prepare(build("residual"), "x86", images()), 10)
    prepared.conv1.bn.eval()
    modes = [module.training for module in prepared.modules()]
    export_onnx(prepared, images(), tmp_path / "model.onnx")
    pictures = ((images(128, seed=9).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        labels = prepared.eval()(pictures.float() / 127.5 - 1).argmax(1)
    for module, mode in zip(prepared.modules(), modes, strict=True):
        module.training = mode

    report = verify(prepared, tmp_path / "model.onnx", pictures, labels)
    assert [module.training for module in prepared.modules()] == modes
    assert report.accuracy_fake == 1 and report.argmax_agreement == report.accuracy_onnx >= 0.98
    assert report.mean_diff < report.step

    other = settle(divqat.prepare(build("residual", seed=5), "x86", images()), 10)
    report = verify(other, tmp_path / "model.onnx", pictures, labels)
    assert report.argmax_agreement < 0.9 and report.mean_diff > report.step
    assert report.accuracy_onnx >= 0.98  # whatever model it is compared with


def test_errors(flatten, tmp_path, monkeypatch):
    model, labels = Added([0.0, 0.0, 0.0]), torch.zeros(2, dtype=torch.int64)
    uint8 = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="wanted the same number of both, at least 1, got 2 and 1"):
        verify(model, flatten, uint8, labels[:1])
    with pytest.raises(ValueError, match="got 0 and 0"):
        verify(model, flatten, uint8[:0], labels[:0])
    with pytest.raises(FileNotFoundError, match=r"no ONNX file at .*absent\.onnx"):
        verify(model, tmp_path / "absent.onnx", uint8, labels)
    with pytest.raises(TypeError, match="uint8"):
        verify(model, flatten, uint8.float(), labels)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ImportError, match=r"onnxruntime is missing: pip install 'divqat\[export\]'"
    ):
        verify(model, flatten, uint8, labels)
