"""A whole job: train, export, verify and attack every victim of every seed, then report.

OUT/config.yaml, result.json, report.html, report.md, plots/
OUT/seed<n>/fp/                       the full-precision training
OUT/seed<n>/<nasty or ini victim>/    another one, a teacher of victims
OUT/seed<n>/<victim>/                 a training, model.onnx, export/verify/layers/answers.json
OUT/seed<n>/<victim>/attack-<answer>/ summary.json, transfer.pt, clone.pt
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from divqat.attacks.attack import identity
from divqat.bounds import check_tree
from divqat.evaluate import (
    AttackResult,
    Confidence,
    Result,
    VictimResult,
    are_distributions,
    chance,
    is_deterministic,
    predict,
    softmax,
    write_report,
)
from divqat.evaluate.result import hardware, versions
from divqat.files import file_fingerprint, read_json, step
from divqat.held import held
from divqat.job import Job
from divqat.options import differences, read_yaml, write_yaml
from divqat.steps import (
    as_attacked,
    attack_run,
    export_run,
    exported,
    verify_run,
)
from divqat.text import printable
from divqat.train import Run, TrainConfig, load_run, train
from divqat.train.config import INI, LOSS, MISDIRECTION
from divqat.train.folder import FREE, load_splits
from divqat.victim import Victim


def run_job(
    job: Job, out: str | Path, *, command: str = "", log: Callable[[str], object] = print
) -> Result:
    """Do what is left of a job, and write the report.

    Everything that is finished in ``out`` is kept, a killed part goes on where it was. More seeds
    can be added to a finished job.

    Args:
        job: the settings.
        out: the folder of the job; made if it does not exist.
        command: what the report says made it.
        log: takes a line per epoch and part.

    Returns:
        The content of ``OUT/result.json``.

    Raises:
        ValueError: ``out`` holds a job with other settings, or its name is empty.
        Others: as :func:`divqat.train.train` and :func:`divqat.steps.attack_run`.
    """
    with held("out", out) as folder:
        check_tree(folder)
        return _run_job(job, folder, command, log)


def _run_job(job: Job, out: Path, command: str, log: Callable[[str], object]) -> Result:
    settings = asdict(job)
    if (out / "config.yaml").is_file():
        places = {*FREE, *job.attacker(job.seeds[0]).places}
        pair = (_fixed(each, places) for each in (read_yaml(out / "config.yaml"), settings))
        different = differences(*pair)
        if different:
            raise ValueError(
                f"{out} holds a job with other settings ({'; '.join(different)}): "
                "choose another --out, or delete it"
            )
    runner = _Runner(job, out, log)
    write_yaml(out / "config.yaml", settings)
    for seed in job.seeds:
        train(
            job.training("fp", seed, out), job.folder(out, seed, "fp"), log=runner.say(seed, "fp")
        )
        for name in job.victims:
            runner.victim(seed, name)
            result = runner.result(command)
            result.save(out / "result.json")
    log(f"report: {write_report(out)}")
    return result


def _fixed(settings: dict[str, Any], places: set[str]) -> dict[str, Any]:
    """What must not change when a job goes on: all but seeds, places and devices."""
    return {
        section: {key: value for key, value in content.items() if key not in places}
        if isinstance(content, dict)
        else content
        for section, content in settings.items()
        if section != "seeds"
    }


class _Runner:
    """The parts of a job, on the data that they share."""

    def __init__(self, job: Job, out: Path, log: Callable[[str], object]) -> None:
        self.job, self.out, self.log = job, out, log
        # Both now: that something is missing should be known before hours of training.
        self.splits = load_splits(job.training("fp", job.seeds[0], out))
        self.queries = job.attacker(job.seeds[0]).queries(self.splits)

    def say(self, seed: int, part: str) -> Callable[[str], object]:
        """A log that names the part."""
        return lambda line: self.log(f"[seed {seed} {part}] {line}")

    def victim(self, seed: int, name: str) -> None:
        """Train, export, verify and attack one victim."""
        job, folder, say = self.job, self.job.folder(self.out, seed, name), self.say(seed, name)
        train(job.training(name, seed, self.out), folder, log=say)
        if name not in job.attacked:
            return
        run = load_run(folder)
        say(printable(export_run(run, self.splits)["text"]))
        accuracy, agreement = as_attacked(verify_run(run, self.splits))
        say(f"int8 accuracy {accuracy:.2%}, agreement with the trained model {agreement:.2%}")
        self.answers(run)
        for answer in job.answers:
            found = attack_run(
                run,
                self.splits,
                job.attacker(seed),
                answer,
                folder / f"attack-{answer}",
                queries=self.queries,
            )
            say(
                f"attack with answers {answer}: {found['queries']} queries, clone accuracy "
                f"{found['accuracy']:.2%}, fidelity {found['fidelity']:.2%}"
            )

    def answers(self, run: Run) -> None:
        """Write ``answers.json``: how the exported model answers test images and queries."""
        onnx = exported(run)

        def make() -> dict[str, Any]:
            test, queries = (
                softmax(predict(onnx, images)) for images in (self.splits.test, self.queries)
            )
            some = self.splits.test.subset(slice(256)).images
            return {
                "test": asdict(Confidence.of(test)),
                "transfer": asdict(Confidence.of(queries)),
                "deterministic": is_deterministic(Victim(onnx), some),
                "distributions": are_distributions(queries),
            }

        source = f"{file_fingerprint(onnx)} {identity(self.queries)}"
        step(run.folder / "answers.json", source, make)

    def result(self, command: str) -> Result:
        """What the files in OUT say."""
        job, out = self.job, self.out
        attacker = job.attacker(job.seeds[0])
        victims = [
            self.victim_result(seed, name)
            for seed in job.seeds
            for name in job.attacked
            if all(
                (job.folder(out, seed, name) / f"attack-{answer}" / "summary.json").is_file()
                for answer in job.answers
            )
        ]
        return Result(
            dataset=self.splits.name,
            num_classes=self.splits.num_classes,
            chance=chance(self.splits.test.labels),
            query_set=attacker.query_set,
            query_budget=len(self.queries),
            attack="KnockoffNets",
            attack_settings={
                key: getattr(attacker, key) for key in ("epochs", "batch_size", "lr", "pad", "flip")
            },
            clone=attacker.clone,
            seeds=job.seeds,
            command=command,
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            seconds=sum(self.seconds()),
            versions=versions(),
            hardware=hardware(),
            victims=victims,
        )

    def seconds(self) -> Iterator[float]:
        """How long each finished part took."""
        job = self.job
        attacks = (f"attack-{answer}/summary" for answer in job.answers)
        parts = ("summary", "export", "verify", "answers", *attacks)
        for seed in job.seeds:
            for name in ("fp", *job.victims):
                folder = job.folder(self.out, seed, name)
                files = (folder / f"{part}.json" for part in parts)
                yield from (read_json(file)["seconds"] for file in files if file.is_file())

    def victim_result(self, seed: int, name: str) -> VictimResult:
        """What the files in a victim's folder say."""
        teacher = self.job.teacher(name)
        names = [name] if teacher == "fp" else [teacher, name]
        trainings = [self.job.training(each, seed, self.out) for each in names]
        folder, fp = (self.job.folder(self.out, seed, part) for part in (name, teacher))
        trained, export, verified, answers = (
            read_json(folder / f"{part}.json")
            for part in ("summary", "export", "verify", "answers")
        )
        attacks = {
            answer: read_json(folder / f"attack-{answer}" / "summary.json")
            for answer in self.job.answers
        }
        measured = [spec.name for spec in fields(AttackResult)]
        accuracy, agreement = as_attacked(verified)
        return VictimResult(
            seed=seed,
            name=name,
            # "qat" is the undefended control: what a defended teacher made is not
            method="-".join(training.method for training in trainings),
            settings={key: value for each in trainings for key, value in _told(each).items()},
            accuracy_fp=read_json(fp / "summary.json")["test_accuracy"],
            accuracy_fake=verified["accuracy_fake"],
            accuracy_onnx=accuracy,
            validation_accuracy=trained["validation_accuracy"],
            argmax_agreement=agreement,
            int8_layers=export["int8_layers"],
            float_layers=export["float_layers"],
            test=Confidence(**answers["test"]),
            transfer=Confidence(**answers["transfer"]),
            deterministic=answers["deterministic"],
            distributions=answers["distributions"],
            attacks={
                answer: AttackResult(**{key: found[key] for key in measured})
                for answer, found in attacks.items()
            },
        )


def _told(config: TrainConfig) -> dict[str, Any]:
    """What the report says of a victim: λ, T, and what is not as usual."""
    always = ("weight", "temperature", *INI)
    others = ("label_smoothing", "weight_bits", "activation_bits", "accuracy_budget", *MISDIRECTION)
    own = LOSS if config.kind.sign else INI if config.method == "ini" else ()
    usual = TrainConfig(method=config.method, teacher=config.teacher)
    return {
        name: getattr(config, name)
        for name in (*own, *others)
        if name in always or getattr(config, name) != getattr(usual, name)
    }
