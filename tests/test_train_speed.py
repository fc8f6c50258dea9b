"""Mixed precision, compilation and saved codes change the speed, not the result."""

import pytest
import torch
from test_train import QUIET, assert_same, config
from torch import nn
from trainings import PLAIN, teach, train_interrupted, trained

from divqat import trust
from divqat._util.files import read_json
from divqat._util.settings import ConfigError
from divqat.train import TrainConfig, load_run, train
from divqat.train.optimizer import build_optimizer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_reaches_the_same_accuracy(lenet_teacher, tmp_path, precision):
    folders = tmp_path / "mixed", tmp_path / "float32"
    state = trained(lenet_teacher, folders[0], model="lenet", precision=precision)
    other = trained(lenet_teacher, folders[1], model="lenet")
    for name, value in state["model"].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert value.dtype == torch.float32, name  # weights, scales and statistics
    summaries = [read_json(folder / "summary.json") for folder in folders]
    accuracies = [s["test_accuracy"] for s in summaries]
    # With other rounding a training is another sample: three standard errors of 359 images.
    p = sum(accuracies) / 2
    assert abs(accuracies[0] - accuracies[1]) < 3 * (2 * p * (1 - p) / 359) ** 0.5, accuracies
    assert state["rows"][-1]["divergence"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(
        state["model"].values(), other["model"].values(), strict=True
    ) if isinstance(a, torch.Tensor))  # fmt: skip
    assert bool(state["scaler"]) == (precision == "float16")


def test_steps_whose_scaled_gradients_overflow_are_skipped(lenet_teacher, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda *args, **kwargs: scaler(*args, init_scale=2.0**100, **kwargs),
    )
    state = trained(lenet_teacher, tmp_path, model="lenet", precision="float16", epochs=2)
    assert state["scaler"]["scale"] == 2.0 ** (100 - 2 * 6)  # halved by each of 6 steps per epoch
    start = load_run(lenet_teacher).model
    for name, value in start.named_parameters():
        assert torch.equal(value, state["model"].get(name, value)), name


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_a_skipped_step_leaves_the_optimizer_as_it_was(device):
    """Even the first step; the other steps equal those of SGD that is not fused."""
    settings = dict(lr=0.1, momentum=0.9, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(3, 2, 3, 3, generator=generator).to(device) for _ in range(5))
    start = start.contiguous(memory_format=torch.channels_last)
    theirs, ours = (start.clone().requires_grad_() for _ in range(2))
    plain = torch.optim.SGD([theirs], **settings, nesterov=True, foreach=False)
    fused = build_optimizer(TrainConfig(**settings), [ours], torch.device(device))
    scalers = [torch.amp.GradScaler(device, init_scale=4.0) for _ in range(2)]
    for i, grad in enumerate(grads):
        for parameter, optimizer, scaler in zip(
            (theirs, ours), (plain, fused), scalers, strict=True
        ):
            before = parameter.detach().clone()
            optimizer.zero_grad()
            scaler.scale((parameter * grad).sum()).backward()
            if i in (0, 2):
                parameter.grad[0, 0, 0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(parameter.detach(), before) == (i in (0, 2))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_an_interrupted_float16_run_ends_with_the_same_bits(lenet_teacher, tmp_path):
    changes = dict(model="lenet", precision="float16", epochs=2)
    settings = config(lenet_teacher, **{**PLAIN, **changes})
    train_interrupted(settings, tmp_path / "a", 1)
    train(settings, tmp_path / "b", **QUIET)
    assert_same(tmp_path / "a", tmp_path / "b")


def tiny(in_channels, num_classes, image_size):
    """A network with BatchNorm that compiles fast."""
    features = [nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(4 * 3 * 3, num_classes))


@trust(f"{__name__}:tiny")
def test_a_compiled_run_is_the_same_within_rounding(tmp_path, monkeypatch):
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        # Inductor would call ATen's vectors, which ATEN_CPU_CAPABILITY=default takes from it.
        monkeypatch.setattr("torch._inductor.config.cpp.simdlen", 1)
    whole = dict(model=f"{__name__}:tiny", batch_size=647, epochs=2)  # two steps of one shape each
    teacher = teach(tmp_path / "fp", whole["model"])
    state = trained(teacher, tmp_path / "compiled", compile=True, **whole)
    other = trained(teacher, tmp_path / "eager", **whole)
    assert state["model"].keys() == other["model"].keys()
    rows = [s["rows"][0] for s in (state, other)]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-2)
    load_run(tmp_path / "compiled")


def test_activations_saved_as_codes_change_no_bit(vgg_teacher, vgg_divqat, tmp_path):
    trained(vgg_teacher, tmp_path, save_as_codes=True)
    assert_same(tmp_path, vgg_divqat)
    for settings in (dict(method="qat", teacher="a", compile=True), dict(method="fp")):
        with pytest.raises(ConfigError, match="save_as_codes: wanted quantization-aware"):
            TrainConfig(save_as_codes=True, **settings)
