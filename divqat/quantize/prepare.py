"""Turn a float model into one that trains with fake quantization."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from divqat.nn.fake_quantize import FakeQuantize, LearnedStepFakeQuantize, activation_quantizer
from divqat.nn.output import RectifiedOutput
from divqat.quantize import patterns
from divqat.quantize.checks import check_is_float, check_parameters, check_types, deep_copy
from divqat.quantize.config import QuantConfig, preset
from divqat.quantize.group_weights import group_weights
from divqat.quantize.link_inputs import link_inputs
from divqat.quantize.swap import LAYERS, conv_bn, swap
from divqat.quantize.traced import PreparedModule, accept_float_keys


def prepare(
    model: nn.Module, config: QuantConfig | str = "x86", example_input: Tensor | None = None
) -> nn.Module:
    """A copy of ``model`` in training mode whose layers and activations are fake-quantized.

    The model is traced with torch.fx. Conv2d + BatchNorm2d become one :class:`QuantConvBn2d`;
    Conv2d, ConvTranspose2d and Linear become their quantized counterparts under the same names. A
    fake-quantizer follows every operation whose result a quantized operation reads (layers,
    additions, concatenations, average pooling, activations other than ReLU and ReLU6, which
    runtimes fuse into the preceding layer). If only a fake-quantizer reads a ReLU, it also applies
    the ReLU; if only a fake-quantizer reads a BatchNorm, it works in place. The model's output
    stays in float unless ``config.rectify_output``.

    A model that cannot be traced is prepared by module swap: every layer quantizes its own input,
    and BatchNorm and additions stay in float; a warning gives the reason. A warning also names
    layers with a weight that stay in float, because they have other types or are subclasses of the
    layers above. The weights of a traced model are quantized together, see
    :func:`divqat.quantize.group_weights`.

    The float model's checkpoints load into the result (``load_state_dict``, strict).

    Args:
        model: any module with layers of these types; it is not changed.
        config: a :class:`QuantConfig` or the name of a preset.
        example_input: a batch [N, …] for the model's forward; needed for tracing.

    Raises:
        TypeError: ``model`` is not a module, or the arguments are in the wrong order.
        ValueError: there is no layer to quantize, the preset is unknown, a name in ``skip`` does
            not exist or one in ``layer_bits`` is not that of a quantized layer, the model is
            already prepared, a layer is pruned or weight-normed, the model fails on
            ``example_input``, or the output is to be rectified and the model cannot be traced or
            returns anything but one tensor.
    """
    check_types(model, config, example_input)
    if isinstance(config, str):
        config = preset(config)
    check_is_float(model)
    names = {name for name, _ in model.named_modules()}
    for name in config.skip:
        if name not in names:
            raise ValueError(f"skip: wanted names of modules, got {name!r}")
    if type(model) in LAYERS:
        raise ValueError(f"model: wanted a network, got a single {type(model).__name__}")
    quantized = (*LAYERS, nn.BatchNorm2d)
    check_parameters(
        "model",
        (
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, quantized) and not config.skips(name)
        ),
    )
    model = deep_copy("model", model)
    if example_input is not None:
        _check_example(model, example_input)
    try:
        if example_input is None:
            raise ValueError("no example_input was given")
        graph_module = _trace(model, example_input)
    except Exception as error:  # the model's forward may raise anything under tracing
        if config.rectify_output:
            raise ValueError(
                "rectify_output: wanted a model that torch.fx can trace, got "
                f"{type(model).__name__} ({type(error).__name__}: {error})"
            ) from error
        warnings.warn(
            f"{type(model).__name__} was not traced ({type(error).__name__}: {error}); its layers "
            "are swapped one by one, and BatchNorm and additions stay in float",
            stacklevel=2,
        )
        swap(model, config, config.activation)
        return model.train()
    unused = model.state_dict().keys() - graph_module.state_dict().keys()
    renamed = _fuse_batchnorm(graph_module, config)
    accept_float_keys(graph_module, renamed, unused)
    swap(graph_module, config, None)
    _quantize_activations(graph_module, config)
    if config.rectify_output:
        _rectify_output(graph_module, config)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    graph_module.remember_float_layers()
    link_inputs(graph_module)
    # The order in which the graph calls the layers is known.
    return group_weights(graph_module).train()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A block with ``model`` in eval mode and without gradients."""
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _check_example(model: nn.Module, example_input: Tensor) -> None:
    """Check that the model runs on the example, to tell a wrong example from a tracing failure."""
    with _evaluating(model):
        try:
            model(example_input)
        except Exception as error:  # the model's forward may raise anything
            raise ValueError(
                "example_input: wanted a batch that the model accepts, got one on which it raises "
                f"{type(error).__name__}: {error}"
            ) from error


def _trace(model: nn.Module, example_input: Tensor) -> PreparedModule:
    """Trace the model, and find the tensors among its nodes by a run in eval mode."""
    graph = fx.Tracer().trace(model)
    graph_module = PreparedModule(model, graph, type(model).__name__)
    for node in graph_module.graph.nodes:
        if node.target in patterns.DROPOUTS:
            dropout = patterns.DROPOUTS[node.target](node.kwargs["p"], node.kwargs["inplace"])
            name = f"functional_dropout.{node.name}"
            graph_module.add_submodule(name, dropout)
            node.op, node.target, node.kwargs = "call_module", name, {}
    graph_module.recompile()
    with _evaluating(graph_module):
        ShapeProp(graph_module).propagate(example_input)
    return graph_module


def _fuse_batchnorm(graph_module: fx.GraphModule, config: QuantConfig) -> dict[str, str]:
    """Fuse each Conv2d whose only user is a BatchNorm2d, if both are called once.

    Returns:
        The old prefix of each BatchNorm's keys, and the new one.
    """
    calls = [node.target for node in graph_module.graph.nodes if node.op == "call_module"]
    renamed = {}
    for node in list(graph_module.graph.nodes):
        if patterns.operation(graph_module, node) is not nn.BatchNorm2d:
            continue
        source = node.all_input_nodes[0]
        if patterns.operation(graph_module, source) is not nn.Conv2d or len(source.users) != 1:
            continue
        if calls.count(node.target) != 1 or calls.count(source.target) != 1:
            continue
        conv = graph_module.get_submodule(source.target)
        bn = graph_module.get_submodule(node.target)
        if config.skips(source.target) or not (bn.affine and bn.track_running_stats):
            continue
        if config.weight.learned and not config.weight.per_channel:
            continue  # a single learned scale cannot follow the factors of the channels
        graph_module.set_submodule(source.target, conv_bn(conv, bn, config.weight))
        renamed[f"{node.target}."] = f"{source.target}.bn."
        node.replace_all_uses_with(source)
        graph_module.graph.erase_node(node)
        graph_module.delete_submodule(node.target)
    return renamed


def _quantize_activations(graph_module: fx.GraphModule, config: QuantConfig) -> None:
    """Insert a fake-quantizer after every value that a quantized operation reads."""
    nodes = list(graph_module.graph.nodes)
    sources: dict[fx.Node, None] = {}  # in order, without repeats
    for node in nodes:
        if any(config.skips(name) for name in patterns.scopes(node)):
            continue
        if node.op == "call_function" and node.target in patterns.LAYER_FUNCTIONS:
            warnings.warn(f"{node.name} is a functional layer and stays in float", stacklevel=3)
        if not patterns.quantizes_inputs(graph_module, node) or not patterns.is_float(node):
            continue
        for value in patterns.tensor_inputs(node):
            source = patterns.producer(graph_module, value)
            if source.op != "get_attr":
                sources[source] = None
    for source in sources:
        is_input = source.op == "placeholder"
        quantizer = activation_quantizer(config.input() if is_input else config.activation)
        if not isinstance(quantizer, LearnedStepFakeQuantize):
            quantizer.mode = config.mode
        # A node may have the name of a method of nn.Module: "to", "half".
        taken = hasattr(nn.Module, source.name)
        name = f"fake_quantize.{source.name}{'_' if taken else ''}"
        graph_module.add_submodule(name, quantizer)
        users = list(source.users)
        with graph_module.graph.inserting_after(source):
            quantized = graph_module.graph.call_module(name, (source,))
        quantized.meta = source.meta
        for user in users:
            # The model's output stays in float.
            if user.op != "output":
                user.replace_input_with(source, quantized)
        if isinstance(quantizer, FakeQuantize):
            if list(source.users) == [quantized]:
                _fuse_relu(graph_module, source, quantized, quantizer)
            quantizer.inplace = config.inplace and _is_overwritable(graph_module, quantized)


def _rectify_output(graph_module: fx.GraphModule, config: QuantConfig) -> None:
    """Quantize the value that the model returns, with 0 for all values below."""
    output = graph_module.graph.output_node()
    logits = output.args[0]
    if not isinstance(logits, fx.Node) or not patterns.is_float(logits):
        raise ValueError(
            f"rectify_output: wanted a model that returns one tensor of logits, got {logits}"
        )
    name = "fake_quantize.output"
    graph_module.add_submodule(name, RectifiedOutput(config.activation))
    with graph_module.graph.inserting_before(output):
        output.replace_input_with(logits, graph_module.graph.call_module(name, (logits,)))


def _fuse_relu(
    graph_module: fx.GraphModule, relu: fx.Node, quantized: fx.Node, quantizer: FakeQuantize
) -> None:
    """Let a quantizer that is the only user of a ReLU apply it: one pass, one mask for both."""
    if patterns.operation(graph_module, relu) not in patterns.RELUS:
        return
    source = relu.all_input_nodes[0]
    if patterns.is_inplace(graph_module, relu) and len(source.users) > 1:
        return  # the other users read the overwritten values
    quantizer.relu = True
    quantized.replace_input_with(relu, source)
    graph_module.graph.erase_node(relu)


def _is_overwritable(graph_module: fx.GraphModule, quantized: fx.Node) -> bool:
    """Whether a quantizer is the only user of a BatchNorm's output.

    BatchNorm saves its input for the backward, not its output; a folded one with frozen statistics
    is a convolution, which does the same.
    """
    source = quantized.all_input_nodes[0]
    if patterns.operation(graph_module, source) not in patterns.BATCHNORMS:
        return False
    return list(source.users) == [quantized]
