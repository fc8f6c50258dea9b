"""Exported files in OpenVINO: make test-runtimes."""

import json
import shutil
import warnings

import openvino
import pytest
import torch
from networks import floats, trained
from torch import nn

import divqat
from divqat import models
from divqat.cli import main
from divqat.export import export_openvino, verify
from divqat.quantize import preset
from divqat.victim import Victim


# Weights of 7 bits: with 8, the answers depend on whether the CPU has VNNI, see below.
@pytest.mark.parametrize("config", ["x86", "qnnpack", "tensorrt"])
@pytest.mark.parametrize("name", models.names())
def test_built_in_networks_answer_as_trained(name, config, digits, tmp_path):
    images, labels = floats(digits.train.images), digits.train.labels
    model = trained(name, preset(config, weight_bits=7), images, labels)
    report = export_openvino(model, images[:2], tmp_path / "model.xml")
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert (report.int8_layers, report.float_layers) == (layers, 0) and not report.saturating
    test = floats(digits.test.images)
    with torch.no_grad():
        wanted = model(test)
    got = Victim(tmp_path / "model.xml", answer="probs")(test).log()
    got, wanted = got - got.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True)
    step = float(wanted.max() - wanted.min()) / 255
    # Sums of branches, and symmetric activations, are rounded at other points.
    exact = name in ("lenet", "vgg_small") and config != "tensorrt"
    assert (got - wanted).abs().max() <= (2 if exact else 20) * step
    top = wanted.topk(2).values
    decided = top[:, 0] - top[:, 1] > 2 * step
    assert decided.float().mean() > 0.8
    assert (got.argmax(1) == wanted.argmax(1))[decided].float().mean() >= 0.995


def test_wide_weights_are_reported(digits, tmp_path):
    images = floats(digits.train.images)
    model = trained("lenet", preset("tensorrt"), images, digits.train.labels, steps=5)
    with pytest.warns(UserWarning, match=r"model\.xml: sums of int8 products can saturate on x86"):
        report = export_openvino(model, images[:2], tmp_path / "model.xml")
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert list(report.saturating) == names and "and 2 more: train with weight_bits=7" in str(
        report
    )


def test_commands_export_verify_and_attack(tmp_path, capsys):
    common = ["--dataset", "digits", "--model", "lenet", "--epochs", "2", "--threads", "1"]

    def divqat_(*words):
        assert main([*map(str, words)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    qat = tmp_path / "qat"
    divqat_("train", *common, "--out", tmp_path / "fp")
    divqat_("train", *common, "--method", "qat", "--teacher", tmp_path / "fp", "--out", qat)
    out = divqat_("export", qat, "--to", "openvino")
    assert f"{qat / 'model.xml'}, model.bin: " in out and "5 of 5 convolutions" in out
    assert f"divqat verify {qat} --runtime openvino" in out
    out = divqat_("verify", qat, "--runtime", "openvino", "--min-agreement", "0.99")
    assert "OpenVINO 20" in out and f"--victim {qat / 'model.xml'} --dataset digits" in out
    assert json.loads((qat / "verify-openvino.json").read_text())["n"] == 359
    attack = ["--query-set", "noise", "--query-limit", 50, "--clones", "lenet", "--epochs", 1]
    victims = ["--victim", f"xml={qat / 'model.xml'}", "--dataset", "digits"]
    divqat_("evaluate", *victims, *attack, "--seeds", 1, "--out", tmp_path / "clones")
    cells = json.loads((tmp_path / "clones" / "evaluation.json").read_text())["cells"]
    assert {cell["victim"] for cell in cells} == {"xml"}


def small(digits, tmp_path):
    """A calibrated network, exported."""
    images = floats(digits.train.images, 8)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    prepared = divqat.prepare(net, "x86", images[:100])
    prepared(images[:100])
    path = tmp_path / "small.xml"
    export_openvino(prepared.eval(), images[:2], path)
    return prepared, path


def test_verify_and_victims_of_any_number_of_images(digits, tmp_path):
    prepared, path = small(digits, tmp_path)
    report = verify(prepared, path, digits.test.images, digits.test.labels)
    assert report.runtime.startswith("OpenVINO ") and report.max_diff_steps < 2
    images = floats(digits.test.images, 8)
    run = Victim(path)
    torch.testing.assert_close(run(images[:1]), run(images)[:1])


def test_a_batch_of_fixed_size_is_padded(digits, tmp_path):
    _, path = small(digits, tmp_path)
    model = openvino.Core().read_model(path)
    model.reshape([4, 1, 8, 8])
    openvino.save_model(model, tmp_path / "four.xml", compress_to_fp16=False)
    images = floats(digits.test.images, 8)[:7]
    # Kernels for other sizes round other values up or down.
    got, wanted = Victim(tmp_path / "four.xml")(images), Victim(path)(images)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.01)


def test_bad_files_are_refused(digits, tmp_path):
    _, path = small(digits, tmp_path)
    image = torch.zeros(1, 1, 8, 8)
    with pytest.raises(FileNotFoundError, match=r"no OpenVINO file at .*none\.xml"):
        Victim(tmp_path / "none.xml")(image)
    bad = tmp_path / "bad.xml"
    shutil.copy(path, bad)
    with pytest.raises(FileNotFoundError, match=r"no OpenVINO file at .*bad\.bin"):
        Victim(bad)(image)
    shutil.copy(path.with_suffix(".bin"), bad.with_suffix(".bin"))
    for data in (b"", b"<net>", path.read_bytes()[:5000]):
        bad.write_bytes(data)
        with pytest.raises(ValueError, match="OpenVINO cannot load"):
            Victim(bad)(image)
    shutil.copy(path, bad)
    bad.with_suffix(".bin").write_bytes(b"\0" * 10)
    with pytest.raises(ValueError, match="OpenVINO cannot load"):
        Victim(bad)(image)


def test_images_of_other_sizes_and_paths_of_other_suffixes_are_refused(digits, tmp_path):
    prepared, path = small(digits, tmp_path)
    with pytest.raises(ValueError, match=r"the model wants .*, got \[2, 1, 9, 9\]"):
        Victim(path)(torch.zeros(2, 1, 9, 9))
    with pytest.raises(ValueError, match=r"path: wanted a file \*\.xml, got .*model\.onnx"):
        export_openvino(prepared, torch.zeros(2, 1, 8, 8), tmp_path / "model.onnx")


def test_no_warning_is_of_the_file_in_between(digits, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        small(digits, tmp_path)
