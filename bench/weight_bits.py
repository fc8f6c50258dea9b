"""``python -m bench weight-bits``: the cost of weights that saturate no CPU, on Fashion-MNIST.

Short trainings: full precision, then plain QAT from its weights with each scheme; then the export
with default options of ONNX Runtime, on all 10,000 test images. A stopped run is resumed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.command import Row, add_common_arguments, matches, measured, set_up
from divqat import freeze_batchnorm, freeze_observers, models, prepare, preset
from divqat._util.files import load_checkpoint, save_checkpoint
from divqat.data import Splits, load, to_float
from divqat.export import export_onnx, verify
from divqat.nn._layer import QuantLayer
from divqat.ops import fake_quantize
from divqat.quantize import ungroup_weights

BATCH = 128


@dataclass(frozen=True)
class Steps:
    """Training steps of a network in full precision and in QAT."""

    fp: int
    qat: int


NETWORKS = {
    "lenet": Steps(600, 200),
    "resnet20": Steps(200, 64),
    "vgg_small": Steps(150, 50),
    "mobilenetv2_small": Steps(100, 40),
}
# scheme → preset and bits of a weight
SCHEMES = {
    "x86, 7 bits": ("x86", 7),
    "qnnpack, 7 bits": ("qnnpack", 7),
    "x86, 8 bits": ("x86", 8),
    "x86, pairs": ("x86", 8),  # the codes of any two weights of a channel add up to at most 128
    "qnnpack, 8 bits": ("qnnpack", 8),
}


def keep_pairs(model: nn.Module) -> nn.Module:
    """Constrain the codes of the two largest weights of each channel to 128 together; returns
    ``model``."""
    ungroup_weights(model)
    for layer in model.modules():
        if isinstance(layer, QuantLayer):
            _keep_pairs(layer)
    return model


def _keep_pairs(layer: QuantLayer) -> None:
    axis = layer.WEIGHT_AXIS

    @torch.no_grad()
    def scale_of(weight: Tensor) -> Tensor:  # [C]
        rows = weight.movedim(axis, 0).flatten(1).abs()
        # 127, as each of the two codes may be rounded up by a half
        return rows.topk(min(2, rows.shape[1])).values.sum(1).clamp(min=1e-6) / 127

    def quantized(weight: Tensor) -> Tensor:
        scale = scale_of(weight)
        return fake_quantize(
            weight, scale, torch.zeros_like(scale, dtype=torch.int32), -127, 127, axis
        )

    layer.quantize_weight = quantized  # type: ignore[method-assign]
    layer.weight_qparams = lambda: scale_of(layer.folded()[0])  # type: ignore[method-assign]


def learn(
    model: nn.Module, splits: Splits, steps: int, lr: float, seed: int, *, rises: bool
) -> nn.Module:
    """Train by SGD on a shuffled training set; returns ``model`` in eval mode."""
    train, rows = splits.train, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.3 if rises else 0.01
    )
    order = torch.cat(
        [torch.randperm(len(train), generator=rows) for _ in range(1 + BATCH * steps // len(train))]
    )
    model.train()
    for step, rows_of_batch in enumerate(order.split(BATCH)[:steps]):
        if step == 2 * steps // 3:
            freeze_batchnorm(freeze_observers(model))
        images, labels = train.images[rows_of_batch], train.labels[rows_of_batch]
        loss = F.cross_entropy(model(to_float(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def load_or_train(
    folder: Path, make: Callable[[], nn.Module], fit: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """The trained model stored in ``folder``, or that of ``make`` after training by ``fit``."""
    model = make()
    if (folder / "model.pt").is_file():
        model.load_state_dict(load_checkpoint(folder / "model.pt"))
        return model.eval()
    model = fit(model)
    save_checkpoint(folder / "model.pt", model.state_dict())
    return model


@cache
def data() -> Splits:
    """Fashion-MNIST."""
    return load("fashion-mnist")


def network(name: str, seed: int, scheme: str, folder: Path) -> nn.Module:
    """The trained network of a scheme."""
    steps, folder, splits = NETWORKS[name], folder / name / f"seed{seed}", data()

    def make() -> nn.Module:
        torch.manual_seed(seed)
        return models.build(name, in_channels=1, num_classes=10, image_size=28)

    fp = load_or_train(
        folder / "fp", make, lambda model: learn(model, splits, steps.fp, 0.1, seed, rises=True)
    )
    which, bits = SCHEMES[scheme]

    def prepared() -> nn.Module:
        example = to_float(splits.train.images[:2])
        model = prepare(fp, preset(which, weight_bits=bits), example)
        return keep_pairs(model) if scheme.endswith("pairs") else model

    return load_or_train(
        folder / scheme.replace(", ", "-").replace(" ", "-"),
        prepared,
        lambda model: learn(model, splits, steps.qat, 0.01, seed, rises=False),
    )


def measure(name: str, seed: int, scheme: str, folder: Path) -> Row:
    """Accuracy before and after the export, and agreement."""
    model, test = network(name, seed, scheme, folder), data().test
    path = folder / f"{name}-{seed}-{scheme.replace(', ', '-').replace(' ', '-')}.onnx"
    export_onnx(model, to_float(test.images[:2]), path)
    report = verify(model, path, test, test.labels).to_dict()
    columns = ("accuracy_fake", "accuracy_onnx", "argmax_agreement", "precise", "emulated")
    row = {"network": name, "seed": seed, "scheme": scheme, **{key: report[key] for key in columns}}
    return {**row, "saturating": len(report["saturating"])}


def text(rows: list[Row]) -> str:
    """A row for the terminal."""
    row = rows[0]
    return (
        f"{row['network']}, {row['scheme']}, seed {row['seed']}: {row['accuracy_fake']:.2%}, "
        f"{row['accuracy_onnx']:.2%} in ONNX Runtime, agreement {row['argmax_agreement']:.2%}"
    )


def table(result: dict[str, Any]) -> str:
    """A table with a line per network and scheme; mean and standard deviation over the seeds."""
    by_case: dict[tuple[str, str], list[Row]] = {}
    for row in result["rows"]:
        by_case.setdefault((row["network"], row["scheme"]), []).append(row)
    header = [
        "network", "scheme", "seeds", "accuracy, trained", "in ONNX Runtime", "agreement",
        "layers that can saturate", "agreement without VNNI (emulated)", "with x64quantprecision",
    ]  # fmt: skip
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for name in NETWORKS:
        for scheme in SCHEMES:
            rows = by_case.get((name, scheme))
            if rows:
                lines.append([name, scheme, str(len(rows)), *_cells(rows)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(rows: list[Row]) -> list[str]:
    cells = [
        _percent([row[key] for row in rows])
        for key in ("accuracy_fake", "accuracy_onnx", "argmax_agreement")
    ]
    cells.append(f"{mean(row['saturating'] for row in rows):.2g}")
    for key in ("emulated", "precise"):
        agreements = [row[key]["argmax_agreement"] for row in rows if row[key]]
        cells.append(_percent(agreements) if agreements else "")
    return cells


def _percent(values: list[float]) -> str:
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{spread}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench weight-bits``."""
    parser.add_argument("--runs", default="runs/weight-bits", help="folder of the trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name in ("network", "scheme"):
        parser.add_argument(
            f"--{name}", action="append", help="names that contain this, or =NAME (repeatable)"
        )
    add_common_arguments(parser, seconds=None)


def main(args: argparse.Namespace) -> None:
    """Train and measure the selected networks and schemes."""
    device = set_up(args)
    cases = [
        (name, seed, scheme)
        for seed in args.seeds
        for scheme in SCHEMES
        for name in NETWORKS
        if matches(name, args.network) and matches(scheme, args.scheme)
    ]
    result = measured(
        args,
        device,
        ("network", "seed", "scheme"),
        {case: case for case in cases},
        lambda case: [measure(*case, Path(args.runs))],
        text,
    )
    print(table(result))
