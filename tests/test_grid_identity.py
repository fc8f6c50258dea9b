"""What a finished part of an evaluation is kept for, and what of it the audits see through."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_grid import QUICK
from torch import nn
from toys import (
    QUERIES,
    Killed,
    kill_at,
    same_bits,
    toy_images,
    toy_model,
    toy_splits,
    toy_victim,
)

from divqat.attacks import KnockoffNets, attack
from divqat.data import ImageSet
from divqat.defenses import DEFENSES
from divqat.evaluate import Grid, Subject, evaluate
from divqat.evaluate.audits import audits
from divqat.evaluate.cells import run_attack
from divqat.evaluate.defended import Defended
from divqat.evaluate.subject import Deployed, data_fingerprint
from divqat.experiments.deploy import AttackConfig

GRID = Grid(attacks=("knockoff",), budgets=(50,), epochs=1, seeds=1, holdout=20, **QUICK)


@pytest.fixture(scope="module")
def model():
    return toy_victim()


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    return evaluated(model, out), out


def evaluated(model, out, splits=None, **changed):
    subject = Subject("qat", model, "qat")
    grid = replace(GRID, **changed)
    return evaluate([subject], splits or toy_splits(), grid, out, log=lambda line: None)


def audit(result, name):
    (found,) = [found for found in audits(result) if found.name == name]
    return found


def test_other_labels_are_other_data(model, done, tmp_path):
    splits = toy_splits()
    test = ImageSet(splits.test.images, (splits.test.labels + 1) % splits.num_classes)
    changed = replace(splits, test=test)
    out = shutil.copytree(done[1], tmp_path / "out")
    kept, fresh = (evaluated(model, where, changed) for where in (out, tmp_path / "fresh"))
    assert kept.released[0].accuracy == fresh.released[0].accuracy < 0.3 < 0.9
    assert done[0].released[0].accuracy > 0.9
    assert kept.cells[0].accuracy == fresh.cells[0].accuracy != done[0].cells[0].accuracy


@pytest.mark.parametrize("part", ["queries", "train", "validation", "test"])
def test_each_pixel_counts(part):
    splits, queries = toy_splits(), QUERIES[:10]
    whole = data_fingerprint(splits, queries)
    if part == "queries":
        queries = queries.clone()
        queries[3, 0, 0, 0] ^= 1
    else:
        images = getattr(splits, part).images.clone()
        images[-1, 0, 0, 0] ^= 1
        splits = replace(splits, **{part: ImageSet(images, getattr(splits, part).labels)})
    assert data_fingerprint(splits, queries) != whole
    assert data_fingerprint(toy_splits(), QUERIES[:10]) == whole


class Rolled(nn.Module):
    """A network that is more than its weights."""

    def __init__(self, inner, by):
        super().__init__()
        self.inner, self.by = inner, by

    def forward(self, x):
        return self.inner(x).roll(self.by, 1)


def test_what_a_module_answers_tells_it_apart(model):
    a, b, c = (Subject("qat", Rolled(model, by).eval()).fingerprint(QUERIES) for by in (0, 0, 3))
    assert a == b != c


def test_weights_beside_an_onnx_file_tell_it_apart(model, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    found = set()
    for scale in (1, 2):
        file = tmp_path / f"{scale}" / "model.onnx"
        file.parent.mkdir()
        weight = scale * torch.arange(256.0).view(64, 4) / 256
        tensor = onnx.numpy_helper.from_array(weight.numpy(), "w")
        io = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Flatten", ["x"], ["f"]),
             onnx.helper.make_node("MatMul", ["f", "w"], ["y"])],
            "g", [io("x", 1, ["n", 1, 8, 8])], [io("y", 1, ["n", 4])], [tensor],
        )  # fmt: skip
        opset = [onnx.helper.make_opsetid("", 17)]
        made = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
        options = {"save_as_external_data": True, "location": "weights", "size_threshold": 0}
        onnx.save_model(made, str(file), **options)
        assert (file.parent / "weights").is_file()
        found.add(Subject("qat", file).fingerprint(QUERIES[:5]))
    assert len(found) == 2


def test_a_folder_of_queries_is_what_is_in_it():
    assert AttackConfig(query_set="folder", query_root="a").places == {"device"}
    assert AttackConfig(query_set="photos").places == {"device", "query_root"}


def test_a_victim_that_answers_otherwise_each_time_is_found(model, tmp_path):
    name = "victims are deterministic, in eval mode"

    def noisy(images):
        with torch.no_grad():
            return model(images) + torch.randn(len(images), 4)

    assert audit(evaluated(model, tmp_path / "still"), name).ok
    assert not audit(evaluated(noisy, tmp_path / "noisy"), name).ok


@pytest.mark.slow
def test_clones_of_labels_do_not_show_that_the_attack_works(tmp_path):
    attacks = ("knockoff", "fine-tune:tune_epochs=100", "labeled-only:epochs=20")
    constant = partial(lambda row, images: row.expand(len(images), -1), torch.eye(4)[:1] * 5)
    result = evaluated(constant, tmp_path / "a", attacks=attacks, labeled=60)
    best = {cell.attack: cell.accuracy for cell in result.cells}
    assert best["fine-tune:tune_epochs=100"] > 0.5 > 0.4 > best["knockoff"]
    assert not audit(result, "the attack works on an undefended victim").ok
    name = "the baseline without the victim is known"
    assert audit(result, name).ok
    result = evaluated(constant, tmp_path / "a", attacks=attacks[:2], labeled=60)
    assert not audit(result, name).ok and "add labeled-only" in audit(result, name).detail
    result = evaluated(constant, tmp_path / "a", attacks=attacks[:1], labeled=60)
    assert name not in {found.name for found in audits(result)}


def test_sets_that_were_not_compared_are_no_clean_ones(done):
    name = "queries are not the victim's images"
    assert audit(done[0], name).ok
    some = {key: count for key, count in done[0].overlap.items() if "train" not in key}
    found = audit(replace(done[0], overlap=some), name)
    assert not found.ok and "not compared, as the set is streamed: queries in train" in found.detail


def test_a_defense_that_remembers_is_asked_anew(model, tmp_path, monkeypatch):
    monkeypatch.setattr(attack, "QUERIES_PER_SAVE", 100)
    images = toy_images(300, seed=3)[0]
    deployed = Deployed(Subject("qat", model), images, toy_splits().test)
    knockoff, holdout = KnockoffNets(query_budget=300, epochs=1), toy_splits().validation
    clones, extract = [], KnockoffNets._extract

    def watched(self, task):
        clones.append(extract(self, task))
        return clones[-1]

    monkeypatch.setattr(KnockoffNets, "_extract", watched)

    def run(work):
        defended = Defended(deployed, DEFENSES["modelguard-s"](epsilon=0.5))
        run_attack(knockoff, defended, toy_model(seed=1), holdout, work)

    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 2.5)  # two of three chunks are asked
        with pytest.raises(Killed):
            run(tmp_path / "killed")
    run(tmp_path / "killed")
    whole, resumed = clones
    assert torch.equal(whole.transfer_set[1], resumed.transfer_set[1])
    assert same_bits(whole.clone, resumed.clone)
