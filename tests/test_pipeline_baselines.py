"""Studies with the baselines."""

import pytest
from test_pipeline import JOB
from test_train import QUIET

from divqat._util.files import read_json
from divqat._util.settings import ConfigError
from divqat.experiments.run import run_study
from divqat.experiments.study import Study
from divqat.train import load_run

pytestmark = pytest.mark.slow

NASTY = {"method": "nasty", "epochs": 2, "weight": 0.1}
INI = {"method": "ini", "epochs": 2, "ini_epsilon": 50.0}
BUDGETED = {"method": "divqat", "accuracy_budget": 1.0, "reference": "a"}
VICTIMS = {
    "nasty": NASTY,
    "ini": INI,
    "ptq": {"method": "ptq", "epochs": 1},
    "undistillable": {"method": "ptq", "epochs": 1, "teacher": "nasty"},
    "isolated": {"method": "ptq", "epochs": 1, "teacher": "ini"},
}
METHODS = {"ptq": "ptq", "undistillable": "nasty-ptq", "isolated": "ini-ptq"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_full_precision_victim_teaches_and_is_not_attacked(tmp_path):
    attack = {**JOB["attack"], "budget": 100, "answers": ["probs"]}
    result = run_study(
        Study.from_dict({**JOB, "victims": VICTIMS, "attack": attack}), tmp_path, **QUIET
    )
    assert {row.victim: row.method for row in result.released} == METHODS
    assert [(cell.victim, cell.attack) for cell in result.cells] == [
        (name, "knockoff") for name in METHODS
    ]
    assert all(row.agreement > 0.98 for row in result.released)
    seed = tmp_path / "seed0"
    for name in METHODS:
        teacher = VICTIMS[name].get("teacher", "fp")
        assert not (seed / teacher / "model.onnx").exists()
        assert load_run(seed / name).config.teacher == str(seed / teacher)
        assert read_json(seed / name / "export.json")["int8_layers"] == 5
    assert result.control is None  # there is no plain QAT


@pytest.mark.parametrize(
    ("victims", "message"),
    [
        ({"a": {"method": "qat", "teacher": "b"}}, "a: teacher: wanted fp, or an earlier full"),
        (
            {"a": {"method": "qat", "teacher": "b"}, "b": NASTY},
            "an earlier full-precision victim, got 'b'",
        ),
        ({"b": {"method": "qat"}, "a": {"method": "qat", "teacher": "b"}}, "a: teacher: wanted"),
        ({"b": NASTY}, "victims: wanted at least one that is quantized"),
        ({"a": {"method": "fp"}}, "a: method: wanted one of nasty, ini, misleader, ensemble, ptq"),
        ({"b": {**INI, "teacher": "fp"}, "a": {"method": "ptq", "teacher": "b"}}, "wanted none"),
        ({"a": {"method": "qat", "seed": 1}}, "a: the study sets seed itself"),
        ({"a": {"method": "qat", "model": "resnet20"}}, "a: model: wanted lenet as in its teacher"),
        (
            {"a": {"method": "qat", "validation_fraction": 0.2}},
            "a: validation_fraction: wanted 0.1 as in its teacher fp, got 0.2",
        ),
        (
            {"b": {**INI, "model": "resnet20"}, "a": {"method": "qat", "teacher": "b"}},
            "a: model: wanted resnet20 as in its teacher b, got lenet",
        ),
        (
            {"a": {"method": "qat"}, "d": {**BUDGETED, "weight_bits": 4}},
            "d: weight_bits: wanted 7 as in its reference a, got 4",
        ),
        (
            {"b": NASTY, "a": {"method": "qat"}, "d": {**BUDGETED, "teacher": "b"}},
            "d: reference: wanted a victim with teacher b, got a with teacher fp",
        ),
    ],
)
def test_bad_victims_are_refused(victims, message):
    with pytest.raises(ConfigError, match=message):
        Study.from_dict({**JOB, "victims": victims})


def test_a_victim_has_the_network_of_its_ini_teacher_not_of_fp():
    """An ini victim has no teacher that its network would have to match."""
    victims = {
        "b": {**INI, "model": "resnet20"},
        "a": {"method": "qat", "model": "resnet20", "teacher": "b"},
    }
    assert Study.from_dict({**JOB, "victims": victims}).attacked == ["a"]


def test_the_full_precision_training_has_no_other_method():
    with pytest.raises(ConfigError, match="fp: method: wanted fp, got 'ini'"):
        Study.from_dict({**JOB, "fp": {"method": "ini"}})


@pytest.mark.parametrize("section", ["common", "fp"])
def test_only_a_victim_names_its_teacher(section):
    with pytest.raises(ConfigError, match=f"{section}: the study sets teacher itself"):
        Study.from_dict({**JOB, section: {"teacher": "fp"}})
