"""Deployment of a finished training: export, verification of the export, attack.

Each step writes a JSON file beside its results. It is skipped if that file exists and was made from
the same input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from divqat import models
from divqat._util.bounds import check_tree
from divqat._util.devices import cpu_threads, find_device
from divqat._util.files import file_fingerprint, load_checkpoint, read_json, step, write_json
from divqat._util.seeds import derived_seed
from divqat._util.settings import ConfigError, differences, option
from divqat.attacks import KnockoffNets
from divqat.attacks.attack import identity
from divqat.attacks.attacker import Attacker
from divqat.attacks.clone_settings import CloneSettings
from divqat.data import Splits, to_float
from divqat.export import (
    InputMetadata,
    export_executorch,
    export_onnx,
    export_openvino,
    verify,
    with_kernels,
)
from divqat.metrics import accuracy, fidelity, predict
from divqat.quantize import summarize
from divqat.train.folder import Run
from divqat.victim import Victim

ONNX = "model.onnx"
# Target of an export → file. Runtimes have the names of their targets, but for ONNX Runtime.
FILES = {"onnx": ONNX, "executorch": "model.pte", "openvino": "model.xml"}
RUNTIMES = {"onnxruntime" if to == "onnx" else to: to for to in FILES}


@dataclass(frozen=True, kw_only=True)
class AttackConfig(Attacker):
    """The attacker's settings. Each field is a flag of ``divqat attack`` and a key of ``attack:``
    in the YAML file of a study.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    budget: int | None = option(
        None,
        "Query budget (1 image = 1 query). None: the whole query set.",
        group="attacker",
        least=1,
    )
    clone: str = option(
        "lenet", "Network of the clone.",
        group="attacker", choices=models.names(), foreign=True,
    )  # fmt: skip
    seed: int = option(
        0,
        "Seed of the clone's initial weights and the order of the images.",
        group="running",
        least=0,
    )

    def queries(self, splits: Splits) -> Tensor:
        """The query set, uint8 [N, C, H, W]; the same for every seed."""
        return self.load_queries(splits, self.budget)

    def knockoff(self) -> KnockoffNets:
        """The attack."""
        training = {name: getattr(self, name) for name in CloneSettings.names()}
        return KnockoffNets(query_budget=self.budget, seed=self.seed, **training)


def answer_arguments(answer: str) -> dict[str, Any]:
    """Keyword arguments of :class:`Victim` for ``probs``, ``label``, ``top3``, ``rounded2`` ...

    Raises:
        ConfigError: another ``answer``.
    """
    if answer in ("probs", "label"):
        return {"answer": answer}
    match = re.fullmatch(r"(top|rounded)(\d+)", answer)
    if match is None:
        raise ConfigError(
            f"answer: wanted probs, label, top<k> or rounded<decimals>, got {answer!r}"
        )
    number = int(match[2])
    if match[1] == "top":
        return {"answer": "topk", "k": number}
    return {"answer": "rounded", "decimals": number}


def export_run(
    run: Run, splits: Splits, to: str = "onnx", options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write ``model.onnx``, ``layers.json`` (:func:`divqat.summary`) and ``export.json``; or, to
    another target, its file of ``FILES`` and ``export-TARGET.json``.

    Args:
        run: a finished training.
        splits: its data.
        to: the target.
        options: for ``onnx``: ``normalize_inside``, to take uint8 pictures, and ``opset`` and
            ``pack_int4`` of ``export_onnx``. None: as the file that is there.

    Raises:
        ConfigError: another target with an option.
        ValueError: the run is not quantized.
    """
    _check_quantized(run)
    path, done = run.folder / FILES[to], run.folder / report_file("export", to)
    before = read_json(done).get("options", {}) if done.is_file() else {}
    options = before if options is None else {k: v for k, v in options.items() if v}
    if options and to != "onnx":
        raise ConfigError(f"{', '.join(options)}: wanted the target onnx, got {to}")
    if options != before:
        done.unlink(missing_ok=True)

    def make() -> dict[str, Any]:
        images = to_float(splits.validation.subset(slice(256)).images)
        if to != "onnx":
            writers: dict[str, Callable[..., Any]] = {
                "executorch": export_executorch, "openvino": export_openvino,
            }  # fmt: skip
            written = writers[to](run.model, images, path)
            return {**written.to_dict(), "text": str(written)}
        others = dict(options)
        dtype = "uint8" if others.pop("normalize_inside", False) else "float32"
        metadata = InputMetadata(
            mean=(0.5,) * splits.channels,
            std=(0.5,) * splits.channels,
            dtype=dtype,
            classes=splits.classes,
        )
        report = export_onnx(run.model, run.example, path, metadata=metadata, **others)
        table = with_kernels(summarize(run.model, images), run.folder / ONNX)
        write_json(run.folder / "layers.json", table.to_dict())
        return {**report.to_dict(), "text": str(report), "options": options}

    return step(done, run.fingerprint, make, product=path)


def report_file(step: str, to: str) -> str:
    """The name of the JSON file of ``export`` or ``verify``, for a target."""
    return f"{step}.json" if to == "onnx" else f"{step}-{to}.json"


def _check_quantized(run: Run) -> None:
    if not run.config.kind.quantized:
        raise ValueError(
            f"{run.folder} is full precision, and only quantized runs are exported: attack it with "
            "divqat attack --fake-quant or divqat evaluate"
        )


def verify_run(run: Run, splits: Splits, to: str = "onnx") -> dict[str, Any]:
    """Compare the trained model with its export in the target's runtime, on the whole test set;
    write ``verify.json``, or ``verify-executorch.json``.

    Raises:
        FileNotFoundError: the run was not exported.
        ValueError: it has been trained again since, or is not quantized.
    """
    file = exported_file(run, to)

    def make() -> dict[str, Any]:
        report = verify(run.model, file, splits.test, splits.test.labels)
        return {**report.to_dict(), "text": str(report)}

    # The suffix invalidates reports that did not yet use ONNX Runtime's default options.
    source = f"{file_fingerprint(file)}, default options"
    return step(run.folder / report_file("verify", to), source, make)


def exported_file(run: Run, to: str = "onnx") -> Path:
    """The path of a run's exported file.

    Raises:
        FileNotFoundError: the run was not exported.
        ValueError: it has been trained again since, or is not quantized.
    """
    _check_quantized(run)
    path, report = run.folder / FILES[to], run.folder / report_file("export", to)
    again = f"divqat export {run.folder}" + ("" if to == "onnx" else f" --to {to}")
    if not path.is_file() or not report.is_file():
        raise FileNotFoundError(f"no {path.name} in {run.folder}: {again}")
    if read_json(report)["source"] != run.fingerprint:
        raise ValueError(f"{path} is from an earlier training: {again}")
    return path


def attack_run(
    run: Run,
    splits: Splits,
    config: AttackConfig,
    answer: str,
    out: Path,
    *,
    queries: Tensor | None = None,
    fake_quant: bool = False,
) -> dict[str, Any]:
    """Extract a run's exported model and measure the clone on the test set.

    Args:
        run: the victim.
        splits: the victim's data, which the attack does not see.
        config: the attacker's settings.
        answer: see :func:`answer_arguments`.
        out: the folder for ``transfer.pt``, ``clone.pt`` and ``summary.json``.
        queries: ``config.queries(splits)``, if loaded already.
        fake_quant: attack the fake-quantized model instead of its export.

    Returns:
        The content of ``summary.json``.

    Raises:
        FileNotFoundError: the run was not exported, or the query set was not found.
        ValueError: ``out`` belongs to another victim or to other settings.
    """
    check_tree(out)
    model: Path | nn.Module = run.model if fake_quant else exported_file(run)
    source = run.fingerprint if isinstance(model, nn.Module) else file_fingerprint(model)
    settings = {**config.to_dict(), "answer": answer, "victim": source}
    for name in config.places:
        del settings[name]
    victim = Victim(model, query_budget=config.budget, **answer_arguments(answer))
    # Stored answers belong to one victim and one query set; no other attack may resume from them.
    settings_file, answers = out / "attack.json", out / "transfer.pt"
    if settings_file.is_file() and answers.is_file():
        # Settings newer than the file had their defaults.
        before = {**AttackConfig().to_dict(), **read_json(settings_file)}
        different = differences({name: before.get(name) for name in settings}, settings)
        if queries is not None:
            stored = load_checkpoint(answers)["settings"]["query_set"]
            different += differences({"images": stored}, {"images": identity(queries)})
        if different:
            raise ValueError(
                f"{out} holds another attack ({'; '.join(different)}): "
                "choose another --out, or delete it"
            )

    def make() -> dict[str, Any]:
        with cpu_threads(config.threads):
            images = config.queries(splits) if queries is None else queries
            with torch.random.fork_rng([]):
                torch.manual_seed(derived_seed(config.seed, "clone"))
                clone = models.build(
                    config.clone,
                    in_channels=splits.channels,
                    num_classes=splits.num_classes,
                    image_size=splits.image_size,
                )
            clone.to(find_device(config.device))
            write_json(settings_file, settings)
            extraction = config.knockoff()(victim, images, clone, resume_dir=out)
            test = splits.test
            clone_logits, logits = predict(extraction.clone, test), predict(model, test)
        return {
            "queries": extraction.queries,
            "accuracy": accuracy(clone_logits, test.labels),
            "fidelity": fidelity(clone_logits, logits),
            "victim_accuracy": accuracy(logits, test.labels),
            "settings": settings,
        }

    return step(out / "summary.json", source, make)
