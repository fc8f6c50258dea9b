"""The declared input: in the file, in the graph, for victims, and in the example."""

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import build, images, settle

import divqat
from divqat._util.files import read_json
from divqat.cli.main import main
from divqat.data import to_float
from divqat.experiments.subjects import deploy_run
from divqat.export import InputMetadata, export_onnx, read_metadata, verify
from divqat.metrics import predict
from divqat.train import load_run
from divqat.victim import Victim

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
IMAGENET = InputMetadata(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), classes=tuple("abcde")
)


@pytest.fixture(scope="module")
def model():
    return settle(divqat.prepare(build("residual"), "x86", images()), 5).eval()


@pytest.fixture(scope="module")
def pictures():
    return torch.randint(0, 256, (64, 3, 12, 12), generator=torch.Generator().manual_seed(1)).byte()


@pytest.fixture(scope="module", params=[InputMetadata(), IMAGENET], ids=["divqat", "imagenet"])
def files(request, model, one_thread, tmp_path_factory):
    """A file that takes floats, the same with the normalization inside, and what they declare."""
    folder, declared = tmp_path_factory.mktemp("metadata"), request.param
    export_onnx(model, images(), folder / "float.onnx", metadata=declared)
    inside = replace(declared, dtype="uint8")
    export_onnx(model, images(), folder / "uint8.onnx", metadata=inside)
    return folder / "float.onnx", folder / "uint8.onnx", declared


def test_the_file_declares_its_input(files):
    floats, inside, declared = files
    assert read_metadata(floats) == declared
    assert read_metadata(inside) == replace(declared, dtype="uint8")
    (entry,) = onnx.load(floats).metadata_props
    assert entry.key == "divqat.input"
    assert json.loads(entry.value)["mean"] == list(declared.mean)
    onnx.checker.check_model(onnx.load(inside), full_check=True)


def test_the_normalization_inside_changes_no_bit(files, pictures):
    """The oracle is numpy's float32 arithmetic, in the order in which pictures are normalized."""
    floats, inside, declared = files
    x = pictures.numpy().astype(np.float32) / declared.divisor - declared.shift
    (wanted,) = onnxruntime.InferenceSession(floats).run(None, {"images": x})
    (got,) = onnxruntime.InferenceSession(inside).run(None, {"images": pictures.numpy()})
    np.testing.assert_array_equal(got, wanted)
    column = (1, -1, 1, 1)
    mean, std = (np.array(v).reshape(column) for v in (declared.mean, declared.std))
    np.testing.assert_allclose(x, (pictures.numpy() / 255 - mean) / std, atol=1e-5)


def test_victims_and_verify_take_both_files(files, model, pictures):
    """Queries are floats in [-1, 1] for every victim."""
    floats, inside, declared = files
    answers = [Victim(file)(to_float(pictures)) for file in (floats, inside)]
    if declared.mean == (0.5,):  # for others, the floats may differ in their last bit
        torch.testing.assert_close(*answers, rtol=0, atol=0)
    assert torch.equal(predict(inside, pictures).softmax(1), answers[1])
    for file in (floats, inside):
        report = verify(model, file, pictures, torch.zeros(64, dtype=torch.int64))
        assert report.least_agreement > 0.98 and report.max_diff_steps < 4


def test_uint8_rounds_a_query_to_a_picture(files, pictures):
    victim = Victim(files[1])
    between = to_float(pictures) + 0.4 / 127.5
    assert torch.equal(victim(between), victim(to_float(pictures)))
    assert torch.equal(
        victim(to_float(pictures) * 9), victim((to_float(pictures) * 9).clamp(-1, 1))
    )


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"mean": (0.5, 0.5)}, "std: wanted as many as mean, 2, got 1"),
        ({"std": (0.0,)}, "std: wanted positive numbers"),
        ({"mean": ("a",)}, "mean: wanted numbers, got ('a',)"),
        ({"mean": (float("nan"),)}, "mean: wanted finite numbers"),
        ({"range": (1, 0)}, "range: wanted two rising numbers"),
        ({"layout": "CHW"}, "layout: wanted one of"),
        ({"dtype": "int8"}, "dtype: wanted one of"),
        ({"classes": [1]}, "classes: wanted names or None"),
    ],
)
def test_bad_metadata_is_refused(arguments, text):
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        InputMetadata(**arguments)


@pytest.mark.parametrize(
    "declared, text",
    [
        (InputMetadata(mean=(0.5, 0.5), std=(1, 1)), "each of 3 channels"),
        (InputMetadata(classes=("a",)), "classes: wanted 5, one for each output, got 1"),
        (InputMetadata(layout="NHWC"), "layout: wanted NCHW in an ONNX file"),
        ("NCHW", "wanted an InputMetadata, got str"),
    ],
)
def test_metadata_that_does_not_fit_the_model_is_refused(model, declared, text, tmp_path):
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        export_onnx(model, images(), tmp_path / "model.onnx", metadata=declared)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]", '{"mean": "x"}', '{"unknown": 1}'])
def test_a_foreign_file_with_damaged_metadata_is_refused(files, text, tmp_path):
    proto = onnx.load(files[0])
    proto.metadata_props[0].value = text
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match=r"divqat\.input"):
        read_metadata(tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match=r"divqat\.input"):
        Victim(tmp_path / "foreign.onnx")


def test_a_file_that_declares_another_type_than_it_takes_is_refused(files, tmp_path):
    proto = onnx.load(files[0])
    proto.metadata_props[0].value = InputMetadata(dtype="uint8").to_json()
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="wanted its declared input uint8, got images"):
        Victim(tmp_path / "foreign.onnx")


@pytest.fixture(scope="module")
def run(one_thread, tmp_path_factory):
    """A quantized run of digits."""
    out = tmp_path_factory.mktemp("runs")
    fast = ["--epochs", "1", "--threads", "1", "--batch-size", "128"]
    assert main(["train", "--out", str(out / "fp"), *fast]) == 0
    teacher = ["--method", "qat", "--teacher", str(out / "fp")]
    assert main(["train", "--out", str(out / "qat"), *teacher, *fast]) == 0
    return load_run(out / "qat")


@pytest.mark.slow
def test_the_command_and_an_evaluation(run, capsys):
    """An evaluation keeps the file that is there, until another one is asked for."""
    folder, file = str(run.folder), run.folder / "model.onnx"
    assert main(["export", folder, "--normalize-inside"]) == 0
    assert main(["verify", folder]) == 0
    declared = read_metadata(file)
    assert declared.dtype == "uint8" and declared.classes == tuple("0123456789")
    assert read_json(run.folder / "verify.json")["argmax_agreement"] >= 0.995
    layers = read_json(run.folder / "layers.json")["rows"]
    assert {r["kernel"] for r in layers if r["kind"] == "weight"} <= {"QLinearConv", "QGemm"}
    before = file.read_bytes()
    assert deploy_run(run, run.splits(), name="victim").model == file
    assert file.read_bytes() == before
    assert main(["export", folder, "--opset", "13"]) == 0
    assert read_metadata(file).dtype == "float32"
    assert onnx.load(file).opset_import[0].version == 13
    assert main(["export", folder, "--to", "executorch", "--normalize-inside"]) == 2
    assert "normalize_inside: wanted the target onnx, got executorch" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--normalize-inside"]], ids=["float32", "uint8"])
def test_the_example_classifies_a_picture(run, flags, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    assert main(["export", str(run.folder), *flags]) == 0
    example = runpy.run_path(str(ROOT / "examples" / "onnxruntime_classify.py"))
    pictures = run.splits().test.images[:8]
    for picture, wanted in zip(pictures, predict(run.model, pictures).argmax(1), strict=True):
        image.fromarray(picture[0].numpy()).save(tmp_path / "picture.png")
        name = example["main"](str(run.folder / "model.onnx"), str(tmp_path / "picture.png"))
        assert name == str(int(wanted))
