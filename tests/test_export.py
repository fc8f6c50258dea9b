"""export_onnx: what the file holds, and that ONNX Runtime computes the converted model with it."""

import copy
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Net, build, conv, images, quantized, settle
from torch import nn
from torch.nn import functional as F

import divqat
from divqat import models
from divqat.data import load, to_float
from divqat.export import export_onnx, verify
from divqat.export.saturation import saturating
from divqat.nn._layer import QuantLayer
from divqat.quantize.deployed import IntegerLayer
from divqat.victim.runners import open_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
numpy_helper = onnx.numpy_helper
pytestmark = pytest.mark.usefixtures("one_thread")

LAYER_OPS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
INT8, UINT8, INT32 = (getattr(onnx.TensorProto, name) for name in ("INT8", "UINT8", "INT32"))


def run(path, x):
    (output,) = open_onnx(path).run(["logits"], {"images": x.numpy()})
    return torch.from_numpy(output)


class Exported:
    """A prepared network, its converted form, and its export; ``x`` are images for it."""

    def __init__(self, path, prepared, x):
        self.path, self.prepared, self.x = path, prepared, x
        self.converted = divqat.convert(prepared)
        self.report = export_onnx(prepared, x, path)
        self.graph = onnx.load(self.path).graph
        self.initializers = {i.name: i for i in self.graph.initializer}
        self.maker = {output: node for node in self.graph.node for output in node.output}

    def constant(self, name):
        return numpy_helper.to_array(self.initializers[name])


def settled(path, name, config="x86", shrink=1.0):
    """A hand-written network."""
    prepared = settle(divqat.prepare(build(name), config, images()), 10)
    for quantizer in list(prepared.fake_quantize.children())[1:]:  # all but the input
        quantizer.running_min.mul_(shrink)
        quantizer.running_max.mul_(shrink)
    return Exported(path, prepared, images(256, seed=9))


def trained(path, name, preset):
    """A built-in network that has learned the digits."""
    torch.manual_seed(0)
    digits = load("digits")
    net = models.build(name, in_channels=1, num_classes=10, image_size=8)
    x, labels = to_float(digits.train.images), digits.train.labels
    prepared = divqat.prepare(net, preset, x[:64])
    optimizer = torch.optim.SGD(prepared.parameters(), 0.05, momentum=0.9, nesterov=True)
    for step in range(60):
        some = torch.arange(64 * step, 64 * (step + 1)) % len(x)
        loss = nn.functional.cross_entropy(prepared(x[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Exported(path, prepared, to_float(digits.test.images))


TRAINED = [
    ("lenet", "qnnpack"),
    ("vgg_small", "x86"),
    ("resnet20", "qnnpack"),
    ("mobilenetv2_small", "x86"),
]


@pytest.fixture(scope="module", params=[("concat_hardswish",), *TRAINED], ids="-".join)
def exported(request, one_thread, tmp_path_factory):
    make = settled if len(request.param) == 1 else trained
    return make(tmp_path_factory.mktemp("export") / "model.onnx", *request.param)


@pytest.mark.slow
def test_every_layer_runs_in_int8(exported):
    report = exported.report
    layers = [m for m in exported.prepared.modules() if isinstance(m, QuantLayer)]
    assert report.layers == report.int8_layers == len(layers) and report.float_layers == 0
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(report.kernels)
    assert report.path == exported.path and report.bytes == exported.path.stat().st_size
    assert report.runtime == onnxruntime.__version__
    assert f"{len(layers)} of {len(layers)} convolutions and matrix products run in int8" in str(
        report
    )
    assert report.to_dict()["path"] == exported.path.name


def test_weights_are_stored_as_int8_and_biases_as_int32(exported):
    """Through the Q/DQ nodes of each layer, and with the converted model's very integers."""
    onnx.checker.check_model(onnx.load(exported.path), full_check=True)
    weights, biases = [], []
    for node in exported.graph.node:
        if node.op_type not in LAYER_OPS:
            continue
        x, weight, bias = (exported.maker[name] for name in node.input)
        while x.op_type in ("Flatten", "Reshape", "MaxPool"):
            x = exported.maker[x.input[0]]
        assert {x.op_type, weight.op_type, bias.op_type} == {"DequantizeLinear"}
        assert exported.initializers[weight.input[0]].data_type == INT8
        assert exported.initializers[bias.input[0]].data_type == INT32
        # An integer kernel accumulates on this scale and no other.
        product = exported.constant(x.input[1]) * exported.constant(weight.input[1])
        np.testing.assert_allclose(exported.constant(bias.input[1]), product, rtol=1e-6)
        weights.append(exported.constant(weight.input[0]))
        biases.append(exported.constant(bias.input[0]))
    integers = [m for m in exported.converted.modules() if isinstance(m, IntegerLayer)]
    assert len(weights) == len(integers)

    def total(arrays):  # in any order
        return sorted(hash(np.ascontiguousarray(a).tobytes()) for a in arrays)

    assert total(weights) == total(m.weight.numpy() for m in integers)
    assert total(biases) == total(m.bias.numpy() for m in integers)
    floats = sum(np.prod(i.dims) for i in exported.graph.initializer if i.data_type == 1)
    assert floats < sum(w.size for w in weights) / 10  # scales only; no float copy of a weight


def test_nothing_shows_where_files_are_on_this_machine(exported):
    content = exported.path.read_bytes()
    for folder in (Path(divqat.__file__).parent, Path(torch.__file__).parent, Path.cwd()):
        assert str(folder).encode() not in content


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_any_batch_size(exported, batch):
    x = exported.x[:64]
    assert torch.equal(run(exported.path, x[:batch]), run(exported.path, x)[:batch])


def test_computes_the_converted_model(exported):
    x = exported.x[:256]
    with torch.no_grad():
        expected = exported.converted(x)
    actual = run(exported.path, x)
    error = (actual - expected).square().mean().sqrt() / expected.std()
    assert error < 0.1
    top = expected.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 0.1 * expected.std()
    assert clear.sum() > 100
    same = actual.argmax(1) == expected.argmax(1)
    assert same[clear].float().mean() >= 0.99


def test_default_options_change_nothing(exported):
    """They would let 8-bit weights saturate on a CPU without VNNI, see test_saturation.py."""
    x = exported.x[:256]
    (default,) = open_onnx(exported.path, precise=False).run(["logits"], {"images": x.numpy()})
    assert torch.equal(torch.from_numpy(default), run(exported.path, x))
    assert exported.report.saturating == () and saturating(exported.path) == []


@pytest.mark.slow
@pytest.mark.parametrize("exported", TRAINED, indirect=True, ids="-".join)
def test_a_default_session_answers_as_the_trained_network_does(exported):
    test = load("digits").test
    report = verify(exported.prepared, exported.path, test, test.labels)
    assert report.n == 359 and report.accuracy_fake > 0.9
    assert report.argmax_agreement >= 0.995 and not report.saturating


def test_every_weight_has_its_own_zero_point(exported):
    points = [
        node.input[2]
        for node in exported.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in exported.initializers
    ]
    assert len(points) == len(set(points)) >= exported.report.layers
    assert not any(exported.constant(name).any() for name in points)


@pytest.mark.slow
def test_narrow_activations_are_clipped_codes(tmp_path):
    config = divqat.preset("x86", weight_bits=4, activation_bits=4)
    path = tmp_path / "model.onnx"
    exported = settled(path, "concat_hardswish", config, shrink=0.3)  # values beyond the grid
    model = onnx.load(exported.path)
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    clips = [node for node in clips if exported.maker[node.input[0]].op_type == "QuantizeLinear"]
    assert len(clips) == len(list(exported.prepared.fake_quantize.children())) - 1  # not the input
    for node in clips:
        model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], UINT8, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = images(64, seed=9)
    logits, *codes = session.run(None, {"images": x.numpy()})
    assert {(int(c.min()), int(c.max())) for c in codes} >= {(0, 15)}
    assert all(c.max() <= 15 for c in codes)
    with torch.no_grad():
        expected = exported.converted(x)
    for actual in (torch.from_numpy(logits), run(exported.path, x)):
        error = (actual - expected).square().mean().sqrt() / expected.std()
        assert error < 0.2  # a step is 1/15 of a range: one tipped value shows
        assert (actual.argmax(1) == expected.argmax(1)).float().mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tensorrt", "qnnpack"])
def test_other_presets_and_that_export_is_silent_and_leaves_the_model_alone(
    tmp_path, capfd, preset
):
    prepared = settle(divqat.prepare(build("concat_hardswish"), preset, images()), 10)
    before = {k: v.clone() for k, v in prepared.state_dict().items() if torch.is_tensor(v)}
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if preset == "tensorrt":  # of 8 bits, as is said elsewhere
            warnings.filterwarnings("ignore", ".+can saturate on x86 CPUs", UserWarning)
        exported = Exported(tmp_path / "deep" / "model.onnx", prepared, images(64, seed=9))
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["model.onnx"]
    assert prepared.training
    for key, value in before.items():
        assert torch.equal(prepared.state_dict()[key], value)

    codes = [node for node in exported.graph.node if node.op_type == "QuantizeLinear"]
    kind = INT8 if preset == "tensorrt" else UINT8
    assert {exported.initializers[node.input[2]].data_type for node in codes} == {kind}
    zero_points = {int(exported.constant(node.input[2])) for node in codes}
    assert zero_points == {0} if preset == "tensorrt" else len(zero_points) > 1
    with torch.no_grad():
        expected = exported.converted(exported.x)
    error = (run(exported.path, exported.x) - expected).square().mean().sqrt()
    assert error / expected.std() < 0.05

    if preset == "tensorrt":  # biases stay float: it takes no int32 through DequantizeLinear
        kinds = [
            exported.initializers[node.input[0]].data_type
            for node in exported.graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in exported.initializers
        ]
        assert kinds == [INT8] * 5
        for name, layer in quantized(prepared).items():
            torch.testing.assert_close(
                exported.converted.get_submodule(name).bias, layer.folded()[1], rtol=0, atol=0
            )


@pytest.mark.slow
def test_swapped_model_exports_too(tmp_path):
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = conv(3, 8), nn.Linear(8, 5)

        def forward(self, x):
            if isinstance(x, torch.fx.Proxy):
                raise TypeError("not to be traced")
            return self.head(self.conv(x).relu().mean((2, 3)))

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="not to be traced"):
        prepared = divqat.prepare(Swapped(), "x86", images())
    settle(prepared, 5)
    report = export_onnx(prepared, images(), tmp_path / "swapped.onnx")
    assert report.layers == 2 and report.int8_layers >= 1
    x = images(64, seed=9)
    with torch.no_grad():
        expected = prepared.eval()(x)
    assert (run(report.path, x) - expected).square().mean().sqrt() / expected.std() < 0.02


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.+can saturate on x86 CPUs:UserWarning")
@pytest.mark.filterwarnings("error:.+as ONNX Runtime could not open the file:UserWarning")
@pytest.mark.parametrize("bits", [7, 8])
def test_a_layer_that_is_called_twice_keeps_its_bias(tmp_path, bits):
    """Its calls read activations of different scales, and an integer bias has one scale. Each call
    has the weight for itself: ONNX Runtime shifts one of 8 bits once."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layer(self.layer(x).relu()).relu())

    torch.manual_seed(1)
    net = Twice()
    with torch.no_grad():
        net.layer.bias.copy_(torch.linspace(0.5, 1.5, 8))
    x = 20 * torch.randn(256, 8)
    prepared = divqat.prepare(net, divqat.preset("x86", weight_bits=bits), x)
    prepared(x)
    converted = divqat.convert(prepared)
    assert torch.equal(converted.layer.bias, net.layer.bias)
    report = export_onnx(prepared, x, tmp_path / "twice.onnx")
    calls = report.int8_layers + report.float_layers
    assert report.layers == 2 and calls == 3
    assert f"{report.int8_layers} of 3 convolutions and matrix products run in int8" in str(report)
    with torch.no_grad():
        expected = prepared.eval()(x)
    step = (expected.max() - expected.min()) / 255
    assert (run(report.path, x) - expected).abs().max() < step
    graph = onnx.load(report.path).graph
    constants = {constant.name for constant in graph.initializer}
    readers = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    weights = [node.input[0] for node in readers if node.input[0] in constants]
    assert len(weights) == len(set(weights)) == 4  # three weights, and one integer bias


POOLS = {
    "avg": nn.AvgPool2d(2),
    "avg, padded": nn.AvgPool2d(3, 2, 1),
    "avg, padding left out": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "avg, over the edge": nn.AvgPool2d(5, 5, ceil_mode=True),
    "avg, over the edge by less": nn.AvgPool2d(3, 2, ceil_mode=True),
    "avg, padding left out, over the edge": nn.AvgPool2d(
        3, 2, 1, ceil_mode=True, count_include_pad=False
    ),
    "avg, oblong": nn.AvgPool2d((2, 3), (2, 1)),
    "avg, as a function": lambda x: F.avg_pool2d(x, 5, 5, ceil_mode=True),
    "global avg": nn.AdaptiveAvgPool2d(1),
    "adaptive avg": nn.AdaptiveAvgPool2d(3),
    "uneven adaptive avg": nn.AdaptiveAvgPool2d(5),
    "mean": lambda x: x.mean((2, 3)),
    "mean of rows": lambda x: x.mean(2),
    "max": nn.MaxPool2d(2),
    "max, over the edge": nn.MaxPool2d(5, 5, 1, ceil_mode=True),
    "max, dilated": nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=True),
    "global max": nn.AdaptiveMaxPool2d(1),
    "adaptive max": nn.AdaptiveMaxPool2d(3),
    "amax": lambda x: x.amax((2, 3)),
    "norm": nn.LPPool2d(2, 2),
}


@pytest.mark.slow
def test_every_kind_of_pooling_is_right_in_a_default_session(tmp_path):
    """All of them side by side, so that no other layer hides what one does."""
    sizes = []

    def forward(net, x):
        y = net.conv(x)
        parts = [
            (getattr(net, f"pool{i}") if isinstance(pool, nn.Module) else pool)(y).flatten(1)
            for i, pool in enumerate(POOLS.values())
        ]
        if not isinstance(y, torch.fx.Proxy):
            sizes[:] = [part.shape[1] for part in parts]
        return torch.cat(parts, 1)

    modules = {f"pool{i}": p for i, p in enumerate(POOLS.values()) if isinstance(p, nn.Module)}
    torch.manual_seed(0)
    net = Net(forward, conv=conv(3, 4), **modules)
    net(images())
    prepared = settle(divqat.prepare(net, "x86", images()), 3)
    export_onnx(prepared, images(), tmp_path / "pools.onnx")
    x = images(64, seed=9)
    with torch.no_grad():
        expected = prepared.eval()(x)
    (output,) = open_onnx(tmp_path / "pools.onnx", precise=False).run(None, {"images": x.numpy()})
    difference = (torch.from_numpy(output) - expected).abs().split(sizes, 1)
    # Each value may be rounded to another step once before the pooling and once after it.
    steps = 2 * max(float(quantizer.scale) for quantizer in prepared.fake_quantize.children())
    wrong = {n: float(d.max()) for n, d in zip(POOLS, difference, strict=True) if d.max() > steps}
    assert wrong == {}


@pytest.mark.parametrize(
    ("pool", "error", "message"),
    [
        (
            nn.AvgPool2d(3, 2, 1, ceil_mode=True),
            ValueError,
            "pool: count_include_pad: wanted False in an average pooling with ceil_mode",
        ),
        (
            nn.AvgPool2d(2, divisor_override=3),
            ValueError,
            "pool: divisor_override: wanted None, .* got 3",
        ),
        (nn.AdaptiveMaxPool2d(5), RuntimeError, "torch.onnx.export failed: .*adaptive_max_pool2d"),
    ],
)
def test_a_pooling_that_would_be_another_one_is_refused(tmp_path, pool, error, message):
    net = Net(lambda net, x: net.pool(net.conv(x)).flatten(1), conv=conv(3, 2), pool=pool)
    prepared = settle(divqat.prepare(net, "x86", images()), 1)
    with pytest.raises(error, match=message):
        export_onnx(prepared, images(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("broken", "old"),
    [
        ("torch.onnx.export", None),
        ("torch.onnx.export", b"the old model"),
        ("divqat.export.onnx.runtime_kernels", b"the old model"),
    ],
)
def test_failure_leaves_nothing_half_written(tmp_path, monkeypatch, broken, old):
    prepared = settle(divqat.prepare(build("residual"), "x86", images()), 1)
    path = tmp_path / "model.onnx"
    if old is not None:
        path.write_bytes(old)

    def fail(*args, **kwargs):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(broken, fail)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        export_onnx(prepared, images(), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if old is None else [old])


def test_a_file_that_onnxruntime_cannot_load_is_refused(tmp_path):
    from divqat.export.onnx import runtime_kernels

    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(RuntimeError, match=r"ONNX Runtime cannot load .*bad\.onnx"):
        runtime_kernels(tmp_path / "bad.onnx")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_named(tmp_path, monkeypatch, name):
    prepared = settle(divqat.prepare(build("residual"), "x86", images()), 1)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name} is missing: pip install 'divqat\[export\]'"):
        export_onnx(prepared, images(), tmp_path / "model.onnx")


def test_uncalibrated_model_is_refused(tmp_path):
    prepared = divqat.prepare(build("residual"), "x86", images())
    with pytest.raises(ValueError, match="has not seen a batch"):
        export_onnx(prepared, images(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_cast_model_is_exported_with_a_float32_example(tmp_path):
    """What is written is the converted model, whose tensors are those of one that was not cast."""
    x = torch.rand(2, 3, 6, 6)
    model = divqat.prepare(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), "x86", x)
    model(x)
    wanted = {name: value.dtype for name, value in divqat.convert(model).state_dict().items()}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = copy.deepcopy(model).to(dtype)
        with pytest.raises(TypeError, match="example_input: wanted float32"):
            export_onnx(cast, x.to(dtype), tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())
        converted = divqat.convert(cast)
        assert {n: value.dtype for n, value in converted.state_dict().items()} == wanted
        assert converted(x).dtype == torch.float32
    export_onnx(cast, x, tmp_path / "model.onnx")
