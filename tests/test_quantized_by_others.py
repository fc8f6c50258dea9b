"""Models that other tools quantized are victims as they are."""

import numpy as np
import pytest
import torch
from networks import images
from torch import nn

from divqat.data import to_float
from divqat.metrics import fidelity, predict
from divqat.victim import Victim

pytestmark = pytest.mark.usefixtures("one_thread")

PICTURES = torch.randint(0, 256, (32, 3, 12, 12), generator=torch.Generator().manual_seed(1)).byte()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    ).eval()


@pytest.mark.slow
def test_qdq_files_of_onnx_runtime(tmp_path):
    """The oracle is ONNX Runtime itself."""
    onnxruntime = pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    pytest.importorskip("onnxscript")
    model, batch = network(), torch.export.Dim("batch")
    program = torch.onnx.export(
        model, (images(2),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False,
        input_names=["pixels"],
    )  # fmt: skip
    program.save(tmp_path / "float.onnx")

    class Reader(quantization.CalibrationDataReader):
        left = iter([{"pixels": images(64).numpy()}])

        def get_next(self):
            return next(self.left, None)

    path = tmp_path / "static.onnx"
    quantization.quantize_static(tmp_path / "float.onnx", path, Reader())
    x = to_float(PICTURES)
    (logits,) = onnxruntime.InferenceSession(path).run(None, {"pixels": x.numpy()})
    np.testing.assert_allclose(Victim(path)(x), torch.from_numpy(logits).softmax(1), atol=0.02)
    assert fidelity(predict(path, PICTURES), predict(model, PICTURES)) > 0.7


def test_an_export_in_training_mode_is_refused():
    model = nn.Sequential(network(), nn.Dropout())
    for mode in (False, True):
        exported = torch.export.export(model.train(mode), (images(2),)).module()
        if not mode:
            assert Victim(exported)(to_float(PICTURES[:2])).shape == (2, 5)
            continue
        with pytest.raises(ValueError, match="wanted an export of a model in eval mode, got 'drop"):
            Victim(exported)


@pytest.mark.slow
def test_pt2e_models_of_torchao():
    """The oracle is the model itself, called directly."""
    convert = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model, batch = network(), torch.export.Dim("batch")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    exported = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},)).module()
    prepared = convert.prepare_pt2e(exported, quantizer)
    prepared(images(64))
    converted = convert.convert_pt2e(prepared)
    x = to_float(PICTURES)
    victim = Victim(converted, query_budget=40)
    with torch.no_grad():
        torch.testing.assert_close(victim(x), converted(x).softmax(1))
    assert victim.remaining == 8
    assert fidelity(predict(converted, PICTURES), predict(model, PICTURES)) > 0.7
