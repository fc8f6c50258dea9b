"""A network of someone else's, by ``module:function``, through everything that names a network."""

import json

import pytest
import torch
from torch import nn

from divqat import cli, models
from divqat._util.foreign import foreign, is_foreign, trust
from divqat._util.settings import ConfigError
from divqat.train import TrainConfig, load_run, train

pytestmark = pytest.mark.slow

MODULE = '''
from torch import nn

def tiny(in_channels, num_classes, image_size):
    height, width = image_size
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * (height // 2) * (width // 2), num_classes),
    )

def number(**settings):
    return 7
'''  # fmt: skip


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """The name of a module in the current folder, which no other test has imported."""
    name = f"nets_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # so that it is taken out again
    return name


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("a:b", True), ("a.b_c:D", True), ("lenet", False), (":b", False), ("a:", False),
     ("a:b:c", False), ("a b:c", False), ("a/b:c", False)],
)  # fmt: skip
def test_what_is_a_name_of_a_function(name, wanted):
    assert is_foreign(name) == wanted


def test_it_is_built_and_checked(nets):
    settings = {"in_channels": 3, "num_classes": 5, "image_size": 6}  # less than ours can do
    model = models.build(f"{nets}:tiny", **settings)
    assert model(torch.zeros(2, 3, 6, 6)).shape == (2, 5)
    assert isinstance(foreign("torch.nn:Flatten")(), nn.Flatten)
    with pytest.raises(TypeError, match=r"model: wanted an nn.Module of .*:number, got int"):
        models.build(f"{nets}:number", **settings)
    with pytest.raises(ImportError, match=f"there is no small in the module {nets}"):
        models.build(f"{nets}:small", **settings)
    with pytest.raises(ImportError, match="nowhere_at_all"):
        models.build("nowhere_at_all:small", **settings)
    with pytest.raises(ConfigError, match=r"model: wanted one of .* or module:function, got"):
        TrainConfig(model="lennet")


def test_it_is_defended_exported_and_attacked(nets, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    common = f"--model {nets}:tiny --dataset digits --lr 0.05 --threads 1 --epochs"
    run = "--method divqat --teacher fp --reference qat --accuracy-budget 5 --epochs 2 --threads 1"
    for command in (
        f"train {common} 3 --out fp",
        "train --method qat --teacher fp --epochs 1 --lr 0.01 --threads 1 --out qat "
        f"--trust {nets}:tiny",
        f"train {run} --lr 0.02 --out divqat --trust {nets}:tiny",
        f"export divqat --trust {nets}:tiny",
        f"evaluate --victim divqat --query-set noise --query-limit 100 --clones {nets}:tiny "
        "--attacks knockoff --seeds 1 --epochs 1 --threads 1 --epsilons --out evaluation",
    ):
        assert cli.main(command.split()) == 0, capsys.readouterr().err
    with trust(f"{nets}:tiny"):
        assert load_run("divqat").config.model == f"{nets}:tiny"
    summary = json.loads((tmp_path / "divqat" / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.7
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert [cell["clone"] for cell in found["cells"]] == [f"{nets}:tiny"]


def test_its_weights_come_along(nets, tmp_path):
    common = f"train --model {nets}:tiny --dataset digits --threads 1"
    assert cli.main(f"{common} --epochs 3 --lr 0.05 --out elsewhere".split()) == 0
    with trust(f"{nets}:tiny"):
        trained = load_run("elsewhere").model.state_dict()
    torch.save(trained, "weights.pt")
    assert cli.main(f"{common} --epochs 0 --weights weights.pt --out taken".split()) == 0
    with trust(f"{nets}:tiny"):
        taken = load_run("taken")
    assert taken.epoch == 0
    assert all(torch.equal(value, trained[key]) for key, value in taken.model.state_dict().items())
    for key in ("test_accuracy", "validation_accuracy"):
        there, here = (json.loads((tmp_path / run / "summary.json").read_text())[key]
                       for run in ("elsewhere", "taken"))  # fmt: skip
        assert here == there > 0.8
    # the same command once more, a teacher, and a training that begins there
    assert cli.main(f"{common} --epochs 0 --weights weights.pt --out taken".split()) == 0
    for command in (
        "train --method qat --teacher taken --epochs 1 --lr 0.01 --threads 1 --out qat "
        f"--trust {nets}:tiny",
        f"{common} --epochs 1 --lr 0.001 --weights weights.pt --out further",
    ):
        assert cli.main(command.split()) == 0
    assert json.loads((tmp_path / "further" / "summary.json").read_text())["test_accuracy"] > 0.8
    (row, *_) = (tmp_path / "taken" / "metrics.csv").read_text().splitlines()[1:]
    assert row.startswith("0,,,,0.")


def test_weights_of_something_else(nets, tmp_path):
    torch.save({"weight": torch.zeros(3)}, "other.pt")
    config = {"model": f"{nets}:tiny", "epochs": 0, "threads": 1}
    with pytest.raises(
        ValueError, match=r"weights: wanted a state dict of the network in other\.pt"
    ):
        train(TrainConfig(**config, weights="other.pt"), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at nowhere\.pt"):
        train(TrainConfig(**config, weights="nowhere.pt"), tmp_path / "run")
    with pytest.raises(ConfigError, match="epochs: wanted at least 1, or weights"):
        TrainConfig(**config)
    with pytest.raises(ConfigError, match="weights: wanted none for method qat"):
        TrainConfig(method="qat", teacher="fp", weights="other.pt")


def test_help_names_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    names = "lenet,resnet20,vgg_small,mobilenetv2_small,ensemble,module:function"
    assert f"{{{names}}}" in capsys.readouterr().out


def test_python_says_the_same(nets, tmp_path):
    config = TrainConfig(model=f"{nets}:tiny", epochs=1, threads=1)
    train(config, tmp_path / "run", log=lambda line: None)
    with trust(config.model):
        assert load_run(tmp_path / "run").config == config
