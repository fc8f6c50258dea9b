"""What prepare and convert cannot take says what to do instead."""

import copy

import pytest
import torch
from testing import randn
from torch import nn
from torch.nn.utils import (  # fmt: skip
    parametrizations,
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)

import divqat
from divqat.quantize import QuantConfig, convert

X = randn(8, 1, 6, 6)
# How a weight is computed from others, and what makes it a parameter again.
COMPUTED = {
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), prune.remove, "prune.remove"),
    "weight norm": (weight_norm, remove_weight_norm, "remove_weight_norm"),
    "spectral norm": (spectral_norm, remove_spectral_norm, "remove_spectral_norm"),
    "weight norm, parametrized": (
        *(parametrizations.weight_norm, parametrize.remove_parametrizations),
        "parametrize.remove_parametrizations",
    ),
    "spectral norm, parametrized": (
        *(parametrizations.spectral_norm, parametrize.remove_parametrizations),
        "parametrize.remove_parametrizations",
    ),
}
computed = pytest.mark.parametrize("case", COMPUTED.values(), ids=COMPUTED.keys())
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def float_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)).eval()


def prepared() -> nn.Module:
    return divqat.prepare(float_model(), "x86", X)


@computed
@pytest.mark.parametrize(("layer", "called"), [("0", True), ("3", False), ("5", True)])
def test_a_computed_weight_is_refused_before_prepare(case, called, layer):
    compute, remove, call = case
    model = float_model()
    compute(model.get_submodule(layer))
    if called:
        model(X)
    message = (
        rf"model: wanted plain parameters, got a weight of '{layer}'.*torch\.nn\.utils\.{call}\("
    )
    with pytest.raises(ValueError, match=message):
        divqat.prepare(model, "x86", X)
    remove(model.get_submodule(layer), "weight")
    divqat.prepare(model, "x86", X)(X)


def test_a_pruned_bias_and_batchnorm_are_refused():
    for layer, name in ((0, "bias"), (1, "weight")):
        model = float_model()
        prune.random_unstructured(model[layer], name, 0.5)
        with pytest.raises(ValueError, match=f"got a {name} of '{layer}'"):
            divqat.prepare(model, "x86", X)


def test_a_computed_weight_of_a_layer_that_stays_in_float_is_not_refused():
    model = float_model()
    parametrizations.weight_norm(model[5])
    divqat.prepare(model, QuantConfig(skip=("5",)), X)(X)
    weight_norm(model[3])  # whose weight torch cannot copy
    with pytest.raises(ValueError, match=r"model: wanted a model that copy\.deepcopy copies"):
        divqat.prepare(model, QuantConfig(skip=("3", "5")), X)


@computed
def test_a_computed_weight_trains_after_prepare_and_is_refused_by_convert(case):
    compute, remove, call = case
    model, alone = prepared(), divqat.quantize.ungroup_weights(prepared())
    optimizers = []
    for twin in (model, alone):
        for layer in ("0", "3"):
            torch.manual_seed(0)  # spectral norm draws its vectors
            compute(twin.get_submodule(layer))
        optimizers.append(torch.optim.SGD(twin.parameters(), 0.05))
    for _ in range(3):
        outputs = [twin(X) for twin in (model, alone)]
        assert torch.equal(*outputs)  # a group would have the weights of the step before
        for y, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
    with pytest.raises(ValueError, match=rf"prepared: wanted plain.*torch\.nn\.utils\.{call}\("):
        convert(model)
    for layer in ("0", "3"):
        remove(model.get_submodule(layer), "weight")
    assert convert(model)(X).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X,), "config: wanted a QuantConfig or the name of a preset, got Tensor; call prepare"),
        ((X, "x86"), "config: wanted a QuantConfig or the name of a preset, got Tensor"),
        ((None, X), "config: wanted a QuantConfig or the name of a preset, got NoneType"),
        (("x86", "x86"), "example_input: wanted a batch that the model accepts, got str"),
        (("x86", QuantConfig()), "example_input: wanted a batch.*got QuantConfig"),
    ],
)
def test_arguments_in_the_wrong_order(arguments, message):
    with pytest.raises(TypeError, match=message):
        divqat.prepare(float_model(), *arguments)
    with pytest.raises(TypeError, match=r"model: wanted an nn\.Module, got Tensor"):
        divqat.prepare(X, float_model())


def test_preparing_and_converting_twice():
    model = prepared()
    model(X)
    converted = convert(model)
    with pytest.raises(ValueError, match="got one that is already prepared"):
        divqat.prepare(model, "x86", X)
    with pytest.raises(ValueError, match="got one that is already converted"):
        divqat.prepare(converted, "x86", X)
    with pytest.raises(ValueError, match="got one that is already converted"):
        convert(converted)
    with pytest.raises(ValueError, match="got one that is already converted"):
        divqat.summary(converted)


@pytest.mark.parametrize("keep", [lambda model: model, copy.deepcopy])
def test_a_layer_that_is_put_in_after_prepare_stays_in_float_and_convert_says_so(keep):
    body = nn.Sequential(float_model(), nn.Linear(3, 3))
    model = divqat.prepare(body, QuantConfig(skip=("1",)), X)
    model.get_submodule("0").set_submodule("5", nn.Linear(64, 3))
    model = keep(model)
    model(X)
    with pytest.warns(UserWarning, match=r"added after prepare stay in float:\n0\.5 \(Linear\)"):
        convert(model)


def test_a_transposed_convolution_with_an_output_size_is_converted():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(1, 3, 3, 2, 1), nn.ConvTranspose2d(3, 1, 3, 2, 1)
            self.head = nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return self.head(self.up(self.down(x), output_size=x.shape))

    model = divqat.prepare(Up().eval(), "x86", X)
    for size in (6, 7):
        x = randn(4, 1, size, size)
        assert model(x).shape == (4, 2, size, size)
    y = model.eval()(X)
    torch.testing.assert_close(convert(model)(X), y, rtol=0.02, atol=0.02)
