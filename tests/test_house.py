"""Rules of the house that no linter knows; who may import whom is import-linter's, in make lint."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOPS = ("divqat", "kernels", "bench", "examples")
CODE = [path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))]


def test_nothing_lies_loose():
    loose = {path.name for path in (ROOT / "divqat").glob("*.py")}
    assert loose == {"__init__.py", "__main__.py"}


def test_only_the_ops_know_compiled_code():
    """Of the extension divqat._C and of divqat.kernels, which are not imported by their names."""
    for path in sorted((ROOT / "divqat").rglob("*.py")):
        inside = path.relative_to(ROOT / "divqat")
        text = re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text(encoding="utf-8"))
        if inside.parts[0] != "ops" and str(inside) != "__init__.py":  # which says where they are
            assert not re.findall(r"\b_C\b|\bdivqat\.kernels\b|\bimport kernels\b", text), inside


def test_files_are_short():
    long = {}
    for path in CODE + sorted((ROOT / "tests").rglob("*.py")):
        most = 500 if "tests" in path.parts else 300
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > most:
            long[str(path.relative_to(ROOT))] = lines
    assert not long


@pytest.mark.parametrize("top", ["divqat", "bench", "examples"])
def test_functions_are_short(top):
    """Without their docstrings. Triton kernels are not functions of that kind."""
    long = {}
    for path in sorted((ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0] if ast.get_docstring(node) else None
                told = first.end_lineno - first.lineno + 1 if first else 0
                lines = node.end_lineno - node.lineno + 1 - told
                if lines > 60:
                    long[f"{path.relative_to(ROOT)}: {node.name}"] = lines
    assert not long


def test_bench_has_no_circle():
    imports = {}
    for path in (ROOT / "bench").glob("*.py"):
        imports[path.stem] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bench"):
                inner = node.module.partition(".")[2]
                imports[path.stem] |= {inner} if inner else {alias.name for alias in node.names}
    graphlib.TopologicalSorter(imports).prepare()  # or CycleError, which names it
