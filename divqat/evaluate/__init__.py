"""How extractable is a model? Attack every victim, behind every defense, with every attack.

Example:
    >>> from divqat.evaluate import Grid, Subject, evaluate
    >>> grid = Grid(attacks=("knockoff", "knockoff:reading=label"), defenses=("none",), seeds=3)
    >>> evaluate([Subject("mine", "model.onnx")], splits, grid, "runs/mine")  # doctest: +SKIP
"""

from divqat.evaluate.grid import Grid
from divqat.evaluate.report import write_report
from divqat.evaluate.results import Cell, Evaluation, Released
from divqat.evaluate.run import evaluate
from divqat.evaluate.subject import Subject

__all__ = ["Cell", "Evaluation", "Grid", "Released", "Subject", "evaluate", "write_report"]
