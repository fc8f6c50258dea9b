"""The plots of an evaluation: nothing is cut off, and no two attacks look alike."""

from dataclasses import replace
from pathlib import Path

import pytest
from evaluations import cell, fake_evaluation
from matplotlib.figure import Figure

from divqat.evaluate import Evaluation, plots

pytestmark = pytest.mark.usefixtures("painted")
RESULTS = Path(__file__).parent.parent / "bench" / "results"


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, each as large as it is saved."""
    drawn, save = [], Figure.savefig

    def saved(figure, *args, **kwargs):
        drawn.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saved)
    return drawn


# victims beside each other; settings that make a name long; more attacks than colors
@pytest.mark.parametrize("name", ["misdirection-strong-small", "data-free", "attacks"])
def test_a_budget_curve_has_room_for_its_legend(name, figures, tmp_path):
    result = Evaluation.load(RESULTS / name / "evaluation.json")
    assert plots.budget_curve(result, tmp_path / "budget.png") == tmp_path / "budget.png"
    (figure,) = figures
    (legend,) = figure.legends
    inside, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= inside.x0 and inside.x1 <= whole.x1 and inside.y1 <= whole.y1
    shown = {(c.attack, c.clone) for c in result.cells if "shuffled" not in c.attack}
    assert len(legend.get_texts()) == len(shown)
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(shown)
    assert all(ax.get_window_extent().height > 100 for ax in figure.axes)


def test_curves_by_epoch_are_those_that_were_measured(figures, tmp_path):
    curves = [[0.1, 0.5, 0.6], [0.3, 0.5, 0.8]]
    cells = [replace(cell(seed, "qat", "knockoff", 0.7), curve=curves[seed]) for seed in (0, 1)]
    short = replace(cell(0, "qat", "fixmatch", 0.7), curve=[0.1, 0.2])
    fewer = replace(cells[0], attack="copycat", budget=100)
    behind = replace(cells[0], attack="sift", defense="label")
    result = fake_evaluation(cells=[*cells, short, fewer, behind])
    assert plots.epoch_curve(result, tmp_path / "epochs.png") == tmp_path / "epochs.png"
    ((ax,), (legend,)) = figures[0].axes, figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["knockoff (vgg_small)"]
    (line,) = (container.lines[0] for container in ax.containers)
    assert list(line.get_xdata()) == [1, 2, 3]
    assert list(line.get_ydata()) == pytest.approx([20, 50, 70])
    assert plots.epoch_curve(fake_evaluation(cells=[short]), tmp_path / "none.png") is None


@pytest.mark.slow
def test_no_two_of_nine_victims_look_alike(figures, tmp_path):
    result = Evaluation.load(RESULTS / "baselines" / "evaluation.json")
    for draw in (plots.front, plots.answers):
        assert draw(result, tmp_path / "plot.png") == tmp_path / "plot.png"
    shown = {row.victim for row in result.released}
    assert len(shown) == 9
    front, answers = figures
    squares = [h for h in front.legends[0].legend_handles if h.get_marker() == "s"]
    for handles in (squares, answers.legends[0].legend_handles):
        assert len({handle.get_color() for handle in handles}) == len(shown)
