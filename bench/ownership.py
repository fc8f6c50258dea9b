"""``python -m bench ownership``: which suspects ``divqat ownership`` recognizes, on one seed.

The victim is trained with the decoy of a key. Thieves clone it by foreign queries, with
probabilities or labels, and wash the clones. Innocent are the victim's teacher, plain QAT, and
clones of plain QAT. Every suspect answers labels only. The alarms of an innocent suspect over
10,000 fresh keys are counted with the same answers.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from bench.environment import environment
from divqat._util.files import write_json
from divqat.attacks import KnockoffNets
from divqat.data import Splits, transfer_names, transfer_set
from divqat.data.batches import to_float
from divqat.metrics import accuracy, predict
from divqat.models import build
from divqat.ownership import check
from divqat.ownership.check import components, decoy_of, draw_queries
from divqat.ownership.null import (
    LOOKS,
    corrected,
    decoy_classes,
    excess_agreement,
    p_values,
    redrawn_rows,
)
from divqat.train import Run, TrainConfig, load_run, train
from divqat.victim import Victim

KEY, NONCE = (hashlib.sha256(f"bench {name}".encode()).hexdigest() for name in ("key", "nonce"))
FRESH_KEYS, ALPHA = 10_000, 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench ownership``."""
    parser.add_argument("--dataset", default="digits", help="default: digits")
    parser.add_argument("--data-root", help="folder of the data set")
    parser.add_argument("--model", default="lenet", help="of victims and clones; default: lenet")
    parser.add_argument("--query-set", choices=transfer_names(), default="icons")
    parser.add_argument("--query-root", help="folder of the query set")
    parser.add_argument("--queries", type=int, default=5000, help="of a thief; default: 5000")
    parser.add_argument("--epochs", type=int, default=15, help="of victims; default: 15")
    parser.add_argument("--clone-epochs", type=int, default=10, help="default: 10")
    parser.add_argument("--json", help="write the rows here")


def main(args: argparse.Namespace) -> None:
    """Train, steal, test; print a table."""
    result = environment("python -m bench ownership " + " ".join(sys.argv[2:])) | {"rows": []}
    print("| suspect | copied? | accuracy | agreement | queries | p | verdict | alarms |")
    print("|---|---|---:|---:|---:|---:|---|---:|")
    with tempfile.TemporaryDirectory() as folder:
        runs = victims(args, Path(folder))
        run, splits = runs["divqat"], runs["divqat"].splits(args.data_root)
        for name, is_copy, model in suspects(args, runs, splits):
            row = measure(name, is_copy, model, run, splits, args.data_root)
            result["rows"].append(row)
            print(
                f"| {name} | {'yes' if is_copy else 'no'} | {row['accuracy']:.1%} | "
                f"{row['agreement']:.1%} | {row['queries']} | {row['p']:.2g} | "
                f"{'copied' if row['copied'] else 'no sign'} | {row['alarms']} |",
                flush=True,
            )
            if args.json:
                write_json(args.json, result)


def victims(args: argparse.Namespace, folder: Path) -> dict[str, Run]:
    """Runs ``fp``, ``qat`` and, with the decoy of ``KEY``, ``divqat``."""
    common: dict[str, Any] = dict(dataset=args.dataset, data_root=args.data_root, model=args.model)
    common |= {"epochs": args.epochs, "batch_size": 64}
    own = {"teacher": str(folder / "fp")}
    decoy = {"misdirect": 0.8, "misdirect_target": "decoy", "decoy_key": KEY}
    for name, changes in (("fp", {}), ("qat", own), ("divqat", own | decoy)):
        config = TrainConfig(**common, method=name, **changes)
        train(config, folder / name, log=lambda line: None)
    return {name: load_run(folder / name) for name in ("fp", "qat", "divqat")}


def suspects(
    args: argparse.Namespace, runs: dict[str, Run], splits: Splits
) -> Iterator[tuple[str, bool, nn.Module]]:
    """Name, whether it was copied, and model of each suspect."""
    yield "the victim itself", True, runs["divqat"].model
    for answer in ("probs", "label"):
        clone = steal(args, runs["divqat"], answer)
        yield f"clone, {answer}", True, clone
        for count in (200, 1000):
            tuned = fine_tuned(clone, splits, count)
            yield f"clone, {answer}, fine-tuned on {count} labels", True, tuned
        for share in (0.5, 0.8):
            yield f"clone, {answer}, {share:.0%} pruned", True, pruned(clone, share)
        yield f"clone, {answer}, weights of 4 bits", True, rounded(clone, 4)
    yield "the teacher", False, runs["fp"].model
    yield "plain QAT", False, runs["qat"].model
    for answer in ("probs", "label"):
        yield f"clone of plain QAT, {answer}", False, steal(args, runs["qat"], answer)


def steal(args: argparse.Namespace, run: Run, answer: str) -> nn.Module:
    """A clone by KnockoffNets on foreign queries."""
    images = transfer_set(
        args.query_set, channels=run.shape["in_channels"], image_size=run.shape["image_size"],
        data_root=args.query_root, limit=args.queries,
    )  # fmt: skip
    torch.manual_seed(1)
    attack = KnockoffNets(epochs=args.clone_epochs, seed=1)
    return attack(Victim(run.model, answer=answer), images, build(args.model, **run.shape)).clone


def fine_tuned(clone: nn.Module, splits: Splits, count: int) -> nn.Module:
    """The clone after 10 epochs on the first labeled training images."""
    clone = copy.deepcopy(clone).train()
    images, labels = to_float(splits.train.images[:count]), splits.train.labels[:count]
    optimizer = torch.optim.SGD(clone.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(clone(images[rows]), labels[rows]).backward()
            optimizer.step()
    return clone


def pruned(clone: nn.Module, share: float) -> nn.Module:
    """The clone without the share of its weights that are smallest, over all layers."""
    clone = copy.deepcopy(clone)
    weights = [(m, "weight") for m in clone.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=share)
    return clone


def rounded(clone: nn.Module, bits: int) -> nn.Module:
    """The clone with the weights of each layer on a symmetric grid."""
    clone = copy.deepcopy(clone)
    for module in clone.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            step = module.weight.data.abs().max() / (2 ** (bits - 1) - 1)
            module.weight.data = (module.weight.data / step).round() * step
    return clone


def measure(
    name: str, is_copy: bool, model: nn.Module, run: Run, splits: Splits, data_root: str | None
) -> dict[str, Any]:
    """The row of one suspect."""
    model = model.eval()
    found = check(Victim(model, answer="label"), run, nonce=NONCE, alpha=ALPHA, data_root=data_root)
    decoy, images = decoy_of(run.config, splits), draw_queries(run.config, splits, NONCE)
    answers = Victim(model, answer="label")(images)
    return {
        "suspect": name,
        "is_copy": is_copy,
        "accuracy": accuracy(predict(model, splits.test.images), splits.test.labels),
        "agreement": found.agreement,
        "queries": found.queries,
        "p": found.p,
        "copied": found.copied,
        "alarms": alarms(answers.double(), components(decoy, images)),
        "fresh_keys": FRESH_KEYS,
    }


def alarms(
    answers: Tensor,  # float64 [500, num_classes]
    z: Tensor,  # float64 [500, 4]
) -> int:
    """How many of ``FRESH_KEYS`` other keys, none of them the victim's, accuse the suspect."""
    classes = answers.shape[1]
    sets = [decoy_classes(z, redrawn_rows(NONCE, classes)),
            decoy_classes(z, redrawn_rows(f"{NONCE} fresh", classes, FRESH_KEYS))]  # fmt: skip
    looks = []
    for total in LOOKS:
        null, fresh = (excess_agreement(answers[:total], part[:, :total]) for part in sets)
        looks.append(p_values(fresh, null))
    return int((corrected(looks) <= ALPHA).sum())
