"""The black box that an attacker sees: it counts and caps queries and decides what is shown."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from divqat.errors import require, unknown_name
from divqat.shown import keep_top, label_only

# Released answers from probabilities [N, num_classes] and images [N, C, H, W].
Defense = Callable[[Tensor, Tensor], Tensor]
ANSWERS = ("probs", "label", "topk", "rounded")


class QueryBudgetExceeded(RuntimeError):
    """More images were asked than the budget allows; none of them was answered or counted."""


class Victim:
    """A deployed model behind an interface that answers images and nothing else.

    Args:
        model: answers logits. An ``nn.Module`` in eval mode, the path of an ONNX file, an open
            ``onnxruntime.InferenceSession``, or any function from float32 images [N, C, H, W] to
            logits [N, num_classes]. Public attributes of the victim do not lead to it.
        answer: what is shown of the probabilities:
            ``"probs"`` all of them; ``"label"`` the most probable class as a one-hot row;
            ``"topk"`` the ``k`` largest, zero elsewhere, not renormalized; ``"rounded"`` all,
            rounded to ``decimals`` places, not renormalized. Ties go to the lower class index.
        k: for ``"topk"`` only.
        decimals: for ``"rounded"`` only.
        defense: a function of the probabilities [N, num_classes] and the images [N, C, H, W],
            float32 on the CPU, to what is released in their place, of the same shape; ``answer``
            then decides what of it is shown. See :mod:`divqat.defenses`.
        query_budget: most images that are answered in total; None: no limit.
        batch_size: images that the model sees at once.

    Raises:
        TypeError: ``model`` is none of the above.
        ValueError: an argument out of its range, a module in training mode, or an ONNX model that
            does not take one float32 [N, C, H, W] input and give one output.
        FileNotFoundError: no such ONNX file.
        ImportError: an ONNX path without onnxruntime.

    Example:
        >>> victim = Victim(lambda images: images.flatten(1), answer="label", query_budget=10)
        >>> victim(torch.eye(2).view(2, 1, 1, 2))
        tensor([[1., 0.],
                [0., 1.]])
        >>> victim.queries, victim.remaining
        (2, 8)
    """

    def __init__(
        self,
        model: Any,
        *,
        answer: str = "probs",
        k: int | None = None,
        decimals: int | None = None,
        defense: Defense | None = None,
        query_budget: int | None = None,
        batch_size: int = 256,
    ) -> None:
        if answer not in ANSWERS:
            raise unknown_name("answer", answer, ANSWERS)
        for name, value, owner, least in (
            ("k", k, "topk", 1),
            ("decimals", decimals, "rounded", 0),
        ):
            if answer != owner and value is not None:
                raise ValueError(f"{name}: only answer={owner!r} takes it, got answer={answer!r}")
            if answer == owner and (value is None or value < least):
                raise ValueError(
                    f"{name}: answer={owner!r} wants a number from {least}, got {value}"
                )
        if query_budget is not None and query_budget < 0:
            raise ValueError(f"query_budget: wanted None or at least 0, got {query_budget}")
        if batch_size < 1:
            raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
        self._logits = logits_function(model)
        self._answer, self._k, self._decimals = answer, k, decimals
        self._defense = defense
        self._query_budget, self._batch_size = query_budget, batch_size
        self._queries = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Answer images.

        Args:
            images: floating-point [N, C, H, W] in [-1, 1], on any device.

        Returns:
            float32 [N, num_classes] on the CPU.

        Raises:
            QueryBudgetExceeded: before anything is answered; ``queries`` stays as it was.
            TypeError, ValueError: ``images`` is no finite, floating-point, non-empty 4-d tensor.
            FloatingPointError: the model answered NaN or Inf.
        """
        check_images(images)
        if self.remaining is not None and len(images) > self.remaining:
            raise QueryBudgetExceeded(
                f"{len(images)} images asked, but {self.remaining} of {self._query_budget} "
                "queries remain"
            )
        parts = images.detach().split(self._batch_size)
        answers = torch.cat([self._show(self._logits(part), part) for part in parts])
        self._queries += len(images)
        return answers

    def __repr__(self) -> str:
        return f"Victim({self.answer}, queries={self.queries}, remaining={self.remaining})"

    @property
    def queries(self) -> int:
        """Images answered so far."""
        return self._queries

    @property
    def remaining(self) -> int | None:
        """Images that the budget still allows; None without a budget."""
        return None if self._query_budget is None else self._query_budget - self._queries

    @property
    def answer(self) -> str:
        """What is shown: ``probs``, ``label``, ``top<k>`` or ``rounded<decimals>``."""
        return {"topk": f"top{self._k}", "rounded": f"rounded{self._decimals}"}.get(
            self._answer, self._answer
        )

    @property
    def defense(self) -> str:
        """The defense as text: its settings, the name of a function; ``none`` without one."""
        return "none" if self._defense is None else defense_text(self._defense)

    def _show(self, logits: Tensor, images: Tensor) -> Tensor:
        probs = order = logits.softmax(1)
        if self._defense is None:
            # By logit, not by probability: probabilities that round to the same float still differ.
            order = logits
        else:
            probs = order = self._defend(probs, images)
        if self._answer == "probs":
            return probs
        if self._decimals is not None:
            return probs.round(decimals=self._decimals)
        return label_only(order) if self._k is None else keep_top(probs, self._k, by=order)

    def _defend(self, probs: Tensor, images: Tensor) -> Tensor:
        assert self._defense is not None
        shown = self._defense(probs, images.to("cpu", torch.float32))
        if shown.shape != probs.shape or not shown.isfinite().all():
            raise ValueError(
                f"defense: {self.defense} wanted finite {list(probs.shape)}, "
                f"got {list(shown.shape)} with {int((~shown.isfinite()).sum())} not finite"
            )
        return shown


def defense_text(defense: Defense) -> str:
    """What tells a defense from others, in another process, too."""
    return str(getattr(defense, "__qualname__", defense))


def logits_function(model: Any) -> Callable[[Tensor], Tensor]:
    """Any model that :class:`Victim` takes, as a function from float images to checked logits.

    Returns:
        A function from floating-point [N, C, H, W] on any device to float32 logits
        [N, num_classes] on the CPU. It runs under ``torch.inference_mode`` and raises
        FloatingPointError when a logit is NaN or Inf, ValueError when the module is in training
        mode, the shape is not the one the ONNX model takes or what it answers are probabilities.
    """
    run = _runner(model)

    def logits_of(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits = run(images.float())
        if not isinstance(logits, Tensor):
            raise TypeError(f"model: wanted logits as a Tensor, got {type(logits).__name__}")
        if logits.dim() != 2 or len(logits) != len(images):
            raise ValueError(
                f"model: wanted logits [{len(images)}, num_classes], got {list(logits.shape)}"
            )
        logits = logits.to("cpu", torch.float32)
        if _are_probabilities(logits):
            raise ValueError(
                "model: wanted logits, got rows of sum 1: probabilities, which a second softmax "
                "would flatten; leave the softmax out, or give their logarithms with "
                "lambda images: model(images).clamp(min=1e-12).log()"
            )
        if not logits.isfinite().all():
            bad = int((~logits.isfinite()).any(1).sum())
            raise FloatingPointError(f"model: NaN or Inf in the logits of {bad} of {len(images)}")
        return logits

    return logits_of


def _are_probabilities(logits: Tensor) -> bool:
    """One-hot rows are let pass: they may well be scores, and a softmax of them misleads nobody."""
    distributions = (logits >= 0).all() & ((logits.sum(1) - 1).abs() < 1e-4).all()
    return bool(distributions & ((logits > 0) & (logits < 1)).any())


def _runner(model: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(model, nn.Module):
        check_eval(model)
        return lambda images: _run_module(model, images)
    if isinstance(model, (str, Path)):
        model = open_onnx(Path(model))
    if hasattr(model, "get_inputs") and hasattr(model, "run"):  # an onnxruntime.InferenceSession
        return _session_runner(model)
    if callable(model):
        return model
    raise TypeError(
        "model: wanted an nn.Module, an ONNX path, an InferenceSession or a function, "
        f"got {type(model).__name__}"
    )


def _run_module(model: nn.Module, images: Tensor) -> Tensor:
    check_eval(model)  # again: the owner may have gone on training since
    some = next(chain(model.parameters(), model.buffers()), images)
    return model(images.to(some.device))


def check_eval(model: nn.Module) -> None:
    """Refuse a module in training mode, or with a part that is, by ValueError."""
    training = [name or type(model).__name__ for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(
            f"model: wanted eval mode, but {training[0]!r} is in training mode; call model.eval()"
        )


def open_onnx(path: Path) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU that computes what the file says.

    CPUs without VNNI add products of 8-bit activations and weights in 16 bits, which saturate, and
    by default ONNX Runtime takes that for speed: answers change. Its option
    ``session.x64quantprecision`` keeps such weights from it, so all machines agree. It fails where
    layers share a weight's zero point; then a warning says that the default is used.

    Raises:
        FileNotFoundError: there is no such file. ImportError: ONNX Runtime is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model: no ONNX file at {path}")
    onnxruntime = require("onnxruntime", "export")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4  # a failure is reported below
    providers = ["CPUExecutionProvider"]
    try:  # ConstantSharing would merge zero points that are apart in the file
        return onnxruntime.InferenceSession(
            str(path), options, providers=providers, disabled_optimizers=["ConstantSharing"]
        )
    except Exception as error:
        session = onnxruntime.InferenceSession(str(path), providers=providers)
        warnings.warn(
            f"{path}: sums of int8 products may saturate on this CPU, as ONNX Runtime could not "
            f"open the file with session.x64quantprecision: {error}",
            stacklevel=2,
        )
        return session


def _session_runner(session: Any) -> Callable[[Tensor], Tensor]:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    found = ", ".join(f"{i.name}: {i.type} {i.shape}" for i in inputs)
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        raise ValueError(f"model: wanted one ONNX input, float [N, C, H, W], got {found}")
    if len(outputs) != 1:
        raise ValueError(f"model: wanted one ONNX output, got {[o.name for o in outputs]}")
    name, shape = inputs[0].name, inputs[0].shape
    fixed = shape[0] if isinstance(shape[0], int) else None

    def run(images: Tensor) -> Tensor:
        for wanted, got in zip(shape[1:], images.shape[1:], strict=True):
            if isinstance(wanted, int) and wanted != got:
                raise ValueError(
                    f"images: the ONNX input {name!r} wants {shape}, got {list(images.shape)}"
                )
        parts = []
        for part in images.cpu().split(fixed or len(images)):
            # A fixed batch is filled up with copies of its last image; their answers are dropped.
            missing = (fixed or len(part)) - len(part)
            full = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)])
            answer = session.run(None, {name: full.numpy()})[0]
            parts.append(torch.from_numpy(answer)[: len(part)])
        return torch.cat(parts)

    return run


def check_images(images: Tensor) -> None:
    """Refuse, by TypeError or ValueError, what is no finite float [N, C, H, W] with N >= 1."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: wanted a Tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(
            f"images: wanted floats in [-1, 1], got {images.dtype}; divqat.data.to_float makes them"
        )
    if images.dim() != 4 or not len(images):
        raise ValueError(
            f"images: wanted [N, C, H, W] with N of at least 1, got {list(images.shape)}"
        )
    if not images.isfinite().all():
        raise ValueError("images: wanted finite values, got NaN or Inf")
