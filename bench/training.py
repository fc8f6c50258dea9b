"""Training steps of the float model, of each library and of ours: eager, compiled, captured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import divqat
from bench import qat_models
from bench.case import our_backends, serving
from bench.misdirected import Misdirected
from bench.nets import NETWORKS

FLOAT = "float"
MODES = ("eager", "compiled", "CUDA graph")
LEARNING_RATE = 1e-6  # so small that all contenders keep the same weights during the measurement


@dataclass
class Setup:
    """The common inputs of all contenders of a case."""

    model: nn.Module  # float, in training mode
    teacher: nn.Module  # the same, in eval mode
    x: Tensor  # [N, 3, H, W]
    target: Tensor  # [N]
    teacher_logits: Tensor  # [N, classes]
    device: str
    dtype: torch.dtype
    pool: Any  # memory pool of all captured graphs, which do not read each other's memory


def set_up_case(network: str, batch: int, device: str, dtype: torch.dtype) -> Setup:
    """Create model and data, with running statistics that fit the data."""
    net = NETWORKS[network]
    torch.manual_seed(0)
    model = net.build().to(device, memory_format=torch.channels_last).train()
    x = torch.randn(batch, 3, net.size, net.size).to(device, memory_format=torch.channels_last)
    target = torch.randint(0, net.classes, (batch,)).to(device)
    with torch.no_grad():
        for _ in range(10):
            model(x)
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = teacher(x)
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
    return Setup(model, teacher, x, target, logits, device, dtype, pool)


@dataclass
class Recipe:
    """The training step of a contender.

    Attributes:
        prepare: a function from float model and one batch to the model.
        loss: ``ce``; DivQAT's with a ``teacher`` that runs in the step, or with ``cached`` logits;
            or ``misdirected``: distillation from a teacher in the step, and proxies in the batch.
        backend: returns the divqat backend of our own contenders, or raises :class:`Absent`.
        modes: the supported modes; a model with graph breaks cannot be compiled or captured.
        as_codes: save activations for the backward pass as 8-bit codes.
    """

    prepare: qat_models.Prepare
    loss: str = "ce"
    backend: Callable[[], str] | None = None
    modes: tuple[str, ...] = MODES
    as_codes: bool = False


def recipes(device: str) -> dict[str, Recipe]:
    """Name → contender."""
    contenders = {
        FLOAT: Recipe(lambda model, x: copy.deepcopy(model)),
        "torch.ao FakeQuantize": Recipe(qat_models.torch_ao(fused=False), modes=("eager",)),
        "torch.ao fused": Recipe(qat_models.torch_ao(fused=True), modes=("eager",)),
        "torchao PT2E": Recipe(qat_models.pt2e, modes=("eager",)),
        "Brevitas": Recipe(qat_models.brevitas, modes=("eager",)),
        "PyTorch": Recipe(qat_models.pure_pytorch),
    }
    for name, backend in our_backends(device).items():
        if name == "divqat torch":  # the fallback, for comparison
            contenders[name] = Recipe(qat_models.ours(), backend=backend, modes=("eager",))
            continue
        contenders[name] = Recipe(qat_models.ours(), backend=backend)
        contenders[f"{name}, delayed"] = Recipe(qat_models.ours("delayed"), backend=backend)
        for loss, label in (("teacher", "teacher in the step"), ("cached", "cached teacher")):
            contenders[f"{name}, DivQAT, {label}"] = Recipe(qat_models.ours(), loss, backend)
        # proxies are drawn outside the compiled or captured part
        contenders[f"{name}, DivQAT, misdirected"] = Recipe(
            qat_models.ours(), "misdirected", backend, modes=("eager",)
        )
        contenders[f"{name}, a call per weight"] = Recipe(qat_models.one_by_one, backend=backend)
        contenders[f"{name}, saved as codes"] = Recipe(
            qat_models.ours(), backend=backend, modes=("eager", "CUDA graph"), as_codes=True
        )
    for name, mode in (("divqat traceable", "exact"), ("divqat traceable, delayed", "delayed")):
        contenders[name] = Recipe(
            qat_models.ours(mode), backend=lambda: "traceable", modes=("compiled",)
        )
    return contenders


class Step:
    """A training step of a contender. The model keeps its gradients until the next step."""

    def __init__(self, setup: Setup, recipe: Recipe, mode: str) -> None:
        self.backend = recipe.backend() if recipe.backend else None
        self.setup = setup
        self.kind, self.as_codes = recipe.loss, recipe.as_codes
        self.model = recipe.prepare(setup.model, setup.x).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        self.loss = divqat.nn.DivQATLoss(weight=0.05, temperature=4.0).to(setup.device)
        self.misdirected: Misdirected | None = None
        if recipe.loss == "misdirected":
            self.misdirected = Misdirected(setup.x, setup.target, setup.teacher_logits.shape[1])
            pull = divqat.nn.DivQATLoss(weight=-1.0, direction="teacher_student")
            self.loss = pull.to(setup.device)
        self.compute: Callable[[], Tensor] = self._compute
        self.graph: Any = None
        # all compiled contenders are versions of one function; the default limit is eight
        with self.serving(), torch._dynamo.config.patch(recompile_limit=64):
            self.value = self._step()  # the first batch sets the ranges and is not timed
            if mode == "compiled":
                self.compute = torch.compile(self._compute, fullgraph=True, dynamic=False)
            elif mode == "CUDA graph":
                self._capture()
            self()

    def serving(self) -> AbstractContextManager[None]:
        """A context for calls of the step."""
        return serving(self.backend)

    def _compute(self) -> Tensor:
        setup = self.setup
        saving = divqat.quantize.save_as_codes(self.model) if self.as_codes else nullcontext()
        x, n = setup.x, len(setup.x)
        if self.misdirected is not None:
            proxies = self.misdirected.draw()
            x = torch.cat([x, proxies])
        with torch.autocast(setup.device, setup.dtype, enabled=setup.dtype != torch.float32):
            with saving:
                logits = self.model(x)
            if self.kind == "ce":
                return F.cross_entropy(logits, setup.target)
            teacher_logits = setup.teacher_logits
            if self.kind in ("teacher", "misdirected"):
                with torch.no_grad():
                    teacher_logits = setup.teacher(setup.x)
            loss = self.loss(logits[:n], setup.target, teacher_logits)
            if self.misdirected is not None:
                loss = loss + self.misdirected.loss(logits[n:].float(), proxies)
            return loss

    def _step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        value = self.compute()
        value.backward()
        self.optimizer.step()
        return value.detach()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.setup.pool):
            value = self.compute()
            value.backward()
            self.optimizer.step()
        self.value = value.detach()

    def __call__(self, i: int = 0) -> None:
        if self.graph is None:
            self.value = self._step()
        else:
            self.graph.replay()

    def classifier_gradient(self) -> Tensor:
        """The gradient of the last layer's weight, flattened, float32."""
        grads = [p.grad for p in self.model.parameters() if p.dim() == 2 and p.grad is not None]
        return grads[-1].detach().float().flatten()
