"""``python -m bench zoo``: the trained networks in zoo/, and their cards.

``--runs`` holds a training DATASET-METHOD for each network, and the evaluations of the int8 ones in
``evaluations``, in folders whose names start with the network's. The cards have what these files
say; the recipes in them are the settings in the checkpoints.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from bench.command import Row, rounded
from divqat._util.files import read_json, save_checkpoint, write_atomic, write_json, write_text
from divqat._util.integrity import sha256
from divqat.evaluate.specs import steals
from divqat.export.graph import drop_stack_traces
from divqat.train import TrainConfig
from divqat.train.folder import read_checkpoint

ROOT = Path(__file__).parent.parent
ZOO = ROOT / "zoo"
METHODS = ("fp", "qat", "divqat")
# Name, license of the data, and what queries were used.
DATA = {
    "fashion-mnist": ("Fashion-MNIST", "MIT (Zalando SE)", "openclipart, public domain"),
    "cifar10": (
        "CIFAR-10, a JPEG copy",
        "none is stated by its author, who asks to cite Krizhevsky (2009)",
        "30,000 images of Tiny-ImageNet",
    ),
    "gtsrb": (
        "GTSRB, JPEG copies with 32 pixels along the shorter side",
        "none is stated in its archives, whose authors ask to cite Stallkamp et al. (2012)",
        "30,000 images of Tiny-ImageNet",
    ),
}
RECIPE = (
    *("method", "dataset", "model", "batch_size", "pad", "flip", "epochs", "lr", "schedule"),
    *("accuracy_budget", "misdirect", "misdirect_target", "proxies", "threads", "seed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench zoo``."""
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "zoo", metavar="DIR")
    parser.add_argument(
        "--page", action="store_true", help="only write zoo/README.md again, from the cards"
    )


def main(args: argparse.Namespace) -> None:
    """Write zoo/, or its page.

    Raises:
        FileNotFoundError: a training, an export or an evaluation is missing.
    """
    if not args.page:
        names = [f"{data}-{method}" for data in DATA for method in METHODS]
        write_json(ZOO / "cards.json", {"cards": [rounded(add(name, args.runs)) for name in names]})
    write_text(ZOO / "README.md", page(list(read_json(ZOO / "cards.json")["cards"])))


def add(name: str, runs: Path) -> Row:
    """Copy a network into the zoo; its card."""
    folder, method = runs / name, name.rpartition("-")[2]
    state, summary = read_checkpoint(folder), read_json(folder / "summary.json")
    config = state["config"] | {"data_root": None}
    for key, other in (("teacher", "fp"), ("reference", "qat")):  # their names in the zoo
        if config[key]:
            config[key] = f"runs/{config['dataset']}-{other}"
    weights = save_checkpoint(
        ZOO / f"{name}.pt", {"config": config, "shape": state["shape"], "model": state["model"]}
    )
    title, license, queries = DATA[config["dataset"]]
    card: Row = {
        "name": name,
        "method": method,
        "dataset": config["dataset"],
        "data": title,
        "license": license,
        "shape": state["shape"],
        "accuracy": summary["test_accuracy"],
        "seconds": summary["seconds"],
        "recipe": recipe(name, config),
        "hardware": summary["hardware"],
        "versions": summary["versions"],
        "sha256": {weights.name: sha256(weights)},
    }
    if method == "fp":
        return card
    import onnx  # which the other commands of bench do not need

    file = ZOO / f"{name}.onnx"
    proto = onnx.load(folder / "model.onnx")
    drop_stack_traces(proto.graph)  # of files from before the export dropped them
    write_atomic(file, lambda temporary: onnx.save(proto, temporary))
    found = sorted((runs / "evaluations").glob(f"{name}*/evaluation.json"))
    if not found:
        raise FileNotFoundError(f"no evaluation of {name} in {runs / 'evaluations'}")
    evaluations = [read_json(path) for path in found]
    card["sha256"][file.name] = sha256(file)
    card["bytes"] = file.stat().st_size
    card["deployed_accuracy"] = evaluations[0]["released"][0]["accuracy"]
    card["clones"] = [clone(cell, e["grid"]) for e in evaluations for cell in e["cells"]]
    card["evaluation"] = [attack_command(name, e["command"]) for e in evaluations]
    card["queries"] = queries
    card["date"] = max(e["date"] for e in evaluations)[:10]
    return card


def clone(cell: Row, grid: Row) -> Row:
    """What a card says of a clone."""
    kept = ("attack", "budget", "accuracy", "fidelity", "seed")
    return {key: cell[key] for key in kept} | {"epochs": grid["epochs"]}


def recipe(name: str, config: dict[str, Any]) -> str:
    """The command of a training, with every setting that is not a default."""
    words = ["divqat", "train"]
    default = TrainConfig(method=config["method"], teacher=config["teacher"]).to_dict()
    for key in RECIPE:
        value, flag = config[key], "--" + key.replace("_", "-")
        if value == default[key] and key not in ("method", "seed"):
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [flag, *map(str, values)]
    for key in ("teacher", "reference"):
        if config[key]:
            words += [f"--{key}", config[key]]
    return shlex.join([*words, "--out", f"runs/{name}"])


def attack_command(name: str, command: str) -> str:
    """The command of an evaluation, with the names that files have in the zoo."""
    for flag, value in (
        ("--victim", f"runs/{name}"),
        ("--query-root", "TINY-IMAGENET"),
        ("--out", f"runs/evaluations/{name}"),
    ):
        command = re.sub(rf"{flag} \S+", f"{flag} {value}", command)
    return command


def best(card: Row) -> Row:
    """The best clone: an upper bound, as it is chosen on the test set."""
    return max((c for c in card["clones"] if steals(c["attack"])), key=lambda c: c["accuracy"])


def page(cards: list[Row]) -> str:
    """zoo/README.md."""
    deployed = [card for card in cards if "clones" in card]
    lines = ["| network | accuracy | best clone | its attack | KB |", "|---|--:|--:|---|--:|"]
    for card in deployed:
        top = best(card)
        lines.append(
            f"| [`{card['name']}`](#{card['name']}) | {_percent(card['deployed_accuracy'])} | "
            f"{_percent(top['accuracy'])} | `{top['attack']}` | {card['bytes'] / 1000:.0f} |"
        )
    table = "\n".join(lines)
    sections = "\n".join(_section(card, cards) for card in deployed)
    last = deployed[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    where = f"{last['hardware']}; {versions}; {last['date']}"
    return f"""# Trained networks

Int8 networks (`vgg_small`, 7-bit weights) to try without training: plain QAT beside DivQAT, which
rejects foreign images (`--misdirect-target reject`), one seed each. Accuracies are percent of the
test set, of the ONNX file in ONNX Runtime. *Best clone* is the best of the attacks on the card,
chosen on the test set, so an upper bound on these. One seed says little about small differences.

{table}

See the difference yourself, in a few minutes (`apt-get install dataset-fashion-mnist
openclipart-png`), and load the same networks in Python:

    divqat evaluate --victim zoo/fashion-mnist-qat.onnx --victim zoo/fashion-mnist-divqat.onnx \\
        --dataset fashion-mnist --query-set openclipart --budgets 27540 --clones vgg_small \\
        --epochs 5 --attacks knockoff --seeds 1 --out runs/zoo-clones

```python
import divqat

model = divqat.zoo.load("fashion-mnist-divqat")  # prepared; "fashion-mnist-fp" is in full precision
file = divqat.zoo.path("fashion-mnist-divqat")  # the ONNX file
```

Images are float32 [N, C, H, W], (pixel / 255 - 0.5) / 0.5. Made by `python -m bench zoo` from the
trainings and evaluations below
({where}).

{sections}"""


def _section(card: Row, cards: list[Row]) -> str:
    channels, (height, width) = card["shape"]["in_channels"], card["shape"]["image_size"]
    teacher = next(c for c in cards if c["name"] == f"{card['dataset']}-fp")
    rows = "\n".join(
        f"| `{c['attack']}` | {c['budget']:,} | {c['epochs']} | {_percent(c['accuracy'])} | "
        f"{_percent(c['fidelity'])} |"
        for c in card["clones"]
    )
    commands = "\n".join(f"    {line}" for line in (teacher["recipe"], card["recipe"]))
    attacks = "\n".join(f"    {line}" for line in card["evaluation"])
    hashes = "\n".join(f"- `{name}`: SHA-256 `{value}`" for name, value in card["sha256"].items())
    return f"""## {card["name"]}

- Data: {card["data"]}; license: {card["license"]}. Images {channels} × {height} × {width},
  {card["shape"]["num_classes"]} classes.
- Accuracy: {_percent(card["deployed_accuracy"])}, full precision {_percent(teacher["accuracy"])}.
  Trained in {card["seconds"] / 60:.0f} minutes on one core.
{hashes}

{commands}

Clones (`vgg_small`; queries: {card["queries"]}):

| attack | queries | epochs | clone | fidelity |
|---|--:|--:|--:|--:|
{rows}

{attacks}
"""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
