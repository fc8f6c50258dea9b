"""README and docs/: short where it should be, true to the results, and all of its code runs.

What takes longer, the notebook and the look of the pages, is in check_docs.py (``make test-docs``).
"""

import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from pages import ROOT, blocks, commands
from testing import randn

from bench.__main__ import parser as bench_parser
from bench.drawings import THEMES
from bench.pictures import NAMES, RESIDUAL, RESULTS, best_clones
from divqat.cli.parser import build_parser
from divqat.evaluate import Evaluation
from divqat.models import build

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
# Blocks that the tests cannot run, with the reasons that stand above them.
NOT_RUN = {
    "docs/how-extractable.md": ["its packages bring 18 MB of weights"],
    "docs/ownership.md": [
        "it needs a trained run and a suspect",
        "it needs an authority's reply and a beacon",
    ],
}
# Programs of command lines that are not divqat's, and why the tests do not run them here.
OTHERS = {
    "git": "clones the repository",
    "pip": "installs; test_packaging.py and check_package.py install",
}
# What is short in the place of what takes long.
SHORT = {
    '"fashion-mnist"': '"digits"',
    '"openclipart"': '"noise", query_limit=60, threads=1',
    '"vgg_small", "lenet"': '"lenet",',
    '"jbda:start=owned"': '"jbda:start=owned,seeds=30"',
    "epochs=5": "epochs=1",
    ", seeds=3": ", seeds=1, holdout=20, labeled=60",
}


def test_the_front_page_is_short_and_in_order():
    assert README.count("\n") <= 130
    wanted = [
        "Five lines", "What it gains", "Two commands", "What is supported", "What it does not do",
        "Where to read on",
    ]  # fmt: skip
    headings = re.findall(r"^## (.*)$", README, re.M)
    assert len(headings) == len(wanted)
    assert all(h.startswith(w) for h, w in zip(headings, wanted, strict=True))
    code = README.partition("```python")[2].partition("```")[0]
    assert re.findall(r"# (\d)", code) == list("12345")
    sentences = README.split("\n\n")[1]
    assert len(re.findall(r"\.(?:\s|$)", sentences)) == 2
    assert README.count("<img") == 1


def test_its_figures_are_those_of_the_committed_results():
    lines, _ = best_clones()
    plain, defended = (f"{x.means[0]:.0f}" for x in lines if list(x.queries) == [27_540])
    victims = Evaluation.load(RESULTS / "misdirection-strong" / "evaluation.json").side_effects
    accuracy = {
        name: f"{100 * sum(row.accuracy for row in victims if row.victim == name) / 3:.1f}"
        for name in ("qat", "divqat")
    }
    own = Evaluation.load(RESULTS / "misdirection-strong-own" / "evaluation.json")
    stolen = [cell for cell in own.cells if cell.attack == "knockoff"]
    true = {
        name: f"{100 * sum(cell.accuracy for cell in stolen if cell.victim == name) / 3:.0f}"
        for name in ("qat", "divqat")
    }
    table = README.partition("## What it gains")[2].partition("<picture>")[0]
    rows = [row.split("|")[2:4] for row in table.splitlines() if row.startswith("| ")]
    cells = [[cell.strip(" *") for cell in row] for row in rows]
    assert cells[1] == [accuracy["qat"], accuracy["divqat"]]
    assert cells[2] == [plain, defended]
    assert cells[3] == ["68", f"{RESIDUAL:.0f}"]
    assert cells[5] == [true["qat"], true["divqat"]]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"it gets {RESIDUAL}," in page and "plain QAT's soft answers 68.0" in page
    assert cells[6] == ["72", "72"] and "| 71.7 ± 1.2 | 71.7 ± 1.2 |" in page


def names_of(page):
    """What the reader has when a page's code begins."""
    torch.manual_seed(0)
    images, labels = randn(20, 1, 8, 8).clamp(-1, 1), torch.arange(20) % 10
    model = build("lenet", in_channels=1, num_classes=10, image_size=8).eval()
    loader = [(images, labels)] * 3
    return {
        "README.md": {"model": model, "loader": loader, "images": images, "secret": 731},
        "docs/getting-started.md": {"float_model": model, "loader": loader},
        "docs/how-extractable.md": {"model": model},
        "zoo/README.md": {},
        "docs/ownership.md": {},
        # its first block is the network, the others begin with a trained one
        "docs/own-model.md": {
            **{"float_model": model, "loader": loader, "images": images, "validation": loader},
            **{"validate": lambda model: 0.9, "reference": 0.9},
        },
    }[page]


@pytest.mark.slow
@pytest.mark.parametrize("page", dict.fromkeys(b.page for b in blocks() if b.language == "python"))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = names_of(page)
    given = names.get("model", names.get("float_model"))
    before = {} if given is None else {k: v.clone() for k, v in given.state_dict().items()}
    ran = []
    for block in blocks():
        if block.page != page or block.language != "python":
            continue
        code = block.code
        if block.reason is not None:
            compile(code, page, "exec")
            continue
        if page == "docs/how-extractable.md":
            for long, short in SHORT.items():
                assert long in code
                code = code.replace(long, short)
        exec(code, names)
        ran.append(code)
    assert ran
    if page == "docs/how-extractable.md":
        result = names["result"]
        assert {cell.attack for cell in result.cells} == set(names["grid"].attacks)
        assert {row.defense for row in result.released} == {"none", "rounding:decimals=1"}
        assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    elif before and page != "docs/own-model.md":
        moved = dict(names["model"].named_parameters())["classifier.5.weight"]
        assert not torch.equal(moved, before["classifier.5.weight"])
    if page == "docs/getting-started.md":
        assert (tmp_path / "model.onnx").stat().st_size > 0
        assert "SQNR" in capsys.readouterr().out
        for name, value in given.state_dict().items():
            assert torch.equal(value, before[name])


def test_what_is_not_run_says_why():
    found = {}
    for block in blocks():
        assert block.language in ("python", "bash"), (block.page, block.code)
        if block.reason is not None:
            found.setdefault(block.page, []).append(block.reason)
    assert found == NOT_RUN


def test_every_command_line_is_understood():
    counts = dict.fromkeys(("divqat", "make", "bench", *OTHERS), 0)
    for page, line in commands():
        words = shlex.split(line, comments=True)
        program, arguments = words[0], words[1:]
        if program == "divqat":
            build_parser().parse_args(arguments)
        elif program == "make":
            assert re.search(rf"^{arguments[0]}:", MAKEFILE, re.M), (page, line)
        elif words[:3] == ["python", "-m", "bench"]:
            bench_parser().parse_args(words[3:])
            program = "bench"
        else:
            assert program in OTHERS, (page, line)
        counts[program] += 1
    assert counts["divqat"] >= 40 and counts["make"] >= 4
    assert {name: counts[name] for name in OTHERS} == {"git": 1, "pip": 3}


def test_pictures_are_small_and_in_both_themes():
    shown = {
        name
        for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for name in re.findall(r"images/([\w-]+\.png)", path.read_text(encoding="utf-8"))
    }
    drawn = {f"{name}-{theme.name}.png" for name in NAMES for theme in THEMES}
    assert shown == drawn == {path.name for path in (ROOT / "docs" / "images").iterdir()}
    for path in (ROOT / "docs" / "images").iterdir():
        assert path.stat().st_size < 150_000


def test_the_notebook_is_executed():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "/tmp" not in json.dumps(outputs)


def test_every_public_package_has_a_page():
    documented = {
        match
        for path in (ROOT / "docs" / "api").glob("*.md")
        for match in re.findall(r"^# (divqat[.\w]*)$", path.read_text(encoding="utf-8"), re.M)
    }
    packages = {f"divqat.{p.parent.name}" for p in (ROOT / "divqat").glob("*/__init__.py")}
    internal = {"divqat._util", "divqat.cli", "divqat.experiments"}
    assert documented == packages - internal | {"divqat"}


class Links(HTMLParser):
    """The targets, and the places that can be targets, of an HTML page."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src", "srcset") and value:
                self.targets.append(value)
            if name in ("id", "name") and value:
                self.ids.add(value)


@pytest.mark.slow
def test_the_site_builds_and_all_its_links_lead_somewhere(tmp_path):
    """And it needs nothing from elsewhere."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in tmp_path.rglob("*.html")}
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert len(pages) > len(nav) + 10
    for page, links in pages.items():
        if page.name == "404.html":  # for a server, with absolute links
            continue
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme:
                assert parts.scheme in ("https", "data", "mailto"), (page, target)
                continue
            path = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
            path = path / "index.html" if path.is_dir() else path
            assert path.is_file(), (page, target)
            if parts.fragment and path in pages:
                assert unquote(parts.fragment) in pages[path].ids | {"__search"}, (page, target)
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', text), page
