"""Weights that no CPU saturates, and what a CPU without VNNI makes of others, emulated."""

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Net, build, conv, images, settle
from testing import randn
from torch import nn

import divqat
from divqat.export import export_onnx, verify
from divqat.export.saturation import emulated_session, saturating
from divqat.nn.spec import WEIGHT
from divqat.quantize.deployed import IntegerLayer
from divqat.train import TrainConfig
from divqat.victim.runners import open_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
SATURATES = "avx2" in CPU and "vnni" not in CPU
may_saturate = pytest.mark.filterwarnings("ignore:.+can saturate on x86 CPUs:UserWarning")


def answers(session, x):
    (output,) = session.run(None, {"images": x.numpy()})
    return torch.from_numpy(output)


def large(model):
    """``model`` with weights that are all nearly as large as the largest of them."""
    with torch.no_grad():
        for seed, module in enumerate(model.modules()):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                weight = module.weight
                size = 1 + randn(*weight.shape, seed=seed).abs().clamp(max=1)
                weight.copy_(weight.sign() * size * weight.abs().mean())
    return model


def exported(model, path, config, batches=2):
    prepared = settle(divqat.prepare(model, config, images()), batches)
    return prepared, export_onnx(prepared, images(), path)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", ["x86", "qnnpack"])
def test_no_two_products_with_weights_of_up_to_seven_bits_leave_sixteen(name, bits):
    prepared = divqat.prepare(build("residual"), divqat.preset(name, weight_bits=bits), images())
    converted = divqat.convert(settle(prepared, 1))
    layers = [module for module in converted.modules() if isinstance(module, IntegerLayer)]
    largest = max(int(layer.weight.int().abs().max()) for layer in layers)
    assert len(layers) == 3 and (2 * 255 * largest <= 32767) == (bits < 8)


def test_seven_bits_are_the_default_everywhere_but_for_gpus():
    assert WEIGHT.bits == divqat.QuantConfig().weight.bits == divqat.QuantConfig().edge().bits == 7
    assert divqat.nn.QuantConv2d(1, 1, 1).weight_spec.bits == 7
    for name, bits in (("x86", 7), ("qnnpack", 7), ("tensorrt", 8)):
        assert divqat.preset(name).weight.bits == TrainConfig(preset=name).weight_bits == bits


def saturated_sum(x, weight):
    """Σ of the products of two rows of integers, two neighbours at a time in 16 bits."""
    total = 0
    for k in range(0, len(x), 2):
        pair = sum(int(a) * int(b) for a, b in zip(x[k : k + 2], weight[k : k + 2], strict=True))
        total += min(max(pair, -32768), 32767)
    return total


def expected_conv(x, weight, point, *, stride=1, padding=0, groups=1):
    """A convolution of uint8 codes, [C, H, W] → [C_out, H', W'], over images of channels last."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)), constant_values=point)
    outputs, inputs, height, width = weight.shape
    rows = range(0, x.shape[1] - height + 1, stride)
    columns = range(0, x.shape[2] - width + 1, stride)
    result = np.zeros((outputs, len(rows), len(columns)))
    for o, (i, row), (j, column) in itertools.product(
        range(outputs), enumerate(rows), enumerate(columns)
    ):
        first = o // (outputs // groups) * inputs
        part = x[first : first + inputs, row : row + height, column : column + width]
        values, factors = (a.transpose(1, 2, 0).ravel() for a in (part, weight[o]))
        result[o, i, j] = saturated_sum(values, factors) - point * factors.astype(int).sum()
    return result


def one_layer(path, kind, weight, point, **attributes):
    """images → Q → DQ → a layer of int8 ``weight``, all scales 1 → Q → DQ → logits."""
    helper, types = onnx.helper, onnx.TensorProto
    shape = ["n", weight.shape[1] * attributes.get("group", 1), 5, 5][: weight.ndim]
    constants = {
        "one": np.float32(1), "point": np.uint8(point), "zero": np.int8(0), "weight": weight,
        "step": np.float32(1024), "middle": np.uint8(128),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "one", "point"], ["codes"], "q"),
        helper.make_node("DequantizeLinear", ["codes", "one", "point"], ["x"], "dq"),
        helper.make_node("DequantizeLinear", ["weight", "one", "zero"], ["w"], "weights"),
        helper.make_node(kind, ["x", "w"], ["y"], "layer", **attributes),
        helper.make_node("QuantizeLinear", ["y", "step", "middle"], ["out"], "q2"),
        helper.make_node("DequantizeLinear", ["out", "step", "middle"], ["logits"], "dq2"),
    ]
    graph = helper.make_graph(
        nodes, "layer",
        [helper.make_tensor_value_info("images", types.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", types.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


LAYERS = {
    "even channels": ("Conv", (16, 4, 3, 3), dict(padding=1)),
    "odd channels": ("Conv", (3, 3, 3, 3), dict(stride=2)),
    "one channel": ("Conv", (2, 1, 3, 3), dict(padding=1)),
    "groups": ("Conv", (6, 2, 3, 3), dict(groups=3, padding=1)),
    "one channel of each group": ("Conv", (8, 1, 3, 3), dict(groups=4)),
    "linear": ("Gemm", (5, 9), {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_emulation_adds_neighbouring_products_in_sixteen_bits(tmp_path, name):
    kind, shape, options = LAYERS[name]
    generator = np.random.default_rng(0)
    weight = generator.choice([-127, -100, -20, 90, 127], shape).astype(np.int8)
    point, groups = 30, options.get("groups", 1)
    if kind == "Gemm":
        attributes, size = {"transB": 1}, (4, shape[1])
    else:
        padding = options.get("padding", 0)
        attributes = dict(group=groups, pads=[padding] * 4, strides=[options.get("stride", 1)] * 2)
        size = (2, shape[1] * groups, 5, 5)
    one_layer(tmp_path / "layer.onnx", kind, weight, point, **attributes)
    codes = generator.integers(0, 256, size).astype(np.uint8)
    codes[:, : shape[1] // 2] |= 192  # bright, so that many sums saturate
    if kind == "Gemm":
        wanted = np.array(
            [[saturated_sum(x, w) - point * w.astype(int).sum() for w in weight] for x in codes],
            dtype=np.float64,
        )
    else:
        wanted = np.stack([expected_conv(x, weight, point, **options) for x in codes])
    exact = without_saturation(kind, codes, weight, point, options)
    assert (exact != wanted).mean() > 0.1
    x = torch.from_numpy(codes.astype(np.float32) - point)
    (found,) = saturating(tmp_path / "layer.onnx")
    assert found.layer == "layer" and 32767 < found.largest <= 2 * 255 * 127
    grid = (torch.from_numpy(wanted) / 1024).round().clamp(-128, 127) * 1024
    # float32 is exact here: of |sums| below 2^24 one rounding is left, the same in both
    torch.testing.assert_close(
        answers(emulated_session(tmp_path / "layer.onnx"), x).double(), grid, rtol=0, atol=0
    )
    if SATURATES:
        default = answers(open_onnx(tmp_path / "layer.onnx", precise=False), x).double()
        torch.testing.assert_close(default, grid, rtol=0, atol=0)


def without_saturation(kind, codes, weight, point, options):
    """The same without saturation, by PyTorch in float64."""
    x, w = torch.from_numpy(codes).double() - point, torch.from_numpy(weight).double()
    y = nn.functional.linear(x, w) if kind == "Gemm" else nn.functional.conv2d(x, w, **options)
    return y.numpy()


def sequence():
    """A linear layer over a sequence is a MatMul, with an odd number of inputs."""

    def forward(net, x):
        y = net.conv(x).relu().flatten(2).transpose(1, 2)
        return net.head(net.layer(y).relu()).mean(1)

    return Net(forward, conv=conv(3, 7), layer=nn.Linear(7, 9, bias=False), head=nn.Linear(9, 3))


@pytest.mark.slow
@may_saturate
@pytest.mark.parametrize("preset", ["x86", "tensorrt"])
def test_emulation_of_a_network_is_what_such_a_cpu_answers(tmp_path, preset):
    config = divqat.preset(preset, weight_bits=8)
    exported(large(sequence()), tmp_path / "model.onnx", config)
    assert {each.layer for each in saturating(tmp_path / "model.onnx")} >= {"head"}
    x = images(64, seed=9)
    emulated = answers(emulated_session(tmp_path / "model.onnx"), x)
    precise = answers(open_onnx(tmp_path / "model.onnx"), x)
    default = answers(open_onnx(tmp_path / "model.onnx", precise=False), x)
    lost = (emulated - precise).square().mean()
    assert lost > 1e-6 * precise.var()
    nearer = emulated if SATURATES else precise
    assert (default - nearer).square().mean() < 0.01 * lost


@pytest.mark.slow
@may_saturate
def test_verify_finds_on_any_cpu_what_saturates(tmp_path):
    """A layer that adds two channels with large weights, so that nothing else can be right."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        net[0].weight.fill_(1).view(8, 3)[:, 2] = 0
        net[0].bias.fill_(2)
        net[3].weight.copy_(torch.tensor([[1.0] * 8, [1.0] * 4 + [0.0] * 4]))
        net[3].bias.copy_(torch.tensor([-10.0, 0.0]))
    x = torch.rand(256, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    uint8 = (255 * x).round().to(torch.uint8)
    batch = uint8.float() / 127.5 - 1
    config = divqat.preset("x86", weight_bits=8)
    prepared = divqat.prepare(net, config, batch)
    prepared(batch)
    with pytest.warns(UserWarning, match="saturate on x86 CPUs without VNNI.*weight_bits=7"):
        report = export_onnx(prepared, batch, tmp_path / "model.onnx")
    assert [each.layer for each in report.saturating] == ["0", "3"]
    assert "session.x64quantprecision" in str(report)
    labels = prepared.eval()(batch).argmax(1)
    assert 0.2 < labels.float().mean() < 0.8
    found = verify(prepared, tmp_path / "model.onnx", uint8, labels)
    assert found.precise.accuracy == found.precise.argmax_agreement > 0.97
    assert found.emulated.argmax_agreement == found.least_agreement < 0.9
    assert (
        found.argmax_agreement == (found.emulated if SATURATES else found.precise).argmax_agreement
    )
    assert "CPUs without VNNI (emulated): agreement" in str(found)
    assert "session.x64quantprecision: agreement" in str(found)

    seven = divqat.prepare(net, "x86", batch)
    seven(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert export_onnx(seven, batch, tmp_path / "seven.onnx").saturating == ()
    found = verify(seven, tmp_path / "seven.onnx", uint8, labels)
    assert found.saturating == () and found.precise is found.emulated is None
    assert found.least_agreement == found.argmax_agreement > 0.97
