"""An ensemble of networks that were trained apart, as one victim."""

import pytest
import torch
from test_pipeline import JOB
from test_train import QUIET, assert_equal
from testing import seeded

from divqat import models
from divqat._util.files import save_checkpoint
from divqat._util.settings import ConfigError
from divqat.experiments.deploy import export_run, verify_run
from divqat.experiments.study import Study
from divqat.models.ensemble import MEMBERS, Ensemble
from divqat.quantize import prepare
from divqat.train import TrainConfig, load_run, train

SETTINGS = dict(dataset="digits", model="lenet", batch_size=256, epochs=2, threads=1)
WHOLE = {**SETTINGS, "model": "ensemble", "epochs": 0, "method": "ensemble"}
pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_ensemble_averages_probabilities():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = models.build("ensemble", in_channels=1, num_classes=4, image_size=8).double().eval()
    assert [type(member) for member in model.members] == [*MEMBERS.values()]
    with torch.no_grad():
        model.members[0].classifier[-1].weight.mul_(1e3)  # one of them is certain
    images = torch.rand(3, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    wanted = sum(member(images).softmax(1) for member in model.members) / 3
    assert (wanted.amax(1) > 0.34).all()
    torch.testing.assert_close(model(images).exp(), wanted)
    assert "ensemble" not in models.names()  # of clones


@pytest.fixture
def two_members():
    """A small ensemble, as the exporter takes its time."""
    before = dict(MEMBERS)
    MEMBERS.clear()
    MEMBERS.update(
        vgg_small=models.VGGSmall, lenet=lambda *sizes: models.LeNet(*sizes, image_size=(8, 8))
    )
    yield
    MEMBERS.clear()
    MEMBERS.update(before)


def untrained(folder, model, **changes):
    """The run folder of a network as it was built."""
    settings = {**SETTINGS, "model": model, "epochs": 0, **changes}
    weights = folder.with_suffix(".pt")
    network = models.build(model, in_channels=1, num_classes=10, image_size=8)
    save_checkpoint(weights, network.state_dict())
    train(TrainConfig(**settings, weights=str(weights)), folder, **QUIET)
    return str(folder)


@pytest.mark.slow
def test_an_ensemble_is_deployed_as_one_int8_graph(two_members, tmp_path):
    members = [untrained(tmp_path / name, name) for name in MEMBERS]
    train(TrainConfig(**WHOLE, members=members), tmp_path / "ensemble", **QUIET)
    ensemble = load_run(tmp_path / "ensemble")
    for network, folder in zip(ensemble.model.members, members, strict=True):
        assert_equal(network.state_dict(), load_run(folder).model.state_dict())
    ptq = {**WHOLE, "method": "ptq", "epochs": 1, "teacher": str(tmp_path / "ensemble")}
    train(TrainConfig(**ptq), tmp_path / "ptq", **QUIET)
    run = load_run(tmp_path / "ptq")
    report = export_run(run, run.splits())
    assert report["int8_layers"] == 11 and report["float_layers"] == 0
    assert verify_run(run, run.splits())["argmax_agreement"] > 0.98
    wrong = [(members[::-1], "members: wanted model vgg_small, got lenet in")]
    other = untrained(tmp_path / "other", "vgg_small", validation_fraction=0.2)
    wrong.append(([other, members[1]], "members: wanted validation_fraction 0.1, got 0.2 in"))
    wrong.append(([str(tmp_path / "ptq"), members[1]], "full-precision trainings, got method ptq"))
    for folders, message in wrong:
        with pytest.raises(ValueError, match=message):
            train(TrainConfig(**WHOLE, members=folders), tmp_path / "wrong", **QUIET)


def test_the_mean_of_an_ensemble_is_not_quantized(two_members):
    prepared = prepare(Ensemble(1, 4), "x86", torch.zeros(2, 1, 8, 8))
    *_, stack, total, minus, output = prepared.graph.nodes
    assert (stack.target, total.target, output.args) == (torch.stack, "logsumexp", (minus,))


DISTILLED = {"method": "misleader", "epochs": 2}
VICTIMS = {
    **{name: {**DISTILLED, "model": name} for name in MEMBERS},
    "ensemble": {"method": "ensemble", "model": "ensemble", "epochs": 0, "members": [*MEMBERS]},
    "deployed": {"method": "qat", "model": "ensemble", "epochs": 2, "teacher": "ensemble"},
}


def study(**changes):
    victims = {name: {**keys, **changes.get(name, {})} for name, keys in VICTIMS.items()}
    return Study.from_dict({**JOB, "victims": victims})


def test_a_study_with_an_ensemble(tmp_path):
    found = study()
    assert found.attacked == ["deployed"] and found.needs("deployed") == ["ensemble"]
    assert found.needs("ensemble") == [*MEMBERS] and found.needs("resnet20") == ["fp"]
    assert found.training("ensemble", 0, tmp_path).members == tuple(
        str(tmp_path / "seed0" / name) for name in MEMBERS
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ensemble={"members": ["vgg_small", "deployed"]}), "members: .*, got 'deployed'"),
        (dict(ensemble={"members": "vgg_small"}), "wanted a list of names, got 'vgg_small'"),
        (dict(ensemble={"members": [*MEMBERS][::-1]}), "networks vgg_small, resnet20, mob"),
        (dict(ensemble={"members": ["fp"]}), "members: wanted those of vgg_small, .* got 1"),
        (dict(vgg_small={"validation_fraction": 0.2}), "wanted 0.1 as in its teacher fp, got 0.2"),
        (dict(deployed={"model": "lenet"}), "model: wanted ensemble as in its teacher ensemble"),
    ],
)
def test_bad_ensembles_of_a_study_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        study(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(members=("a",)), "members: wanted those of vgg_small, .* got 1"),
        (dict(), "members: wanted those of vgg_small, .* got 0"),
        (dict(model="lenet"), "wanted model ensemble and epochs 0 .* got lenet and 0"),
        (dict(epochs=1), "wanted model ensemble and epochs 0 .* got ensemble and 1"),
        (dict(teacher="t"), "teacher: wanted none for method ensemble, got 't'"),
        (dict(method="fp", epochs=1, members=("a",)), "members: wanted none .* ensemble, got fp"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{**WHOLE, **changes})
