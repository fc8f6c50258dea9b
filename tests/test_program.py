"""Programs of quantize and dequantize nodes: as the converted model, and in the form of PT2E."""

import pytest
import torch
from networks import HAND_WRITTEN, images
from testing import randn
from torch import nn

import divqat
from divqat import models
from divqat.export import export_program
from divqat.quantize import observing

pytest.importorskip("torchao.quantization.pt2e")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

aten, decomposed = torch.ops.aten, "quantized_decomposed"
LAYERS = (aten.conv2d.default, aten.linear.default)
ACTIVATIONS = (aten.relu.default, aten.relu_.default, aten.relu6.default, aten.hardtanh.default)
IMAGES = randn(20, 1, 16, 16)


def calibrated(model, x, config="x86"):
    prepared = divqat.prepare(model, config, x[:2])
    with torch.no_grad(), observing(prepared):
        prepared(x)
    return prepared.eval()


def built_in(name):
    torch.manual_seed(0)
    return models.build(name, in_channels=1, num_classes=10, image_size=16)


def answers(program, x):
    """Of a program that takes a row at a time."""
    module = program.module()
    with torch.no_grad():
        return torch.cat([module(row) for row in x.split(1)])


def grid_of(program):
    """Scale and zero point of the outputs."""
    (output,) = program.graph.output_node().args[0]
    return output.args[1], output.args[2]


@pytest.mark.parametrize("config", ["x86", "tensorrt", "qnnpack"])
@pytest.mark.parametrize("name", models.names())
def test_program_answers_as_the_converted_model_on_the_grid_of_the_outputs(name, config):
    x = IMAGES
    prepared = calibrated(built_in(name), x, config)
    program = export_program(prepared, x)
    with torch.no_grad():
        wanted = divqat.convert(prepared)(x)
    got = answers(program, x)
    scale, zero_point = grid_of(program)
    codes = got / scale + zero_point
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert codes.min() >= -128.5 and codes.max() <= 127.5
    # A code inside may round the other way, which moves a later layer by a step or so.
    assert (got - wanted).abs().max() <= 2 * scale
    assert (got - wanted).abs().mean() <= 0.5 * scale


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_program_of_what_people_write(name):
    x = images()
    prepared = calibrated(HAND_WRITTEN[name](), x)
    program = export_program(prepared, x)
    with torch.no_grad():
        wanted = divqat.convert(prepared)(x)
    scale, _ = grid_of(program)
    assert (answers(program, x) - wanted).abs().max() <= 2 * scale


@pytest.mark.parametrize("name", models.names())
def test_every_layer_is_between_codes(name):
    x = IMAGES
    program = export_program(calibrated(built_in(name), x), x)
    layers = [node for node in program.graph.nodes if node.target in LAYERS]
    wanted = [m for m in built_in(name).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == len(wanted)
    for layer in layers:
        for source in layer.args[:2]:
            assert decomposed in str(source.target) and "dequantize" in str(source.target)
        (user,) = layer.users
        while user.target in ACTIVATIONS:
            (user,) = user.users
        assert "quantize_per_tensor" in str(user.target)
    shared = [n for n in program.graph.nodes if "dequantize" in n.name and len(n.users) > 1]
    assert not shared
    state = [v for k, v in program.state_dict.items() if k.endswith("weight")]
    assert len(state) == len(layers) and all(v.dtype == torch.int8 for v in state)


def test_codes_of_few_bits_stay_within_their_grid():
    x = IMAGES
    config = divqat.preset("x86", weight_bits=4, activation_bits=4)
    program = export_program(calibrated(built_in("lenet"), x, config), x)
    limits = {
        tuple(node.args[3:5])
        for node in program.graph.nodes
        if "quantize_per_tensor" in str(node.target)
    }
    assert (-128, -113) in limits and (-128, 127) in limits
    assert len(limits) == 2


def test_outputs_without_a_range_are_refused():
    prepared = calibrated(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), randn(4, 1, 8, 8))
    with torch.no_grad():
        prepared.get_submodule("0").bias.fill_(-1e3)
    with pytest.raises(ValueError, match="example_input: wanted pictures with different, finite"):
        export_program(prepared, torch.zeros(2, 1, 8, 8))


def test_unprepared_models_are_refused():
    with pytest.raises(ValueError, match="prepared"):
        export_program(nn.Linear(3, 2), randn(4, 3))
