"""Opsets 13 to 21 and INT4: the same answers in ONNX Runtime, in valid files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import Net, build, conv, images, settle
from torch import nn
from torch.nn import functional as F

import divqat
from divqat.export import InputMetadata, export_onnx, verify
from divqat.export.opset import set_opset

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("one_thread")

PICTURES = torch.randint(0, 256, (32, 3, 12, 12), generator=torch.Generator().manual_seed(1)).byte()


@pytest.fixture(scope="module")
def model():
    """A network with a reduction, whose axes are an input since opset 18, in 4 bits but for the
    first layer."""
    bits = {"conv1": 8, "conv2": 4, "head": 3}
    config = replace(divqat.preset("x86"), layer_bits=bits)
    return settle(divqat.prepare(build("residual"), config, images()), 5).eval()


def answers(path):
    x = images(16, seed=3).numpy()
    return onnxruntime.InferenceSession(path).run(None, {"images": x})[0]


@pytest.fixture(scope="module")
def usual(model, one_thread, tmp_path_factory):
    path = tmp_path_factory.mktemp("opset") / "usual.onnx"
    return path, export_onnx(model, images(), path)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [13, *range(14, 22)])
def test_every_opset_has_the_same_answers_and_kernels(model, usual, opset, tmp_path):
    report = export_onnx(model, images(), tmp_path / "model.onnx", opset=opset)
    proto = onnx.load(report.path)
    onnx.checker.check_model(proto, full_check=True)
    assert [e.version for e in proto.opset_import if e.domain == ""] == [opset] == [report.opset]
    np.testing.assert_array_equal(answers(report.path), answers(usual[0]))
    assert report.kernels == usual[1].kernels


def test_the_normalization_is_written_in_the_oldest_opset(model, tmp_path):
    declared = InputMetadata(dtype="uint8")
    path = tmp_path / "model.onnx"
    export_onnx(model, images(), path, metadata=declared, opset=13)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    report = verify(model, path, PICTURES, torch.zeros(32, dtype=torch.int64))
    assert report.least_agreement > 0.96


@pytest.mark.parametrize("opset, error", [(12, ValueError), (22, ValueError), (20.0, TypeError)])
def test_opsets_out_of_range_are_refused(model, opset, error, tmp_path):
    with pytest.raises(error, match="opset: wanted"):
        export_onnx(model, images(), tmp_path / "model.onnx", opset=opset)


def test_an_operator_that_is_newer_is_refused_by_name(tmp_path):
    def forward(net, x):
        return net.head(F.hardswish(net.conv1(x)).mean((2, 3)))

    net = Net(forward, conv1=conv(3, 4), head=nn.Linear(4, 5))
    prepared = settle(divqat.prepare(net, "x86", images()), 2)
    with pytest.raises(ValueError, match=r"opset: HardSwish .* 13: it came with opset 14"):
        export_onnx(prepared, images(), tmp_path / "model.onnx", opset=13)
    assert not (tmp_path / "model.onnx").exists()


def test_an_attribute_that_is_newer_is_refused_by_name(usual):
    """AveragePool has dilations since opset 19."""
    proto = onnx.load(usual[0])
    pool = next(node for node in proto.graph.node if node.op_type == "AveragePool")
    pool.attribute.append(onnx.helper.make_attribute("dilations", [2, 2]))
    with pytest.raises(ValueError, match=r"AveragePool .* 18: it has no dilations=\[2, 2\]"):
        set_opset(proto, 18)


def test_int4_holds_the_same_weights_in_half_the_bytes(model, usual, tmp_path):
    report = export_onnx(model, images(), tmp_path / "packed.onnx", pack_int4=True)
    proto = onnx.load(report.path)
    onnx.checker.check_model(proto, full_check=True)
    assert report.opset == 21 and report.packed == 2 and report.saved > 0
    assert "2 weights in INT4 save" in str(report)
    packed, plain = weights(proto), weights(onnx.load(usual[0]))
    assert packed.keys() == plain.keys() == {"conv1.weight", "conv2.weight", "head.weight"}
    for name in plain:
        np.testing.assert_array_equal(packed[name], plain[name])
    kinds = {
        i.name: (i.data_type, len(i.raw_data) or len(i.int32_data)) for i in proto.graph.initializer
    }
    assert kinds["conv2.weight"] == (onnx.TensorProto.INT4, 8 * 8 * 9 // 2)
    assert kinds["conv1.weight"][0] == onnx.TensorProto.INT8
    step = np.ptp(answers(usual[0])) / 255  # float kernels round at other points
    np.testing.assert_allclose(answers(report.path), answers(usual[0]), atol=4 * step)


def weights(proto):
    """The weights in float64, by the definition of DequantizeLinear."""
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0].endswith(".weight"):
            codes, scale = (constants[name].astype(np.float64) for name in node.input[:2])
            found[node.input[0]] = codes * scale.reshape(-1, *[1] * (codes.ndim - 1))
    return found


def test_int4_needs_narrow_weights_and_opset_21(model, tmp_path):
    wide = settle(divqat.prepare(build("residual"), "x86", images()), 2)
    with pytest.raises(ValueError, match="pack_int4: wanted a model with weights of at most 4"):
        export_onnx(wide, images(), tmp_path / "model.onnx", pack_int4=True)
    with pytest.raises(ValueError, match="pack_int4: wanted opset 21, which has INT4, got 20"):
        export_onnx(model, images(), tmp_path / "model.onnx", opset=20, pack_int4=True)
