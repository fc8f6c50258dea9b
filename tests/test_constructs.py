"""prepare and export_onnx of every construct in the table: the float network's behaviour stays."""

import copy
import functools
import pickle
import warnings
from dataclasses import fields, is_dataclass
from pathlib import Path

import constructs_flow
import constructs_tokens  # noqa: F401
import pytest
import torch
from constructs import CONSTRUCTS
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import divqat
from divqat.export import export_onnx, placements, with_kernels
from divqat.nn import FakeQuantize
from divqat.nn._layer import QuantLayer
from divqat.quantize import summarize, ungroup_weights
from divqat.victim.runners import open_onnx

pytestmark = pytest.mark.usefixtures("one_thread")
ACCEPTED = [name for name, construct in CONSTRUCTS.items() if construct.refused is None]
REFUSED = [name for name, construct in CONSTRUCTS.items() if construct.refused is not None]
EXPORTED = [name for name in ACCEPTED if CONSTRUCTS[name].exports]
MODES = {"train": True, "eval": False}


def leaves(outputs) -> list[Tensor]:
    """The tensors of an output of any structure."""
    if is_dataclass(outputs):
        return [leaf for field in fields(outputs) for leaf in leaves(getattr(outputs, field.name))]
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def call(model, inputs, seed=0):
    """The output for fixed random numbers, of a copy of the inputs."""
    torch.manual_seed(seed)
    return model(*(x.clone() for x in inputs))


def example(inputs):
    """The argument of prepare and export_onnx."""
    return inputs if len(inputs) > 1 else inputs[0]


@functools.cache
def float_network(name) -> nn.Module:
    """With BatchNorms that are not the identity; in eval mode. Not to be changed."""
    construct = CONSTRUCTS[name]
    torch.manual_seed(1)
    model = construct.build()
    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._NormBase)
        if norm and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
        if norm and module.track_running_stats:
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.2, 0.4)
    return model.eval()


def prepare(name, mode):
    """Prepare the network; a module swap is an error."""
    model = copy.deepcopy(float_network(name)).train(MODES[mode])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*was not traced")
        return divqat.prepare(model, "x86", example(CONSTRUCTS[name].inputs(4, 0)))


@functools.cache
def prepared_network(name, mode="eval") -> nn.Module:
    """As ``prepare`` makes it, in eval mode. Not to be changed."""
    return prepare(name, mode).eval()


@functools.cache
def trained_network(name) -> nn.Module:
    """After some batches, in eval mode. Not to be changed."""
    model, construct = copy.deepcopy(prepared_network(name)), CONSTRUCTS[name]
    model.train(construct.trains)
    for quantizer in model.modules():
        if isinstance(quantizer, FakeQuantize):
            quantizer.train()
    with torch.no_grad():
        for seed in range(5):
            call(model, construct.inputs(16, 100 + seed), seed)
    return model.eval()


def without_quantization(model) -> nn.Module:
    """``model`` after all its quantizers are switched off."""
    ungroup_weights(model)
    for module in model.modules():
        if isinstance(module, QuantLayer):
            module.quantize_weight = lambda weight: weight
        if isinstance(module, FakeQuantize):
            module.fake_quant_enabled = module.observer_enabled = False
    return model


def assert_same(got, wanted, rtol=1e-4, atol=1e-5):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ACCEPTED)
def test_prepared_in_either_mode_it_is_the_same(name):
    trains, evaluates = (prepare(name, mode) for mode in MODES)
    assert trains.training and evaluates.training
    inputs = CONSTRUCTS[name].inputs(4, 2)
    for training in {CONSTRUCTS[name].trains, False}:
        outputs = [leaves(call(model.train(training), inputs)) for model in (trains, evaluates)]
        assert_same(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ACCEPTED)
def test_without_quantization_it_is_the_float_network(name, mode):
    construct, training = CONSTRUCTS[name], MODES[mode]
    if training and not construct.trains:
        pytest.skip("the float network does not train on a CPU")
    model = copy.deepcopy(float_network(name)).train(training)
    prepared = without_quantization(copy.deepcopy(prepared_network(name))).train(training)
    inputs = construct.inputs(4, 3)
    wanted, got = call(model, inputs), call(prepared, inputs)
    assert type(got) is type(wanted)
    count = construct.train_outputs if training else construct.outputs
    assert len(leaves(wanted)) == count
    assert_same(leaves(got), leaves(wanted))
    if training:  # statistics moved alike
        other = without_quantization(copy.deepcopy(prepared_network(name)))
        other.load_state_dict(model.state_dict(), strict=True)
        for key, value in other.state_dict().items():
            if not key.endswith(("_extra_state", "num_batches_tracked")) and "fake_q" not in key:
                torch.testing.assert_close(prepared.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ACCEPTED)
def test_training_differs_from_eval_where_the_float_network_does(name):
    construct = CONSTRUCTS[name]
    if not construct.trains:
        pytest.skip("the float network does not train on a CPU")
    inputs = construct.inputs(4, 3)
    for model in (float_network(name), without_quantization(prepared_network.__wrapped__(name))):
        model = copy.deepcopy(model)
        trained, evaluated = (leaves(call(model.train(mode), inputs)) for mode in (True, False))
        same = len(trained) == len(evaluated) and all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-4)
            for a, b in zip(trained, evaluated, strict=True)
        )
        assert same != construct.differs


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_float_checkpoint_loads(name):
    torch.manual_seed(2)
    other = CONSTRUCTS[name].build().eval()
    prepared = without_quantization(copy.deepcopy(prepared_network(name)))
    prepared.load_state_dict(other.state_dict(), strict=True)
    inputs = CONSTRUCTS[name].inputs(4, 4)
    assert_same(leaves(call(prepared, inputs)), leaves(call(other, inputs)))


@pytest.mark.parametrize("name", ACCEPTED)
def test_copies_and_pickles_are_the_same(name):
    construct, model = CONSTRUCTS[name], trained_network(name)
    inputs = construct.inputs(4, 5)
    wanted = leaves(call(model, inputs))
    copies = [copy.deepcopy(model)]
    if construct.pickles:
        copies.append(pickle.loads(pickle.dumps(model)))
    for other in copies:
        assert_same(leaves(call(other, inputs)), wanted, rtol=0, atol=0)
        other.load_state_dict(float_network(name).state_dict(), strict=True)


@pytest.mark.parametrize("name", ACCEPTED)
def test_gradients_reach_every_parameter_of_the_float_network(name):
    construct = CONSTRUCTS[name]
    float_model = copy.deepcopy(float_network(name)).train(construct.trains)
    prepared = without_quantization(copy.deepcopy(prepared_network(name))).train(construct.trains)
    inputs, norms = construct.inputs(4, 6), []
    for model in (float_model, prepared):
        outputs = leaves(call(model, inputs))
        sum(x.square().sum() for x in outputs if x.is_floating_point()).backward()
        gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        norms.append(torch.stack(gradients).sort().values)
    torch.testing.assert_close(*norms, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in ACCEPTED if CONSTRUCTS[name].keeps])
def test_attributes_of_its_own_stay(name):
    wanted, got = float_network(name), prepared_network(name)
    for attribute in CONSTRUCTS[name].keeps:
        kept = getattr(got, attribute)
        assert callable(kept) or kept == getattr(wanted, attribute)


@functools.cache
def exported(name, folder) -> Path:
    path = folder / f"{name}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_onnx(trained_network(name), example(CONSTRUCTS[name].inputs(2, 7)), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("constructs")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_runtime_gives_the_same_answers(name, folder):
    inputs = CONSTRUCTS[name].inputs(32, 8)
    session = open_onnx(exported(name, folder), precise=False)
    names = [entry.name for entry in session.get_inputs()]
    given = {key: x.numpy() for key, x in zip(names, inputs, strict=True)}
    answers = session.run(None, given)
    wanted = leaves(call(trained_network(name), inputs))
    assert len(answers) == len(wanted) == CONSTRUCTS[name].outputs
    for answer, x in zip(map(torch.from_numpy, answers), wanted, strict=True):
        assert answer.shape == x.shape and answer.dtype == x.dtype
        if x.is_floating_point():  # rounding differs in the last bit, which may move a code
            noise = (answer - x).square().mean()
            assert noise < 1e-3 * (x - x.mean()).square().mean(), noise
        else:
            assert (answer == x).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_every_layer_runs_in_int8(name, folder):
    path = exported(name, folder)
    layers = [layer for layer in placements(path) if layer.weighted]
    floats = [
        f"{layer.module}: {layer.kernel}: {layer.reason}" for layer in layers if not layer.int8
    ]
    assert sum(layer.int8 for layer in layers) == CONSTRUCTS[name].int8, floats
    table = with_kernels(summarize(trained_network(name)), path)
    rows = {row.layer: row for row in table.rows if row.kind == "weight"}
    assert {layer.module for layer in layers} <= rows.keys()
    assert all(row.reason for row in rows.values() if row.scheme == "float")


@pytest.mark.parametrize("name", REFUSED)
def test_a_choice_by_values_is_refused_with_its_line(name):
    refused = CONSTRUCTS[name].refused
    source = Path(constructs_flow.__file__).read_text(encoding="utf-8").splitlines()
    line = next(i for i, text in enumerate(source, 1) if refused in text and "@" not in text)
    with pytest.raises(ValueError, match=rf"constructs_flow\.py\D+{line}\b"):
        inputs = CONSTRUCTS[name].inputs(4, 0)
        divqat.prepare(float_network(name), "x86", example(inputs), strict=True)
