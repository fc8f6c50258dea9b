"""``python -m bench notebook``: run docs/quickstart.ipynb and keep its outputs.

Nothing of the machine is kept: no paths, no times of execution.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from divqat._util.files import write_text

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def executed(path: Path = NOTEBOOK) -> Any:
    """The notebook after a run of all its cells in an empty folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=None, kernel_name="python3", record_timing=False,
            resources={"metadata": {"path": folder}},
        )  # fmt: skip
        return client.execute()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``python -m bench notebook`` has no options."""


def main(args: argparse.Namespace) -> None:
    """Run it and write it back."""
    import nbformat

    write_text(NOTEBOOK, nbformat.writes(executed()) + "\n")
    print(f"wrote {NOTEBOOK.relative_to(ROOT)}; look at its outputs, then commit it")
