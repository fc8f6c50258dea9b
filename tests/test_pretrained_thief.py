"""A thief whose clone has pretrained weights, of another size and with other channels."""

import pytest
import torch
from toys import same_bits, toy_splits, toy_victim

from divqat._util.foreign import foreign, trust
from divqat._util.settings import ConfigError
from divqat.evaluate import Grid, Subject, assessment, evaluate
from divqat.evaluate.tables import controls_table
from divqat.experiments.study import Study

MODULE = '''
import torch
import torch.nn.functional as F
from torch import nn

def body():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())

class Thief(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = body()
        self.body.load_state_dict(torch.load("body.pt"))
        self.head = nn.Linear(8 * 7 * 7, num_classes)

    def forward(self, images):
        images = F.interpolate(images.expand(-1, 3, -1, -1), (16, 16), mode="bilinear")
        return self.head(self.body(images))

def pretrained(in_channels, num_classes, image_size):
    assert (in_channels, image_size) == (1, (8, 8))
    return Thief(num_classes)
'''  # fmt: skip
ATTACKS = (
    "knockoff",
    "fixmatch:ratio=1",
    "fixmatch:ratio=1,victim=false",
    "s4l:labels=true",
    "s4l:labels=true,victim=false",
    "fine-tune:tune_epochs=1",
    "fine-tune:tune_epochs=1,victim=false",
)


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """The name of a module in the current folder, with the weights beside it."""
    name = f"thief_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save(foreign(f"{name}:body")().state_dict(), "body.pt")
    return name


def settings(nets):
    return {
        "attacks": ATTACKS, "query_set": "own:20+noise", "query_limit": 40, "epochs": 1, "seeds": 2,
        "clones": (f"{nets}:pretrained",), "batch_size": 20, "holdout": 20, "labeled": 20,
        "epsilons": (), "threads": 1,
    }  # fmt: skip


@pytest.mark.slow
def test_every_attack_and_control_starts_from_its_weights(nets, tmp_path, monkeypatch):
    attack, clones = assessment.run_attack, []

    def see(wanted, defended, clone, holdout, work):
        clones.append(clone)
        return attack(wanted, defended, clone, holdout, work)

    monkeypatch.setattr(assessment, "run_attack", see)
    victim = Subject("qat", toy_victim(), "qat")
    result = evaluate([victim], toy_splits(), Grid(**settings(nets)), tmp_path / "out",
                      log=lambda _: 0)  # fmt: skip
    assert len(clones) == len(result.cells) == 2 * len(ATTACKS)
    weights = torch.load("body.pt")
    first, second = clones[: len(ATTACKS)], clones[len(ATTACKS) :]
    for clone in clones:
        assert all(
            torch.equal(value, weights[key]) for key, value in clone.body.state_dict().items()
        )
    assert all(same_bits(clone, first[0]) for clone in first)
    assert all(same_bits(clone, second[0]) for clone in second)
    assert not torch.equal(first[0].head.weight, second[0].head.weight)  # its seed's own
    table = controls_table(result)
    assert [row[1:3] for row in table.rows[:-1]] == [list(ATTACKS[i : i + 2]) for i in (1, 3, 5)]


def test_a_study_may_name_it_if_it_is_trusted(nets):
    file = {"victims": {"qat": {"method": "qat"}}, "common": {"dataset": "digits"}, "seeds": [0]}
    grid = {key: value for key, value in settings(nets).items() if key != "seeds"}
    with pytest.raises(ConfigError, match=f"clones: {nets}:pretrained is code, .* --trust {nets}:"):
        Study.from_dict({**file, "evaluate": grid})
    with trust(f"{nets}:pretrained"):
        assert Study.from_dict({**file, "evaluate": grid}).grid.clones == (f"{nets}:pretrained",)
