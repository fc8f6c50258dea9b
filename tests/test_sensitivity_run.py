"""divqat sensitivity: its files, and a training with the widths that it chose."""

from dataclasses import replace

import pytest
import yaml
from toys import same_bits
from trainings import train_until

from divqat import cli
from divqat._util.files import read_json
from divqat.data import ImageSet
from divqat.evaluate.layers import sensitivity_bars
from divqat.experiments.sensitivity import SensitivityConfig, sensitivity_run
from divqat.quantize.layer_bits import format_layer_bits
from divqat.train import TrainConfig, load_run

FAST = ["--threads", "1", "--batch-size", "256"]
FEW = ["--threads", "1", "--images", "40"]


def divqat(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A full-precision run and one that quantizes it, with the widths chosen for it."""
    out = tmp_path_factory.mktemp("runs")
    assert divqat("train", "--out", out / "fp", "--epochs", 1, *FAST) == 0
    ptq = ["--method", "ptq", "--teacher", out / "fp", "--epochs", 1, *FAST]
    assert divqat("train", "--out", out / "ptq", *ptq) == 0
    assert divqat("sensitivity", out / "ptq", "--mixed-precision", 4, "--bits", 2, 4, 7, *FEW) == 0
    return out


def test_it_writes_what_it_measured(runs):
    result = read_json(runs / "ptq" / "sensitivity.json")
    assert result["images"] == 40
    layer = result["layers"][0]
    assert layer["alone"].keys() == layer["others"].keys() == result["floating"].keys()
    assert layer["at"].keys() == {"2", "4", "7"}
    assert (runs / "ptq" / "plots" / "sensitivity.png").is_file()
    mixed = read_json(runs / "ptq" / "mixed_precision.json")
    assert mixed["bits_per_weight"] <= 4 and set(mixed["layer_bits"].values()) <= {2, 4, 7}


@pytest.mark.slow
def test_it_prints_the_tables_the_files_and_what_to_run_next(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    arguments = ["ptq", "--bits", 2, 4, 7, *FEW]
    assert divqat("sensitivity", *arguments) == 0
    shown = capsys.readouterr().out
    assert "(all quantized)" in shown and "results  ptq/sensitivity.json" in shown
    assert shown.endswith("next     divqat sensitivity ptq --mixed-precision 4\n")
    assert divqat("sensitivity", *arguments, "--mixed-precision", 4) == 0
    shown = capsys.readouterr().out
    assert "predicted" in shown
    (command,) = (line for line in shown.splitlines() if line.startswith("next     divqat "))
    assert divqat(*command.split()[2:]) == 0
    saved = yaml.safe_load((runs / "ptq-mixed" / "config.yaml").read_text())
    chosen = read_json(runs / "ptq" / "mixed_precision.json")
    assert tuple(saved["layer_bits"]) == format_layer_bits(chosen["layer_bits"])


def test_the_same_command_measures_once(runs, monkeypatch, capsys):
    monkeypatch.setattr("divqat.experiments.sensitivity.sensitivity", None)
    assert divqat("sensitivity", runs / "ptq", "--bits", 2, 4, 7, *FEW) == 0
    assert divqat("sensitivity", runs / "ptq", "--images", 41) == 1
    assert "not callable" in capsys.readouterr().err


def test_only_validation_images_are_used(runs):
    run = load_run(runs / "ptq")
    splits = run.splits()
    poisoned = ImageSet(splits.test.images, splits.test.labels)
    object.__setattr__(poisoned, "images", None)
    alone = replace(run, folder=runs / "elsewhere")
    object.__setattr__(splits, "test", poisoned)
    object.__setattr__(splits, "train", None)
    result = sensitivity_run(alone, splits, SensitivityConfig(threads=1, what="weights"))
    assert result["images"] == len(splits.validation)


@pytest.mark.slow
def test_a_training_with_widths_resumes(runs, tmp_path):
    mixed = runs / "ptq" / "mixed_precision.json"
    command = ["train", "--method", "qat", "--teacher", runs / "fp", "--lr", 0.01, *FAST]
    command += ["--epochs", 2, "--layer-bits", mixed]
    assert divqat(*command, "--out", tmp_path / "a") == 0
    config = TrainConfig.from_dict(yaml.safe_load((tmp_path / "a" / "config.yaml").read_text()))
    train_until(config, tmp_path / "b", 1)
    assert divqat("train", "--resume", "--out", tmp_path / "b") == 0
    run, resumed = load_run(tmp_path / "a"), load_run(tmp_path / "b")
    assert same_bits(run.model, resumed.model)
    for name, bits in read_json(mixed)["layer_bits"].items():
        assert run.model.get_submodule(name).weight_spec.bits == bits


def test_other_widths_in_the_folder_are_refused(runs, capsys):
    command = ["train", "--resume", "--out", runs / "ptq", "--layer-bits", "a=4"]
    assert divqat(*command) == 1
    assert "(layer_bits: None -> ['a=4'])" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "code", "message"),
    [
        ("missing.json", 1, "wanted the mixed_precision.json of divqat sensitivity"),
        ("{runs}/ptq/sensitivity.json", 1, "ptq/sensitivity.json: wanted the mixed_precision.json"),
        ("{runs}/ptq/checkpoint.pt", 1, "ptq/checkpoint.pt"),
        ("classifier.9=4", 2, "layer_bits: unknown layer 'classifier.9' (did you mean 'classifier"),
        ("classifier.0=9", 2, "layer_bits: wanted LAYER=BITS with 2 to 8 bits"),
    ],
)
def test_wrong_widths_are_refused_before_anything_is_written(runs, tmp_path, capsys, value, code, message):  # noqa: E501  # fmt: skip
    command = ["train", "--method", "qat", "--teacher", runs / "fp", "--out", tmp_path / "x"]
    assert divqat(*command, "--layer-bits", value.format(runs=runs)) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--mixed-precision", 1], 2, "mixed_precision: wanted a number at least 2, got 1.0"),
        (["--mixed-precision", 2, "--bits", 3], 2, "wanted at least 3, the smallest of bits"),
        (["--bits", 9], 2, "bits: wanted a whole number at least 2 at most 8, got 9"),
        (["--what", "activations", "--bits", 4], 2, "bits: wanted none with what = activations"),
        (["--images", 0], 2, "images: wanted a whole number at least 1, got 0"),
    ],
)
def test_wrong_flags(runs, capsys, arguments, code, message):
    assert divqat("sensitivity", runs / "ptq", *arguments) == code
    assert message in capsys.readouterr().err


def test_a_full_precision_run_has_nothing_to_measure(runs, capsys):
    assert divqat("sensitivity", runs / "fp") == 1
    assert "run: wanted a quantized training, got method fp" in capsys.readouterr().err


@pytest.mark.slow
def test_the_plot_is_a_picture(runs, tmp_path, painted):
    result = read_json(runs / "ptq" / "sensitivity.json")
    drawn = sensitivity_bars(result, tmp_path / "layers.png")
    assert drawn.read_bytes()[:4] == b"\x89PNG" and drawn.stat().st_size > 1000


def test_without_labels_the_plot_has_no_loss(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("divqat.evaluate.layers.save_plot", lambda *given: drawn.append(given[1]))
    result = read_json(runs / "ptq" / "sensitivity.json")
    for loss in (1.0, None):
        sensitivity_bars({**result, "floating": {"loss": loss}}, tmp_path)
    assert drawn[0][0] > drawn[1][0]  # a panel more
