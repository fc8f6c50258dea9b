"""Whole training steps of QAT and of DivQAT as one compiled graph."""

import re
from functools import partial

import backends
import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from networks import build, images
from test_traceable import Dispatched
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import divqat
from divqat import ops
from divqat.ops._backend import best

SYNCS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread", "serving"),
    pytest.mark.skipif(
        backends.INTERPRETED in backends.names(), reason="only Triton's kernels are looked at here"
    ),
]


@pytest.fixture(params=["default", "traceable"])
def serving(request):
    """Run the test with what serves here, and with what a compiler sees through."""
    torch._dynamo.reset()
    counters.clear()
    with ops.backend(best("cpu") if request.param == "default" else request.param):
        yield request.param


def small():
    """A folded BatchNorm with its ReLU, and a linear layer: every kernel and switch is in it."""
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head)


class Training:
    """A prepared network, and if ``loss`` is divqat its teacher, which is run in the step."""

    def __init__(self, loss="divqat", mode="exact", network=small):
        self.teacher = network().eval()
        self.model = divqat.prepare(network(), divqat.QuantConfig(mode=mode), images())
        self.loss = divqat.nn.DivQATLoss(0.2 if loss == "divqat" else 0.0, temperature=4.0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.compute = self.forward

    def forward(self, x, target):
        answers = None
        if self.loss.enabled:
            with torch.no_grad():
                answers = self.teacher(x)
        return self.loss(self.model(x), target, answers)

    def compiled(self, backend):
        self.compute = torch.compile(self.forward, fullgraph=True, backend=backend)
        return self

    def steps(self, n=1):
        """n steps; returns the losses, and all that they have left behind."""
        losses = []
        for seed in range(n):
            self.optimizer.zero_grad()
            loss = self.compute(images(seed=seed), torch.arange(8) % 5)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        grads = [parameter.grad for parameter in self.model.parameters()]
        state = [t for t in self.model.state_dict().values() if isinstance(t, torch.Tensor)]
        return [*losses, *grads, *state, self.loss.ce, self.loss.divergence]


def test_a_step_is_one_graph_with_the_same_bits_that_shows_traceable_ops_only(serving):
    # what a compiler sees through has ten times the nodes
    network = partial(build, "residual") if serving == "default" else small
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    got = Training(mode="delayed", network=network).compiled(backend).steps(3)
    assert all(map(torch.equal, got, Training(mode="delayed", network=network).steps(3)))
    # the first batch of a delayed quantizer is exact: another graph; each forward and backward
    assert len(graphs) == 2 * 2
    assert not counters["graph_break"]
    for graph in graphs:
        assert "aten.convolution" in graph
        # tiny copies of what the step changes are no obstacle
        ours = set(re.findall(r"divqat\.(\w+)", graph)) - {"snapshot"}
        assert bool(ours) == (serving == "default"), ours


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_second_backward_of_a_compiled_loss_scales_the_gradient_once(backend):
    logits, teacher, target = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5), [0] * 8

    def loss(logits):
        return ops.divergence_loss(logits, teacher, torch.tensor(target), weight=0.1)

    (wanted,) = torch.autograd.grad(4 * loss(logits), logits)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)(logits)
    first, second = (
        torch.autograd.grad(4 * compiled, logits, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, wanted) and torch.equal(second, wanted)


def test_a_step_with_inductor():
    got, wanted = Training().compiled("inductor").steps(2), Training().steps(2)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_each_switch_compiles_once_more_and_back_not_at_all():
    counter = CompileCounterWithBackend("aot_eager")
    training = Training("qat").compiled(counter)
    other = Training("qat")

    def compiled_for():
        same = map(torch.equal, training.steps(2), other.steps(2))
        assert all(same) and not counters["graph_break"]
        return counter.frame_count

    assert compiled_for() == 1
    for run in (training, other):
        divqat.quantize.freeze_observers(run.model)
    assert compiled_for() == 2
    for run in (training, other):
        divqat.quantize.freeze_batchnorm(run.model)
    assert compiled_for() == 3
    for run in (training, other):
        for module in run.model.modules():
            if isinstance(module, divqat.nn.FakeQuantize):
                module.enable_observer()
            if isinstance(module, divqat.nn.QuantConvBn2d):
                module.frozen = False
    assert compiled_for() == 3


@pytest.mark.parametrize("mode", ["exact", "delayed"])
def test_the_backward_does_not_see_a_range_that_has_moved_on(mode):
    """The compiler may compute a mask again in the backward, but not from the new buffers."""
    grads = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        ends = torch.tensor(-0.5), torch.tensor(0.5)
        state = *ends, torch.tensor(1 / 255), torch.tensor(128, dtype=torch.int32)

        def quantized(x, state=state):
            y = ops.fake_quantize_observed(
                x.sin() * x, *state, 0, 255, averaging_constant=0.3, mode=mode
            )
            return y.square().sum()

        x = torch.linspace(-4, 4, 100).requires_grad_()
        grads.append(torch.autograd.grad(wrap(quantized)(x), x)[0])
    assert 0 < (grads[0] == 0).sum() < 90  # some are clipped
    assert torch.equal(*grads)


def test_a_delayed_step_that_has_seen_a_batch_is_one_graph():
    counter = CompileCounterWithBackend("eager")
    training = Training(mode="delayed").compiled(counter)
    divqat.quantize.observe_first(training.model, [images()])
    training.steps(2)
    assert counter.frame_count == 1


@pytest.mark.parametrize("loss", ["qat", "divqat"])
def test_no_step_waits_for_the_device(loss, serving):
    training = Training(loss)
    with Dispatched() as dispatched:
        training.steps(2)
    names = {name.partition("::")[2].partition(".")[0] for name in dispatched.names}
    assert "convolution" in names and ("aminmax" in names) == (serving == "traceable")
    assert not names & SYNCS
