"""Fake quantization of activations: with a given, an observed and a learned scale.

All contenders start with the range -6 to 6, on normal values with standard deviation 2, so that
some are clipped, and update it with the averaging constant 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import plain, torch_ao
from bench.case import DTYPES, LAYOUTS, Case, Contender, Inputs, Plan, import_peer, our_backends
from bench.case import rotations as rotations_for
from bench.nets import NETWORKS
from divqat import ops

LOW, HIGH, AVERAGING = -6.0, 6.0, 0.01
STEP = (HIGH - LOW) / 255
OPS = (
    "fake_quantize",
    "fake_quantize_observed",
    "relu_fake_quantize_observed",
    "fake_quantize_lsq",
)
# Bytes per element for both directions: (multiple of the dtype's size, additional bytes).
FLOORS = {
    "fake_quantize": (4, 2 / 8),
    "fake_quantize_observed": (5, 2 / 8),  # the range has to be known before the first output
    "relu_fake_quantize_observed": (5, 2 / 8),
    "fake_quantize_lsq": (5, 0),
}

# facts for the check, with a given scale and with a learned one
GIVEN = {"scale": STEP, "zero_point": 128}
LEARNED = {"scale": STEP, "zero_point": 0, "low": -128, "unit": 1.0}

Make = Callable[[], Contender]


def plans(device: str, dtypes: list[str], layouts: list[str]) -> Iterator[Plan]:
    """Every op on three activations of each network."""
    for op in OPS:
        for dtype in dtypes:
            for layout in layouts:
                for name, net in NETWORKS.items():
                    for c, h, w in net.activations:
                        shape = (net.batch[device], c, h, w)
                        yield Plan(op, f"{name} {list(shape)}", shape, dtype, layout)


def case(plan: Plan, device: str, rotations: int | None = None) -> Case:
    """Allocate the inputs of a plan."""
    dtype = DTYPES[plan.dtype]
    n = math.prod(plan.shape)
    generator = torch.Generator().manual_seed(0)
    # one more tensor than turns: each is the input of a turn and the gradient of the previous one
    count = (rotations or rotations_for(n * dtype.itemsize, device)) + 1
    tensors = []
    for _ in range(count):
        x = torch.randn(plan.shape, generator=generator).mul_(2).to(device, dtype)
        if x.dim() == 4:
            x = x.contiguous(memory_format=LAYOUTS[plan.layout])
        tensors.append(x)
    sets = []
    for x, grad in pairwise(tensors):
        leaf = x.detach().requires_grad_()
        sets.append(Inputs((leaf,), [leaf], [grad]))
    multiple, rest = FLOORS[plan.op]
    return Case(
        plan,
        sets,
        bytes=(multiple * dtype.itemsize + rest) * n,
        copied=[[x] for x in tensors[:-1]],
        contenders=_contenders(plan.op, device, n * dtype.itemsize),
        check=partial(_check, plan.op),
    )


def _contenders(op: str, device: str, nbytes: int) -> dict[str, Make]:
    contenders: dict[str, Make] = {}
    for name, backend in our_backends(device).items():
        contenders[name] = lambda b=backend: _ours(op, device, b())
        if "observed" in op:
            delayed = partial(_ours, op, device, mode="delayed", saves=nbytes)
            contenders[f"{name}, delayed"] = lambda b=backend, make=delayed: make(backend=b())
    contenders |= _learned_peers(device) if op == "fake_quantize_lsq" else _peers(op, device)
    contenders["PyTorch, eager"] = lambda: _plain(op, device, lambda f: f)
    for name in plain.COMPILED:
        contenders[name] = lambda name=name: _plain(
            op, device, lambda f, name=name: plain.compiled(f, name, device)
        )
    return contenders


def _ours(op: str, device: str, backend: str, mode: str = "exact", saves: float = 0.0) -> Contender:
    scale = torch.tensor(STEP, device=device)
    if op == "fake_quantize_lsq":
        scale.requires_grad_()
        zero = torch.zeros((), dtype=torch.int32, device=device)
        return Contender(
            lambda x: ops.fake_quantize_lsq(x, scale, zero, -128, 127),
            [scale],
            backend,
            lambda: LEARNED,
        )
    zero_point = torch.tensor(128, dtype=torch.int32, device=device)
    if op == "fake_quantize":
        return Contender(
            lambda x: ops.fake_quantize(x, scale, zero_point, 0, 255),
            backend=backend,
            facts=lambda: GIVEN,
        )
    low, high = (torch.tensor(v, device=device) for v in (LOW, HIGH))
    options: Any = {"averaging_constant": AVERAGING, "mode": mode, "relu": op.startswith("relu")}

    def facts() -> dict[str, Any]:
        if mode == "delayed":  # quantizes with the range before this batch
            return GIVEN | {"delayed": True}
        return {"scale": scale.item(), "zero_point": zero_point.item()}

    return Contender(
        lambda x: ops.fake_quantize_observed(x, low, high, scale, zero_point, 0, 255, **options),
        backend=backend,
        facts=facts,
        saves=saves,
    )


def _plain(op: str, device: str, wrap: Callable[[Any], Any]) -> Contender:
    if op == "fake_quantize_lsq":
        scale = torch.tensor(STEP, device=device, requires_grad=True)
        run = wrap(lambda x, scale: plain.learned(x, scale, -128, 127))
        return Contender(lambda x: run(x, scale), [scale], facts=lambda: LEARNED)
    if op == "fake_quantize":
        args = torch.tensor(STEP, device=device), torch.tensor(128.0, device=device)
        run = wrap(lambda x: plain.fake_quantize(x, *args, 0, 255))
        return Contender(run, facts=lambda: GIVEN)
    module = plain.Observed(LOW, HIGH, AVERAGING, op.startswith("relu")).to(device)

    def facts_of_module() -> dict[str, Any]:
        scale, zero_point = module.qparams()
        return {"scale": scale.item(), "zero_point": zero_point.item()}

    return Contender(wrap(module), facts=facts_of_module)


def _peers(op: str, device: str) -> dict[str, Make]:
    peers: dict[str, Make] = {
        name: lambda name=name: _module(op, device, name) for name in torch_ao.QUANTIZERS
    }
    if op == "fake_quantize":
        peers["torch.fake_quantize_per_tensor_affine"] = lambda: _aten(device)
    return peers


def _aten(device: str) -> Contender:
    scale = torch.tensor(STEP, device=device)
    zero_point = torch.tensor(128, dtype=torch.int32, device=device)
    return Contender(
        lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255),
        facts=lambda: GIVEN,
    )


def _module(op: str, device: str, name: str) -> Contender:
    """A module of torch.ao or torchao, with the common initial range."""
    module: Any = torch_ao.quantizer(
        name,
        "MovingAverageMinMaxObserver",
        signed=False,
        quant_min=0,
        quant_max=255,
        averaging_constant=AVERAGING,
    ).to(device)
    observer = module.activation_post_process
    observer.min_val = torch.tensor(LOW, device=device)
    observer.max_val = torch.tensor(HIGH, device=device)
    module.scale.fill_(STEP)
    module.zero_point.fill_(128)
    if op == "fake_quantize":
        module.disable_observer()
    return Contender(
        nn.Sequential(nn.ReLU(), module) if op.startswith("relu") else module,
        facts=lambda: {"scale": module.scale.item(), "zero_point": module.zero_point.item()},
    )


def _learned_peers(device: str) -> dict[str, Make]:
    def aten() -> Contender:
        scale = torch.tensor([STEP], device=device, requires_grad=True)
        zero_point = torch.zeros(1, device=device)
        op = torch._fake_quantize_learnable_per_tensor_affine
        return Contender(
            lambda x: op(x, scale, zero_point, -128, 127, 1.0),
            [scale],
            facts=lambda: LEARNED,
        )

    def brevitas() -> Contender:
        layers = import_peer("brevitas.nn", "brevitas")
        quant = import_peer("brevitas.quant", "brevitas")
        # its scale is a statistic of the first batches (300 by default), afterwards a parameter
        quantizer = quant.Int8ActPerTensorFloat.let(collect_stats_steps=1)
        module = layers.QuantIdentity(act_quant=quantizer).to(device)
        for _ in range(2):
            module(torch.ones(1, device=device))
        (threshold,) = module.parameters()
        with torch.no_grad():
            threshold.fill_(STEP * 128)
        return Contender(
            module,
            [threshold],
            facts=lambda: LEARNED | {"unit": 1 / 128},
        )

    return {"ATen learnable": aten, "Brevitas": brevitas}


def _check(
    op: str, contender: Contender, inputs: Inputs, outputs: list[Tensor], grads: list[Tensor]
) -> None:
    """Compare with the definition in float64, for any way of rounding.

    An output is on the grid and at most half a step from its input, or from the end of the range if
    the input exceeds it; a gradient passes inside the range and is 0 outside.
    """
    facts = contender.facts()
    x, (y,), dx = inputs.leaves[0].detach(), outputs, grads[0]
    assert y.shape == x.shape and y.dtype == x.dtype, f"{y.dtype} {y.shape} for {x.dtype}"
    assert dx.dtype == x.dtype
    grad = inputs.grads[0].double()  # type: ignore[index]
    value = F.relu(x.double()) if op.startswith("relu") else x.double()
    if "observed" in op:
        _check_range(facts, value)
    scale, zero_point = facts["scale"], facts["zero_point"]
    low_code = facts.get("low", 0)
    low, high = (low_code - zero_point) * scale, (low_code + 255 - zero_point) * scale
    ideal = value.clamp(low, high)
    rounding = torch.finfo(x.dtype).eps * ideal.abs() + 1e-3 * scale
    error = (y.double() - ideal).abs()
    assert (error <= 0.5 * scale + rounding).all(), f"off by {(error / scale).max():.3f} steps"
    codes = y.double() / scale
    assert ((codes - codes.round()).abs() * scale <= rounding).all(), "not on the grid"
    inside = (value > low + scale) & (value < high - scale)
    outside = (value < low - scale) | (value > high + scale)
    assert outside.any() and inside.any()
    if op.startswith("relu"):
        outside |= x < 0
        inside &= x > 0
    # some contenders multiply by the scale and divide by it again
    same = (dx.double() - grad).abs() <= torch.finfo(x.dtype).eps * grad.abs()
    assert same[inside].all(), "gradient inside the range"
    assert (dx[outside] == 0).all(), "gradient outside the range"
    if op == "fake_quantize_lsq":
        _check_scale_gradient(facts, value, grad, grads[1].item(), torch.finfo(x.dtype).eps)


def _check_scale_gradient(
    facts: dict[str, Any], x: Tensor, grad: Tensor, found: float, eps: float
) -> None:
    """Compare with Esser et al. 2020, eq. 3, clipping before or after rounding: values within half
    a step of the end may count as clipped or not. Brevitas computes in bfloat16 for such inputs."""
    v = x / facts["scale"]
    wanted = []
    for test in (v, v.round()):
        slope = torch.where((test < -128) | (test > 127), v.clamp(-128, 127), v.round() - v)
        wanted.append((grad * slope).sum().item() * facts["unit"])
    # a sum of n random terms with standard deviation 0.6; a few near ties may differ
    tolerance = 0.01 * math.sqrt(x.numel()) * facts["unit"]
    relative = max(1e-3, 8 * eps)
    right = any(abs(found - w) <= tolerance + relative * abs(w) for w in wanted)
    assert right, f"gradient of the scale: {found}, not {wanted}"


def _check_range(facts: dict[str, Any], value: Tensor) -> None:
    if facts.get("delayed"):
        return
    low = LOW + AVERAGING * (value.min().item() - LOW)
    high = HIGH + AVERAGING * (value.max().item() - HIGH)
    scale = (high - low) / 255
    assert abs(facts["scale"] / scale - 1) < 1e-4, f"scale {facts['scale']}, not {scale}"
    assert abs(facts["zero_point"] + low / scale) <= 1, f"zero point {facts['zero_point']}"
