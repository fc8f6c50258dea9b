"""Exported files in ExecuTorch, with XNNPACK's int8 kernels: make test-runtimes.

Not collected by ``make test``, as ExecuTorch is not installed there. Without it these tests fail.
"""

import json
from pathlib import Path

import executorch.runtime  # noqa: F401 - these tests fail without it
import pytest
import torch
from networks import floats, trained
from torch import nn

import divqat
from divqat import models
from divqat.cli import main
from divqat.export import export_executorch, export_program, verify
from divqat.victim import Victim


@pytest.mark.parametrize("config", ["x86", "qnnpack", "tensorrt"])
@pytest.mark.parametrize("name", models.names())
def test_built_in_networks_answer_as_trained(name, config, digits, tmp_path):
    images, labels = floats(digits.train.images), digits.train.labels
    model = trained(name, config, images, labels)
    report = export_executorch(model, images[:300], tmp_path / "model.pte")
    assert report.delegates and not report.others  # all of it runs in XNNPACK
    test = floats(digits.test.images)
    run = Victim(tmp_path / "model.pte", answer="probs")
    with torch.no_grad():
        logits = model(test)
    program = export_program(model, images[:300])
    (output,) = program.graph.output_node().args[0]
    scale, zero_point = output.args[1:3]
    got = run(test).log()
    got, wanted = got - got.mean(1, keepdim=True), logits - logits.mean(1, keepdim=True)
    # Logits beyond the range of the 300 images are cut to it.
    low, high = (-128 - zero_point) * scale, (127 - zero_point) * scale
    inside = ((logits > low) & (logits < high)).all(1)
    assert inside.float().mean() > 0.9
    # Weights of 8 bits and symmetric activations are not made for XNNPACK, but work.
    assert (got - wanted)[inside].abs().max() <= (8 if config == "tensorrt" else 4) * scale
    top = wanted.topk(2).values
    decided = top[:, 0] - top[:, 1] > 2 * scale
    assert decided.float().mean() > 0.8
    agree = (got.argmax(1) == wanted.argmax(1))[decided].float().mean()
    assert agree >= 0.995


def test_commands_export_verify_and_attack(tmp_path, capsys):
    runs = tmp_path
    common = ["--dataset", "digits", "--model", "lenet", "--epochs", "2", "--threads", "1"]

    def divqat_(*words):
        assert main([*map(str, words)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    divqat_("train", *common, "--out", runs / "fp")
    divqat_("train", *common, "--method", "qat", "--teacher", runs / "fp", "--out", runs / "qat")
    out = divqat_("export", runs / "qat", "--to", "executorch")
    assert (
        f"{runs / 'qat' / 'model.pte'}: " in out and "1 parts run in XNNPACK; others: none" in out
    )
    assert f"divqat verify {runs / 'qat'} --runtime executorch" in out
    out = divqat_("verify", runs / "qat", "--runtime", "executorch", "--min-agreement", "0.9")
    assert (
        "ExecuTorch 1" in out and f"--victim {runs / 'qat' / 'model.pte'} --dataset digits" in out
    )
    report = json.loads((runs / "qat" / "verify-executorch.json").read_text())
    assert report["n"] == 359 and report["argmax_agreement"] > 0.9
    divqat_("export", runs / "qat")
    attack = ["--query-set", "noise", "--query-limit", 50, "--clones", "lenet", "--epochs", 1]
    victims = ["--victim", f"pte={runs / 'qat' / 'model.pte'}", "--victim", runs / "qat"]
    divqat_("evaluate", *victims, *attack, "--seeds", 1, "--out", runs / "clones")
    cells = json.loads((runs / "clones" / "evaluation.json").read_text())["cells"]
    assert {cell["victim"] for cell in cells} == {"pte", "qat"}


def test_verify_takes_both_files(digits, tmp_path):
    images = floats(digits.train.images, 8)
    torch.manual_seed(0)
    net = models.build("lenet", in_channels=1, num_classes=10, image_size=8)
    prepared = divqat.prepare(net, "x86", images[:100])
    prepared(images[:100])
    prepared.eval()
    # Logits of other images are cut to the range of these.
    export_executorch(prepared, floats(digits.test.images, 8), tmp_path / "a.pte")
    report = verify(prepared, tmp_path / "a.pte", digits.test.images, digits.test.labels)
    assert report.runtime.startswith("ExecuTorch ") and report.max_diff_steps < 3


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no ExecuTorch file"):
        Victim(tmp_path / "none.pte")(torch.zeros(1, 1, 8, 8))
    for data in (b"", b"\0" * 100, b"ET12" * 100):
        (tmp_path / "bad.pte").write_bytes(data)
        with pytest.raises(ValueError, match="ExecuTorch cannot load"):
            Victim(tmp_path / "bad.pte")(torch.zeros(1, 1, 8, 8))


def test_images_of_other_sizes_are_refused(digits, tmp_path):
    images = floats(digits.train.images, 8)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    prepared = divqat.prepare(net, "x86", images[:100])
    prepared(images[:100])
    export_executorch(prepared.eval(), images, Path(tmp_path) / "a.pte")
    with pytest.raises(ValueError, match=r"the program wants \[1, 1, 8, 8\], got \[2, 1, 9, 9\]"):
        Victim(tmp_path / "a.pte")(torch.zeros(2, 1, 9, 9))
