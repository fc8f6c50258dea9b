"""A network of torchvision or timm: prepared, calibrated, exported, compared with the runtime."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import divqat
from bench import architectures, network_checks
from bench.command import Row, first_line
from bench.deployed import decided, float_onnx
from divqat.export import export_onnx
from divqat.export.placement import Placement, placements
from divqat.quantize import observing

BATCH = 8
ROUNDS = 30
STAGES = ("build", "prepare", "export", "compare", "race", "check")


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        seed: of weights and pictures.
        least: pictures, at least; also for the statistics, but at most 64 there.
        seconds: for the forward passes of the fit on one core; a fast network gets up to 1,000
            pictures, and half as many for the comparison.
        until: the last of ``STAGES``, for a survey.
    """

    seed: int = 0
    least: int = 100
    seconds: float = 60.0
    until: str = "check"


def measure(name: str, plan: Plan, folder: Path) -> Row:
    """A row of the table; ``error`` has the stage at which the network fails, and the message.

    What needs no file is checked in any case.
    """
    case = Case(name, plan, folder)
    for stage in STAGES[: STAGES.index(plan.until) + 1]:
        if "error" in case.row and not (stage == "check" and hasattr(case, "prepared")):
            continue
        print(f"bench networks: {name}: {stage}", file=sys.stderr, flush=True)
        try:
            getattr(case, stage)()
        except Exception as error:  # whatever a network raises is its result
            case.row.setdefault("error", {"stage": stage, "message": first_line(error)[:300]})
    return case.row


class Case:
    """The stages; each needs those before."""

    def __init__(self, name: str, plan: Plan, folder: Path) -> None:
        entry = architectures.NETWORKS[name]
        self.name, self.plan, self.entry = name, plan, entry
        self.path, self.float_path = folder / f"{name}.onnx", folder / f"{name}-float.onnx"
        self.row: Row = {
            "network": name, "library": entry.library, "size": entry.size, "seed": plan.seed,
        }  # fmt: skip

    def build(self) -> None:
        """The float network, with statistics and a last layer that fit the pictures."""
        plan, size = self.plan, self.entry.size
        self.model = architectures.build(self.name, plan.seed)
        self.images, _ = architectures.pictures(min(64, plan.least), size, plan.seed + 1)
        architectures.settle(self.model, self.images, BATCH)
        start = time.perf_counter()
        with torch.no_grad():
            self.model(self.images[:BATCH])
        count = int(plan.seconds * BATCH / (time.perf_counter() - start))
        fit, test = min(max(count, plan.least), 1000), min(max(count // 2, plan.least), 500)
        architectures.fit(self.model, *architectures.pictures(fit, size, plan.seed + 2), BATCH)
        self.test, self.labels = architectures.pictures(test, size, plan.seed + 3)
        self.row["pictures"] = {"statistics": len(self.images), "fit": fit, "test": test}

    def prepare(self) -> None:
        """The prepared network, calibrated, in eval mode."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            start = time.perf_counter()
            self.prepared = divqat.prepare(self.model, "x86", self.images[:2])
            self.row["prepare_seconds"] = time.perf_counter() - start
        texts = (str(w.message).partition("\n")[0][:300] for w in caught)
        self.row["warnings"] = [text for text in texts if "divqat" not in text][:5]
        with torch.no_grad(), observing(self.prepared):
            for part in self.images.split(BATCH):
                self.prepared(part)
        self.prepared.eval()

    def export(self) -> None:
        """The file, and the kernel of each layer."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export_onnx(self.prepared, self.images[:2], self.path)
        self.row |= placed(placements(self.path))

    def compare(self) -> None:
        """Answers of the file beside those of the prepared network."""
        session = _session(self.path)
        answers: tuple[list[Tensor], ...] = ([], [], [])
        with torch.no_grad():
            for part, labels in zip(self.test.split(BATCH), self.labels.split(BATCH), strict=True):
                expected = architectures.tensor_of(self.prepared(part)).float()
                got = torch.from_numpy(_run(session, part.numpy()))
                of_pixels = labels.view(-1, *[1] * (got.dim() - 1)).expand(-1, 1, *got.shape[2:])
                for rows, values in zip(answers, (expected, got, of_pixels), strict=True):
                    rows.append(_rows(values))
        a, b, labels = map(torch.cat, answers)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise FloatingPointError("NaN or Inf in the logits")
        clear = decided(a)
        same = (a.argmax(-1) == b.argmax(-1)).double()
        noise = (a - b).double().square().mean().clamp(min=1e-30)
        self.row |= {
            "decided": float(clear.double().mean()),
            "agreement": float(same[clear].mean()) if clear.any() else None,
            "agreement_all": float(same.mean()),
            "sqnr_db": float(10 * torch.log10(a.double().var(correction=0) / noise)),
            "accuracy": float((a.argmax(-1) == labels[:, 0]).double().mean()),
        }

    def race(self) -> None:
        """Milliseconds per picture in int8 and float, in turns, on one thread."""
        float_onnx(self.model, self.images, self.float_path)
        sessions = {"int8": _session(self.path), "float": _session(self.float_path)}
        image, times = self.images[:1].numpy(), {name: [] for name in sessions}  # type: ignore[var-annotated]
        start = time.perf_counter()
        for turn in range(ROUNDS + 2):
            for name, session in sessions.items():
                begin = time.perf_counter()
                _run(session, image)
                if turn >= 2:  # after a warm-up
                    times[name].append(1000 * (time.perf_counter() - begin))
            if turn >= 6 and time.perf_counter() - start > self.plan.seconds:
                break
        self.row["milliseconds"] = {name: median(values) for name, values in times.items()}
        for path in (self.path, self.float_path):
            path.unlink()

    def check(self) -> None:
        """State dict, copies, compilation, and the mode in which it was prepared."""
        self.row["checks"] = network_checks.checks(
            self.model, self.prepared, self.images[:2], self.name in architectures.TRAINED
        )


def placed(layers: list[Placement]) -> Row:
    """Counts of the products of a file, and the layers in float."""
    weighted = [layer for layer in layers if layer.weighted]
    return {
        "layers": len(weighted),
        "int8": sum(layer.int8 for layer in weighted),
        "kernels": dict(Counter(layer.kernel or "?" for layer in weighted)),
        "float": [
            {"layer": x.module, "kernel": x.kernel, "reason": x.reason}
            for x in weighted
            if not x.int8
        ],
        "products": len(layers) - len(weighted),
        "products_int8": sum(layer.int8 for layer in layers if not layer.weighted),
    }


def _session(path: Path) -> Any:
    """A session with default options, but one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: Any, images: np.ndarray) -> np.ndarray:
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def _rows(values: Tensor) -> Tensor:
    """[N, C] from values [N, C] of pictures or [N, C, H, W] of pixels; every 37th is enough."""
    if values.dim() == 2:
        return values
    return values.movedim(1, -1).reshape(-1, values.shape[1])[::37]
