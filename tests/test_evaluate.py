import base64
import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from testing import randn, tensor
from torch import nn

from divqat import evaluate
from divqat.evaluate import plots
from divqat.evaluate.audits import audits
from divqat.evaluate.result import (
    AttackResult,
    Confidence,
    Result,
    VictimResult,
    hardware,
    versions,
)
from divqat.evaluate.tables import Table, floor_line, results_table, spread
from divqat.victim import Victim

pytestmark = pytest.mark.usefixtures("painted")


def test_predict_gives_logits_of_any_model():
    images = torch.randint(256, (7, 1, 2, 2), dtype=torch.uint8)
    wanted = images.flatten(1) / 127.5 - 1
    torch.testing.assert_close(
        evaluate.predict(nn.Flatten().eval(), images, batch_size=3), wanted, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        evaluate.predict(lambda x: x.flatten(1), images), wanted, rtol=0, atol=1e-6
    )


def test_predict_refuses_what_gives_wrong_numbers():
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="training mode"):
        evaluate.predict(nn.Flatten(), images)
    with pytest.raises(TypeError, match="uint8"):
        evaluate.predict(nn.Flatten().eval(), images.float())
    with pytest.raises(ValueError, match="images: wanted"):
        evaluate.predict(nn.Flatten().eval(), images[:0])
    with pytest.raises(FloatingPointError):
        evaluate.predict(lambda x: x.flatten(1) / 0 * 0, images)


def test_metrics_by_hand():
    probs = tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [1, 0, 0], [0.3, 0.3, 0.4]])
    labels = torch.tensor([0, 1, 2, 2])
    assert evaluate.accuracy(probs, labels) == 0.75
    assert evaluate.fidelity(probs, 10 * probs) == 1
    assert evaluate.fidelity(probs, probs.roll(2, dims=0)) == 0.5  # 0 1 0 2 beside 0 2 0 1
    assert evaluate.mean_top_probability(probs) == pytest.approx(0.725)
    h = [-sum(p * math.log(p) for p in row if p > 0) for row in probs.tolist()]
    assert evaluate.entropy(probs) == pytest.approx(sum(h) / 4)
    assert evaluate.chance(labels) == 0.5


def test_softmax_rows_sum_to_one():
    probs = evaluate.softmax(100 * randn(5, 3))
    assert evaluate.are_distributions(probs)


def test_are_distributions():
    assert not evaluate.are_distributions(tensor([[0.5, 0.4]]))
    assert not evaluate.are_distributions(tensor([[1.5, -0.5]]))


def test_is_deterministic():
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    assert evaluate.is_deterministic(Victim(lambda x: x.flatten(1)), images)
    noisy = Victim(lambda x: x.flatten(1) + torch.rand(1, 4))
    assert not evaluate.is_deterministic(noisy, images)
    assert noisy.queries == 4


def test_top_probability_histogram():
    histogram = evaluate.top_probability_histogram(tensor([[1, 0], [0.52, 0.48], [0.03, 0.97]]))
    assert len(histogram) == 20
    assert (histogram[10], histogram[19], sum(histogram)) == (1, 2, 3)


def test_accuracy_wants_one_label_per_row():
    with pytest.raises(ValueError, match="outputs"):
        evaluate.accuracy(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))


def confidence(peak, seed):
    logits = randn(2000, 10, seed=seed) * peak
    return Confidence.of(logits.softmax(1))


def victim(seed, name, method, accuracy, soft, hard, peak, **settings):
    wobble = 0.004 * (seed - 1)
    return VictimResult(
        seed=seed,
        name=name,
        method=method,
        settings=settings,
        accuracy_fp=0.931 + wobble,
        accuracy_fake=None if method == "fp" else accuracy + wobble,
        accuracy_onnx=None if method == "fp" else accuracy + wobble,
        validation_accuracy=accuracy + 0.01,
        argmax_agreement=None if method == "fp" else 0.998,
        int8_layers=None if method == "fp" else 9,
        float_layers=None if method == "fp" else 0,
        test=confidence(2 * peak, seed),
        transfer=confidence(peak, seed + 10),
        deterministic=True,
        distributions=True,
        attacks={
            "probs": AttackResult(accuracy=soft + 2 * wobble, fidelity=soft, queries=1000),
            "label": AttackResult(accuracy=hard + 2 * wobble, fidelity=hard, queries=1000),
        },
    )


def fake_result(**changes):
    victims = [
        row
        for seed in range(3)
        for row in (
            victim(seed, "qat", "qat", 0.925, 0.72, 0.59, 3),
            victim(seed, "divqat", "divqat", 0.918, 0.412, 0.387, 1.5, weight=0.15, temperature=4),
            victim(seed, "smooth <|>", "label_smoothing", 0.924, 0.73, 0.6, 1, label_smoothing=0.1),
        )
    ]
    fields = {
        "dataset": "fashion-mnist",
        "num_classes": 10,
        "chance": 0.1,
        "query_set": "openclipart",
        "query_budget": 1000,
        "attack": "KnockoffNets",
        "attack_settings": {"epochs": 10, "lr": 0.02},
        "clone": "vgg_small",
        "seeds": [0, 1, 2],
        "command": "divqat run --config configs/fashion.yaml",
        "date": "2026-01-01T00:00:00",
        "seconds": 12.5,
        "versions": versions(),
        "hardware": hardware(),
        "victims": victims,
    }
    return Result(**{**fields, **changes})


def write_run(run_dir, result):
    """A run folder as `divqat run` leaves it."""
    result.save(run_dir / "result.json")
    for i, row in enumerate(result.victims):
        folder = run_dir / f"seed{row.seed}" / row.name
        folder.mkdir(parents=True)
        lines = ["epoch,ce,divergence,top_probability,validation_accuracy,seconds"]
        for epoch in range(1, 9):
            lines.append(
                f"{epoch},{1.5 / epoch + 0.05 * i:.4f},{0.1 * epoch * (row.method == 'divqat')},"
                f"{1 - 0.5 / epoch},{row.accuracy - 0.2 / epoch},3"
            )
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
        rows = [{"layer": f"features.{n}.conv", "sqnr_db": 40 - 2 * n + i} for n in range(8)]
        rows.append({"layer": "head", "sqnr_db": None})
        (folder / "layers.json").write_text(json.dumps({"rows": rows}))


def test_result_survives_json(tmp_path):
    result = fake_result()
    result.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == result


def test_result_must_be_complete(tmp_path):
    with pytest.raises(FileNotFoundError, match="divqat run"):
        Result.load(tmp_path / "result.json")
    data = fake_result().to_dict()
    del data["victims"][0]["accuracy_fp"]
    with pytest.raises(ValueError, match=r"not a divqat result: .*accuracy_fp"):
        Result.from_dict(data)
    with pytest.raises(ValueError, match="victims"):
        Result.from_dict({})


@pytest.mark.parametrize("change", [{"name": "../../x"}, {"name": "/x"}])
def test_a_result_does_not_say_what_is_read_elsewhere(tmp_path, change):
    result = fake_result()
    rows = [replace(result.victims[0], **change), *result.victims[1:]]
    replace(result, victims=rows).save(tmp_path / "result.json")
    with pytest.raises(ValueError, match="wanted the name of a folder"):
        evaluate.write_report(tmp_path)


def test_deployed_accuracy_is_that_of_the_exported_model():
    row = victim(1, "qat", "qat", 0.9, 0.7, 0.6, 1)
    assert replace(row, accuracy_onnx=0.8).accuracy == 0.8
    assert replace(row, accuracy_onnx=None).accuracy == 0.9
    assert replace(row, accuracy_onnx=None, accuracy_fake=None).accuracy == row.accuracy_fp
    assert replace(row, attacks={}).best is None


def test_spread():
    assert spread([0.5, 0.7], scale=100) == "60.0 ± 14.1"
    assert spread([0.5, None], scale=100) == "50.0"
    assert spread([None]) == "–"


def test_results_table_shows_all_numbers():
    text = results_table(fake_result())
    lines = text.splitlines()
    assert len({len(line) for line in lines[:5]}) == 1  # columns line up
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[:5]]
    row = dict(zip(cells[0], cells[3], strict=True))
    assert row == {
        "Victim": "divqat",
        "Method": "divqat weight=0.15, temperature=4",
        "FP acc": "93.1 ± 0.4",
        "Deployed acc": "91.8 ± 0.4",
        "Agreement": "99.8 ± 0.0",
        "Clone soft": "41.2 ± 0.8",
        "Clone hard": "38.7 ± 0.8",
        "Best clone": "41.2 ± 0.8",
        "Fidelity soft": "41.2 ± 0.0",
        "Fidelity hard": "38.7 ± 0.0",
    }
    assert lines[-1] == "Label-only floor (hard-label clone of plain QAT): 59.0 ± 0.8 %"
    assert r"smooth \<\|\>" in text


def test_floor_without_control():
    assert "unknown" in floor_line(fake_result(victims=[]))


def test_table_escapes_html():
    assert "<td>a &lt;b&gt;</td>" in Table(["x", "y"], [["a <b>", "1"]]).html()


def failed(result):
    return {audit.name for audit in audits(result) if not audit.ok}


def test_audits_of_a_sound_result():
    # DivQAT costs 0.7 points and label smoothing does not beat the floor: both must be said.
    assert failed(fake_result()) == {
        "divqat keeps its accuracy",
        "smooth <|> beats showing labels only",
    }
    line = next(str(a) for a in audits(fake_result()) if a.name == "divqat keeps its accuracy")
    assert line == "CHECK divqat keeps its accuracy: -0.70 points beside plain QAT, -0.5 allowed"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"deterministic": None}, "victims are deterministic"),
        ({"distributions": False}, "answers are distributions"),
        ({"argmax_agreement": 0.98}, "the exported int8 model is what is attacked"),
        ({"argmax_agreement": None}, "the exported int8 model is what is attacked"),
        ({"method": "other"}, "plain QAT is the control"),
        ({"seed": 5}, "seeds"),
        ({"attacks": {}}, "attacked with soft and hard answers"),
        (
            {"attacks": {"probs": AttackResult(accuracy=0.1, fidelity=0.1, queries=1001)}},
            "the query budget is respected",
        ),
    ],
)
def test_audits_find_what_is_wrong(change, name):
    result = fake_result()
    changed = fake_result(victims=[replace(result.victims[0], **change), *result.victims[1:]])
    if name == "plain QAT is the control":
        changed = fake_result(victims=[replace(v, **change) for v in result.victims])
    if name == "seeds":
        changed = fake_result(victims=[v for v in changed.victims if v.seed])
    assert name in failed(changed)


def test_audit_of_an_attack_at_chance():
    weak = {"probs": AttackResult(accuracy=0.12, fidelity=0.1, queries=10)}
    result = fake_result(victims=[replace(v, attacks=weak) for v in fake_result().victims])
    assert "the attack works on plain QAT" in failed(result)


def test_audits_of_nothing():
    assert failed(fake_result(victims=[])) >= {"seeds", "plain QAT is the control"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    pytest.importorskip("matplotlib")
    run_dir = tmp_path_factory.mktemp("run")
    write_run(run_dir, fake_result())
    evaluate.write_report(run_dir)
    return run_dir


def test_html_report_is_self_contained(run_dir):
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(pictures) == 4
    pictures = [base64.b64decode(picture) for picture in pictures]
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 1000 for picture in pictures)
    assert not re.search(r'(src|href)="(?!data:)|https?://', html)
    assert "smooth &lt;|&gt;" in html and "smooth <|>" not in html
    assert "Warnings" not in html
    for wanted in ("41.2 ± 0.8", "Label-only floor", "divqat run --config", "12 s", "torch"):
        assert wanted in html


def test_markdown_report_says_the_same_and_shows_plots(run_dir):
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    assert results_table(fake_result()).splitlines()[3] in text
    assert "CHECK divqat keeps its accuracy" in text
    plots = re.findall(r"\]\((plots/\w+\.png)\)", text)
    assert sorted(plots) == [
        f"plots/{n}.png" for n in ("clones", "confidence", "layers", "training")
    ]
    assert all((run_dir / plot).is_file() for plot in plots)


def test_report_of_a_run_that_has_only_begun(tmp_path):
    pytest.importorskip("matplotlib")
    bare = VictimResult(seed=0, name="qat", method="qat", settings={}, accuracy_fp=0.9)
    fake_result(victims=[bare]).save(tmp_path / "result.json")
    assert evaluate.write_report(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "plots" / "clones.png").is_file()
    fake_result(victims=[]).save(tmp_path / "result.json")
    evaluate.write_report(tmp_path)


def test_the_way_of_a_budget_is_shown(tmp_path):
    pytest.importorskip("matplotlib")
    path = [dict(share=s, validation_accuracy=0.9 - s / 10, misled=s) for s in (1.0, 0.5, 0.0)]
    budget = dict(path=path, share=0.5, reference=0.9, points=5.0)
    assert plots.budget_path(budget, tmp_path / "budget.png").stat().st_size > 1000


def test_report_without_matplotlib(tmp_path, monkeypatch):
    fake_result().save(tmp_path / "result.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"divqat\[report\]"):
        evaluate.write_report(tmp_path)
