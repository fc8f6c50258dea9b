"""Network traffic as vectors: the readers of NSL-KDD and N-BaIoT.

Both return float32 features [N, D] and labels int64 [N]: 0 for normal traffic, 1 for an attack.
"""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

NSL_KDD_COLUMNS = 43  # 41 features, the name of the attack, a difficulty
NAMES = (1, 2, 3)  # columns of NSL-KDD that hold names: protocol, service, flag
BAIOT_FEATURES = 115


@dataclass(frozen=True)
class Traffic:
    """Normalized features and labels, split 70 to 30."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def read_nsl_kdd(path: Path) -> tuple[Tensor, Tensor]:
    """NSL-KDD's text file, also gzipped, with or without a header. Names become one column per
    value, in alphabetical order; other features x become log(1 + |x|) · sign(x).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row has not 43 columns, or a feature is no number.
    """
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = csv.reader(data.decode().splitlines())
    rows = [row for row in lines if row and row[0].strip() != "duration"]
    wrong = [number for number, row in enumerate(rows, 1) if len(row) != NSL_KDD_COLUMNS]
    if wrong or not rows:
        where = f"row {wrong[0]}" if wrong else "an empty file"
        raise ValueError(f"{path}: wanted rows of {NSL_KDD_COLUMNS} columns, got {where}")
    labels = torch.tensor([int(row[41].strip() != "normal") for row in rows])
    numbers = [[float(x) for i, x in enumerate(row[:41]) if i not in NAMES] for row in rows]
    parts = [_compressed(torch.tensor(numbers, dtype=torch.float64))]
    for column in NAMES:
        values = sorted({row[column] for row in rows})
        codes = torch.tensor([values.index(row[column]) for row in rows])
        parts.append(torch.nn.functional.one_hot(codes, len(values)).double())
    return torch.cat(parts, 1).float(), labels


def read_n_baiot(root: Path, rows: int) -> tuple[Tensor, Tensor]:
    """The first ``rows`` rows of each of N-BaIoT's CSV files below ``root``.

    A file is normal traffic if its path has the word ``benign``, an attack if it has ``gafgyt`` or
    ``mirai``, as in both layouts in which the 89 files are published (``1.mirai.ack.csv``, or
    ``Danmini_Doorbell/mirai_attacks/ack.csv``). Other files are not read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file has not 115 features, or holds something else than numbers.
    """
    parts, labels = [], []
    for path in sorted(root.rglob("*.csv")):
        name = str(path.relative_to(root)).lower()
        attack = "gafgyt" in name or "mirai" in name
        if not attack and "benign" not in name:
            continue
        try:
            values = np.loadtxt(path, delimiter=",", skiprows=1, max_rows=rows, ndmin=2)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if values.shape[1] != BAIOT_FEATURES:
            raise ValueError(f"{path}: wanted {BAIOT_FEATURES} features, got {values.shape[1]}")
        parts.append(torch.from_numpy(values))
        labels.append(torch.full((len(values),), int(attack)))
    if not parts:
        raise FileNotFoundError(f"no CSV file of N-BaIoT below {root}")
    return _compressed(torch.cat(parts)).float(), torch.cat(labels)


def _compressed(x: Tensor) -> Tensor:
    """log(1 + |x|) · sign(x): bytes and counts span many orders of magnitude."""
    return x.abs().log1p() * x.sign()


def split(features: Tensor, labels: Tensor) -> Traffic:
    """70 % to train and 30 % to test, by a fixed seed; mean 0 and variance 1 by the training part,
    within ±5."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order.split([7 * len(order) // 10, len(order) - 7 * len(order) // 10])
    center, spread = features[train].mean(0), features[train].std(0)
    scaled = ((features - center) / torch.where(spread > 0, spread, 1.0)).clamp(-5, 5)
    return Traffic(scaled[train], labels[train], scaled[test], labels[test])
