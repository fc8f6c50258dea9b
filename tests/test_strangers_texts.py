"""Texts that somebody else wrote, in reports and on a terminal: SECURITY.md, held to its word."""

import re
import warnings
from dataclasses import replace

import pytest
from evaluations import fake_evaluation, released
from test_strangers import write_run
from test_victim_onnx import linear_onnx

from divqat import cli
from divqat._util.files import write_json
from divqat._util.text import markdown, printable
from divqat.data import pictures
from divqat.evaluate import Evaluation, write_report
from divqat.evaluate.audits import Audit
from divqat.evaluate.page import Section, write_page
from divqat.evaluate.table import Table
from divqat.experiments.deploy import file_fingerprint
from divqat.train import TrainConfig, load_run

NASTY = (
    "![x](//e.org) <img src=x onerror=y> `$\\frac{` &amp; *a* _b_ ~c~ | d\n\n# e "
    "\x1b]0;f\x07\u202eg"
)
UNSEEN = "\x1b\x07\x9b\u202e\u2066\u200b\x00\r"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("T-shirt/top, 93.0 ± 0.1 (2)", "T-shirt/top, 93.0 ± 0.1 (2)"),
        ("vgg_small", "vgg_small"),
        ("_a_", r"\_a\_"),
        ("a__b", r"a\_\_b"),
        ("[a](b)", r"\[a\](b)"),
        ("![a](b)", r"!\[a\](b)"),
        ("<a>", r"\<a\>"),
        ("&lt;", r"\&lt;"),
        ("*a* `b` ~c~ $d$ e|f \\", r"\*a\* \`b\` \~c\~ \$d\$ e\|f \\"),
        ("a\n\n# b", "a # b"),
        ("\x1b[2J", r"\\x1b\[2J"),
        ("a\u202eb\u200b", r"a\\u202eb\\u200b"),
    ],
)
def test_markdown_shows_the_text(text, wanted):
    assert markdown(text) == wanted


def test_a_terminal_gets_no_orders():
    assert printable("a\nb ü") == "a\nb ü"
    shown = printable(UNSEEN)
    assert shown.isascii() and shown.isprintable()
    assert shown == r"\x1b\x07\x9b\u202e\u2066\u200b\x00\r"


def test_every_text_of_a_page_is_a_text(tmp_path):
    audit = Audit(NASTY, False, NASTY)
    table = Table([NASTY, NASTY], [[NASTY, NASTY]])
    plot = tmp_path / "plots" / "x.png"
    plot.parent.mkdir()
    plot.write_bytes(b"")
    write_page(tmp_path, NASTY, [Section(NASTY, NASTY, table, plot, (audit,))])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for page in (text, html):
        assert not set(UNSEEN) & set(page)
    # title, heading, text, three lines of the table, picture, audit: nothing began a line
    lines = [line for line in text.splitlines() if line]
    assert [line[:3] for line in lines] == ["# !", "## ", "!\\[", "| !", "| -", "| !", "![!", "- C"]
    bare = re.sub(r"\\[^a-z\s]", "", text.replace("](plots/x.png)", "")).replace("\n![", "\n")
    assert not re.findall(r"[`<>\[*~$&]|\b_|_\b", bare)
    assert bare.count("|") == 3 * 3  # of three lines with two columns
    for tag in re.findall(r"<[^>]*>", html.split("</head>")[1]):
        assert "onerror" not in tag or tag.startswith("<img alt=")
    assert '<img alt="![x](//e.org) &lt;img src=x onerror=y&gt;' in html


@pytest.mark.filterwarnings("ignore:Glyph")  # a picture has no orders either
def test_a_report_of_nasty_names(tmp_path):
    pytest.importorskip("matplotlib")
    name = NASTY.replace("\n", " ")
    folder = "".join(c for c in name if c.isprintable()).replace("/", "").replace("\\", "")
    nasty = fake_evaluation([(folder, name, 0.9, 0.5, 0.4)], seeds=1, versions={name: name})
    texts = ("dataset", "deployed", "command", "date", "hardware")
    grid = {**nasty.grid, "query_set": name, "clones": [name]}
    replace(nasty, grid=grid, **dict.fromkeys(texts, name)).save(tmp_path / "evaluation.json")
    write_report(tmp_path)  # a $ in a plot is no formula
    for page in ("report.md", "report.html"):
        content = (tmp_path / page).read_text(encoding="utf-8")
        assert "<img src=x" not in content.replace(r"\<", "").replace("&lt;", "")
        assert not set(UNSEEN) & set(content)


def begun(folder, name="qat"):
    """The folder of a study that has trained a victim."""
    row = released(0, name, "qat", 0.9)
    fake_evaluation(released=[row], cells=[]).save(folder / "evaluation.json")
    return folder


@pytest.mark.parametrize("name", ["../../outside", "x/../../../outside"])
def test_a_report_reads_what_is_in_its_folder(tmp_path, name):
    pytest.importorskip("matplotlib")
    folder = begun(tmp_path / "run", name)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "metrics.csv").write_text("epoch,ce\n1,2\n")
    with pytest.raises(ValueError, match="wanted the name of a folder"):
        write_report(folder)


def test_a_table_of_epochs_that_is_none(tmp_path):
    pytest.importorskip("matplotlib")
    folder = begun(tmp_path) / "seed0" / "qat"
    folder.mkdir(parents=True)
    for content in ("epoch,ce\n1,many\n", "ce\n1\n", f"epoch,ce\n1,{'1' * 200_000}\n"):
        (folder / "metrics.csv").write_text(content)
        with pytest.raises(ValueError, match=r"metrics\.csv is not a table of epochs"):
            write_report(tmp_path)


@pytest.mark.parametrize(
    "content", [{}, {"rows": 7}, {"rows": [7]}, {"rows": [{"layer": "a", "sqnr_db": "b"}]}]
)
def test_a_summary_of_layers_that_is_none(tmp_path, content):
    pytest.importorskip("matplotlib")
    write_json(begun(tmp_path) / "seed0" / "qat" / "layers.json", content)
    with pytest.raises(
        ValueError, match=r"layers\.json(?: is not a summary of layers|: the key 'rows' is missing)"
    ):
        write_report(tmp_path)


def test_errors_show_names_of_files_and_are_not_endless(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path / "\x1b]0;x\x07")]) == 1
    assert r"\x1b]0;x\x07" in capsys.readouterr().err
    run = write_run(tmp_path / "run", "x" * 100_000)
    assert cli.main(["export", str(run)]) == 2
    error = capsys.readouterr().err
    assert len(error) < 2100 and error.endswith(" ...\n")


def test_what_a_run_folder_says_is_printed_as_a_text(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    linear_onnx(folder / "model.onnx", "batch", size=8)
    about = {"source": load_run(folder).fingerprint, "seconds": 0}
    onnx = {"source": f"{file_fingerprint(folder / 'model.onnx')}, default options"}
    onnx |= {"least_agreement": 1.0}
    write_json(folder / "export.json", about | {"text": "e\x1b[2J"})
    write_json(folder / "verify.json", about | onnx | {"text": "v\x1b[2J"})
    float_run = {"config": TrainConfig(epochs=1, threads=1).to_dict()}
    write_json(write_run(tmp_path / "fp", changes=float_run) / "summary.json",
               {"warnings": ["w\x1b[2J"]})  # fmt: skip
    for command in (f"export {folder}", f"verify {folder}", f"train --resume --out {tmp_path}/fp"):
        assert cli.main(command.split()) == 0
        shown = capsys.readouterr().out
        assert r"\x1b[2J" in shown and "\x1b" not in shown


def test_warnings_show_names_of_files(tmp_path):
    pytest.importorskip("PIL")
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "\x1b[2J.png").write_bytes(b"no")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pictures.decode(pictures.list_pictures(tmp_path), (8, 8), 1, "crop")
    assert r"\x1b[2J.png" in str(caught[0].message) and "\x1b" not in str(caught[0].message)


@pytest.mark.parametrize(
    ("rows", "field", "value", "message"),
    [
        ("released", "accuracy", "9" * 1000, r"accuracy: wanted float \| None, got str"),
        ("released", "accuracy", 10**400, r"accuracy: wanted float \| None, got int"),
        ("released", "accuracy", True, r"accuracy: wanted float \| None, got bool"),
        ("released", "agreement", [1], r"agreement: wanted float \| None, got list"),
        ("released", "seed", "../..", "seed: wanted int, got str"),
        ("released", "victim", 7, "victim: wanted str, got int"),
        ("released", "test", {"top_probability": 1, "entropy": 1, "histogram": ["x"]}, "histogram"),
        ("cells", "accuracy", "x", "accuracy: wanted float, got str"),
        ("cells", "curve", ["x"], "curve: wanted list"),
    ],
)
def test_numbers_of_an_evaluation_are_numbers(tmp_path, rows, field, value, message):
    result = fake_evaluation(seeds=1).to_dict()
    result[rows][0][field] = value
    write_json(tmp_path / "evaluation.json", result)
    with pytest.raises(ValueError, match=rf"not a divqat evaluation: .*{message}"):
        Evaluation.load(tmp_path / "evaluation.json")
