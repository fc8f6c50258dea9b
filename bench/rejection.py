"""``python -m bench rejection``: which foreign images a network could reject, and at what price.

For a training with ``--misdirect-target reject``. A threshold on the largest logit decides what is
rejected; here it is varied on the test images, so that no other threshold on this network's logits
does better. Another training, or another score than the largest logit, may.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from torch import Tensor

from divqat.data import transfer_names, transfer_set
from divqat.metrics import predict
from divqat.nn import RectifiedOutput
from divqat.train.folder import Run, load_run

COSTS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)  # points of accuracy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench rejection``."""
    parser.add_argument("run", help="a training that rejects")
    parser.add_argument("--data-root", help="folder of its data set")
    parser.add_argument("--query-set", choices=transfer_names(), default="openclipart")
    parser.add_argument("--query-root", help="folder of the query set")
    parser.add_argument("--queries", type=int, help="how many; default: all of the query set")


def main(args: argparse.Namespace) -> None:
    """Print the curve.

    Raises:
        SystemExit: the training does not reject.
    """
    run = load_run(args.run)
    if not run.config.rejects:
        raise SystemExit(f"bench rejection: {args.run}: wanted --misdirect-target reject")
    splits = run.splits(args.data_root)
    channels, height, width = splits.train.image_shape
    queries = transfer_set(
        args.query_set, channels=channels, image_size=(height, width),
        data_root=args.query_root, limit=args.queries,
    )  # fmt: skip
    model = unrectified(run)
    own, foreign = predict(model, splits.test.images), predict(model, queries)
    print("| Accuracy | points | own images rejected | foreign images rejected |")
    print("|---:|---:|---:|---:|")
    for accuracy, points, of_own, of_foreign in curve(own, splits.test.labels, foreign):
        print(f"| {accuracy:.1%} | -{points:g} | {of_own:.1%} | {of_foreign:.1%} |")


def unrectified(run: Run) -> torch.nn.Module:
    """The network of a training without the output's rounding of negative logits up to 0."""
    model = copy.deepcopy(run.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, RectifiedOutput):
            model.set_submodule(name, torch.nn.Identity())
    return model.eval()


def curve(
    own: Tensor,  # [N, num_classes]
    labels: Tensor,  # int64 [N]
    foreign: Tensor,  # [M, num_classes]
) -> list[tuple[float, float, float, float]]:
    """For each of ``COSTS`` the accuracy, the cost in points, and the shares of own and foreign
    images without a logit above the largest threshold that costs so much. Own images that are
    rejected count as wrong."""
    top, answer = own.max(1)
    right = top[answer == labels].sort(descending=True).values
    rows = []
    for points in COSTS:
        kept = max(1, math.ceil(len(right) - points / 100 * len(labels) - 1e-6))
        threshold = right[kept - 1]  # itself still accepted
        accuracy = float((right >= threshold).sum()) / len(labels)
        rejected = [float((x.amax(1) < threshold).double().mean()) for x in (own, foreign)]
        rows.append((accuracy, points, *rejected))
    return rows
