"""Victims that are ONNX files."""

import sys

import pytest
import torch
from testing import randn

from divqat.victim import Victim

IMAGES = randn(5, 1, 2, 2)


def linear_onnx(path, batch, size=2):
    """y = flatten(x) @ W with four classes, as an ONNX file; returns W."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weight = randn(size * size, 4)
    float_type = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("image", float_type, [batch, 1, size, size])],
        [helper.make_tensor_value_info("logits", float_type, [batch, 4])],
        [numpy_helper.from_array(weight.numpy(), "weight")],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return weight


@pytest.mark.parametrize("batch", ["batch", None, 1, 2, 8])
def test_onnx_with_fixed_or_dynamic_batch(tmp_path, batch):
    weight = linear_onnx(tmp_path / "model.onnx", batch)
    victim = Victim(str(tmp_path / "model.onnx"), batch_size=3)
    torch.testing.assert_close(victim(IMAGES), (IMAGES.flatten(1) @ weight).softmax(1))
    assert victim.queries == 5


def test_onnx_session(tmp_path):
    linear_onnx(tmp_path / "model.onnx", "batch")
    import onnxruntime

    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    assert torch.equal(Victim(session)(IMAGES), Victim(tmp_path / "model.onnx")(IMAGES))


def test_a_file_that_opens_only_with_saturating_sums_is_used_with_a_warning(tmp_path, monkeypatch):
    linear_onnx(tmp_path / "model.onnx", "batch")
    expected = Victim(tmp_path / "model.onnx")(IMAGES)
    import onnxruntime

    class Picky(onnxruntime.InferenceSession):
        def __init__(self, path, options=None, **rest):
            if "disabled_optimizers" in rest:
                raise RuntimeError("Attempt to replace the existing tensor")
            super().__init__(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Picky)
    with pytest.warns(UserWarning, match=r"may saturate on this CPU.*precision .*: Attempt"):
        victim = Victim(tmp_path / "model.onnx")
    assert torch.equal(victim(IMAGES), expected)


def test_onnx_shape_is_checked(tmp_path):
    linear_onnx(tmp_path / "model.onnx", "batch")
    victim = Victim(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"'image' wants \['batch', 1, 2, 2\], got \[1, 1, 4, 4\]"):
        victim(torch.zeros(1, 1, 4, 4))
    assert victim.queries == 0


def test_onnx_input_is_checked():
    class Session:
        def get_inputs(self):
            return [
                type("Input", (), {"name": "x", "type": "tensor(int64)", "shape": [1, 1, 2, 2]})
            ]

        get_outputs = get_inputs
        run = None

    with pytest.raises(ValueError, match=r"one ONNX input, float .* x: tensor\(int64\)"):
        Victim(Session())


def test_missing_onnx_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        Victim(tmp_path / "absent.onnx")


def test_missing_onnxruntime(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"divqat\[export\]"):
        Victim(tmp_path / "model.onnx")
