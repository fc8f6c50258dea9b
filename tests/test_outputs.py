"""Victims that answer probabilities, whatever their resolution, and what looks like it."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing import randn
from torch import nn

from divqat.train.network import check_logits
from divqat.victim import Victim
from divqat.victim.runners import logits_function

SAID = "the model answers probabilities"
STEP = 0.00390241  # a scale that a calibration might find: near 1/256, and no round number


def rounded_to(dtype):
    return lambda p: p.to(dtype)


def codes(step, offset, dtype):
    return lambda p: (p / step).round().add(offset).clamp(*limits(dtype)).to(dtype)


def limits(dtype):
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


# How a softmax is released.
RESOLUTIONS = {
    "float64": rounded_to(torch.float64),
    "float32": rounded_to(torch.float32),
    "float16": rounded_to(torch.float16),
    "bfloat16": rounded_to(torch.bfloat16),
    "float16, cast back": lambda p: p.half().float(),
    "bfloat16, cast back": lambda p: p.bfloat16().float(),
    "computed in float16": lambda p: p.log().half().softmax(1),
    "computed in bfloat16": lambda p: p.log().bfloat16().softmax(1),
    **{f"{k} digits": lambda p, k=k: p.round(decimals=k) for k in range(1, 7)},
    "codes times a scale": lambda p: (p / STEP).round().clamp(max=255) * STEP,
    "7-bit codes times a scale": lambda p: (p * 127).round() / 127,
    "uint8 codes": codes(1 / 256, 0, torch.uint8),
    "uint8 codes, 255": codes(1 / 255, 0, torch.uint8),
    "int8 codes from -128": codes(1 / 256, -128, torch.int8),
    "int8 codes from 0": codes(1 / 127, 0, torch.int8),
}
resolutions = pytest.mark.parametrize("release", RESOLUTIONS.values(), ids=RESOLUTIONS.keys())


def answering(rows):
    """A model whose answers are given, image by image: an image holds its number."""
    return lambda images: rows[images[:, 0, 0, 0].long()]


def numbered(n):
    return torch.arange(n).float().view(n, 1, 1, 1)


@resolutions
@pytest.mark.parametrize(("classes", "sharpness"), [(2, 20.0), (3, 0.5), (10, 3.0), (1000, 3.0)])
def test_probabilities_of_any_resolution_are_taken_as_they_are(release, classes, sharpness):
    probs = (sharpness * randn(64, classes, seed=classes)).softmax(1)
    rows = release(probs)
    lowest = -128 if rows.dtype == torch.int8 and rows.min() < 0 else 0
    kept = (rows.double() > lowest).any(1)  # of others nothing is left
    rows, probs, n = rows[kept], probs[kept], int(kept.sum())
    if not n:
        return
    with pytest.warns(UserWarning, match=SAID) as said:
        answers = Victim(answering(rows), batch_size=16)(numbered(n))
    assert len(said) == 1  # in one line
    # Rows that lost their sum of 1 get it again; nothing else happens to them.
    wanted = rows.double() - lowest
    wanted = wanted / wanted.sum(1, keepdim=True)
    torch.testing.assert_close(answers.double(), wanted, rtol=1e-4, atol=1e-6)
    assert (answers.argmax(1) == wanted.argmax(1)).all()


@resolutions
def test_one_image_at_a_time(release):
    rows = release((3 * randn(32, 10)).softmax(1))
    with pytest.warns(UserWarning, match=SAID):
        apart = Victim(answering(rows), batch_size=1)(numbered(32))
    with pytest.warns(UserWarning, match=SAID):
        assert torch.allclose(apart, Victim(answering(rows))(numbered(32)))


@given(
    seed=st.integers(0, 2**31),
    classes=st.integers(2, 200),
    step=st.sampled_from([0.0, 0.001, 0.0078125, 0.05, 0.1]),
    relu=st.booleans(),
    n=st.integers(2, 9),
)
@settings(max_examples=150, deadline=None)
def test_logits_are_not_taken_for_probabilities(seed, classes, step, relu, n):
    logits = 4 * randn(n, classes, seed=seed)
    logits = logits.relu() + 0.7 if relu else logits
    logits = (logits / step).round() * step if step else logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits_function(lambda images: logits)(torch.zeros(n, 1, 1, 1)), logits)


def test_one_hot_rows_decide_nothing():
    rows = torch.cat([torch.eye(3), (randn(3, 3)).softmax(1)])
    with pytest.warns(UserWarning, match=SAID):
        answers = Victim(answering(rows), batch_size=3)(numbered(6))
    torch.testing.assert_close(answers, rows)
    rows = torch.cat([torch.eye(3), randn(3, 3)])  # scores
    answers = Victim(answering(rows), batch_size=3)(numbered(6))
    torch.testing.assert_close(answers[3:], rows[3:].softmax(1))


def test_an_answer_that_contradicts_those_before_is_refused():
    rows = torch.cat([randn(4, 5).softmax(1), randn(4, 5)])
    with pytest.warns(UserWarning, match=SAID), pytest.raises(ValueError, match="rows that are no"):
        Victim(answering(rows), batch_size=4)(numbered(8))
    rows = rows.flip(0)  # logits first: a batch that looks like probabilities is by chance
    assert torch.equal(Victim(answering(rows), batch_size=4)(numbered(8)), rows.softmax(1))


def test_codes_of_logits_are_refused():
    rows = torch.randint(-128, 128, (4, 5), generator=torch.Generator().manual_seed(0))
    message = r"model: wanted floats, got torch.int8 codes: return \(codes - zero_point\) \* scale"
    with pytest.raises(ValueError, match=message):
        Victim(answering(rows.to(torch.int8)))(numbered(4))


def test_logarithms_of_probabilities_are_logits():
    rows = randn(4, 5).log_softmax(1)
    torch.testing.assert_close(Victim(answering(rows))(numbered(4)), rows.exp())


class Ends(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.end = end

    def forward(self, images):
        return self.end(8 * images.flatten(1).round())


SHARP = 3 * randn(4, 1, 1, 3)
ENDS = {
    "module": nn.Softmax(1),
    "function": lambda x: nn.functional.softmax(x, 1),
    "method, reshaped": lambda x: x.softmax(1).view(-1, 1, 3).squeeze(1),
    "rounded": lambda x: torch.round(x.softmax(1)),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_a_torch_module_that_ends_in_a_softmax_is_known_by_it(end):
    # Rounded to 0 and 1 the rows alone would not tell.
    model = Ends(end).eval()
    with pytest.warns(UserWarning, match=rf"{SAID} \(its last operation is a softmax\)"):
        answers = Victim(model)(SHARP)
    torch.testing.assert_close(answers, model(SHARP), rtol=1e-5, atol=1e-7)


def test_a_torch_module_that_ends_in_something_else():
    model = Ends(nn.Sequential(nn.Softmax(1), nn.Linear(3, 3))).eval()
    assert torch.equal(Victim(model)(SHARP), model(SHARP).softmax(1))
    model = Ends(nn.LogSoftmax(1)).eval()
    torch.testing.assert_close(Victim(model)(SHARP), model(SHARP).exp())
    for end in (nn.Sigmoid(), torch.sigmoid):
        with pytest.raises(ValueError, match=r"got sigmoids.*return the inputs of the sigmoid"):
            Victim(Ends(end).eval())(SHARP)


def test_a_compiled_module_is_told_by_its_rows():
    model = torch.compile(Ends(nn.Softmax(1)).eval(), backend="eager")
    with pytest.warns(UserWarning, match=rf"{SAID} \(its rows have the sum 1\)"):
        answers = Victim(model)(SHARP / 9)
    torch.testing.assert_close(answers, model(SHARP / 9))


def saved(path, ops, dtype="FLOAT"):
    """A chain of operations over the flat images, as an ONNX file."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, types = onnx.helper, onnx.TensorProto
    constants = [
        helper.make_tensor("scale", types.FLOAT, [], [1 / 255]),
        helper.make_tensor("zero", types.UINT8, [], [0]),
        helper.make_tensor("shape", types.INT64, [2], [-1, 3]),
    ]
    nodes, last = [helper.make_node("Flatten", ["images"], ["y0"])], "y0"
    for i, op in enumerate(ops, 1):
        extra, options = [], {}
        if op in ("QuantizeLinear", "DequantizeLinear"):
            extra = ["scale", "zero"]
        elif op == "Reshape":
            extra = ["shape"]
        elif op == "Softmax":
            options = {"axis": 1}
        elif op == "Cast":
            options = {"to": types.FLOAT16}
        nodes.append(helper.make_node(op, [last, *extra], [f"y{i}"], **options))
        last = f"y{i}"
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("images", types.FLOAT, ["n", 1, 1, 3])],
        [helper.make_tensor_value_info(last, getattr(types, dtype), ["n", 3])],
        constants,
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("ops", "dtype"),
    [
        (["Softmax"], "FLOAT"),
        (["Softmax", "QuantizeLinear", "DequantizeLinear", "Identity", "Reshape"], "FLOAT"),
        (["Softmax", "Cast"], "FLOAT16"),
        (["Softmax", "QuantizeLinear"], "UINT8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
@pytest.mark.parametrize("graph", [True, False])
def test_an_onnx_file_that_ends_in_a_softmax(tmp_path, monkeypatch, ops, dtype, graph):
    path = saved(tmp_path / "model.onnx", ops, dtype)
    if not graph:
        monkeypatch.setattr("divqat.victim.runners.onnx_kind", lambda path: None)
    why = r"its last operation is a softmax" if graph else "its rows have the sum 1"
    with pytest.warns(UserWarning, match=rf"{SAID} \({why}\)"):
        answers = Victim(path)(SHARP)
    torch.testing.assert_close(answers, SHARP.flatten(1).softmax(1), rtol=0.01, atol=0.01)


def test_an_onnx_file_that_ends_in_something_else(tmp_path):
    path = saved(tmp_path / "model.onnx", ["Sigmoid", "QuantizeLinear", "DequantizeLinear"])
    with pytest.raises(ValueError, match="got sigmoids"):
        Victim(path)
    wanted = SHARP.flatten(1)
    path = saved(tmp_path / "logs.onnx", ["LogSoftmax", "Identity"])
    torch.testing.assert_close(Victim(path)(SHARP), wanted.softmax(1))
    path = saved(tmp_path / "logits.onnx", ["Softmax", "Neg"])
    torch.testing.assert_close(Victim(path)(SHARP), (-wanted.softmax(1)).softmax(1))


@pytest.mark.parametrize("total", [0.9, 1.1])
@pytest.mark.parametrize("digits", [None, 3])
def test_rows_of_another_sum_are_logits(total, digits):
    rows = total * randn(8, 10).softmax(1)
    rows = rows if digits is None else rows.round(decimals=digits)
    assert torch.equal(Victim(answering(rows))(numbered(8)), rows.softmax(1))


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.Sigmoid()])
def test_a_network_that_is_to_be_trained_answers_logits(end):
    layers = nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3)
    check_logits(nn.Sequential(*layers), torch.zeros(2, 1, 3, 4))
    check_logits(nn.Sequential(*layers, nn.LogSoftmax(1)), torch.zeros(2, 1, 3, 4))
    model = nn.Sequential(*layers, end)
    with pytest.raises(ValueError, match="model: wanted a network that returns logits, got"):
        check_logits(model, torch.zeros(2, 1, 3, 4))
    assert model.training and model[1].num_batches_tracked == 0
