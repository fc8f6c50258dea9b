"""Turn a float model into one that trains with fake-quantization."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from divqat.nn.fake_quantize import FakeQuantize, LearnedStepFakeQuantize, activation_quantizer
from divqat.quantize import patterns
from divqat.quantize.checks import check_is_float, check_parameters, check_types, copied
from divqat.quantize.config import QuantConfig, preset
from divqat.quantize.group_weights import group_weights
from divqat.quantize.link_inputs import link_inputs
from divqat.quantize.swap import LAYERS, conv_bn, swap
from divqat.quantize.traced import PreparedModule, accept_float_keys


def prepare(
    model: nn.Module, config: QuantConfig | str = "x86", example_input: Tensor | None = None
) -> nn.Module:
    """A copy of ``model`` in training mode whose layers and activations are fake-quantized.

    The model is traced with torch.fx: Conv2d + BatchNorm2d become one :class:`QuantConvBn2d`,
    Conv2d, ConvTranspose2d and Linear their quantized counterparts under the same names, and a
    fake-quantizer follows every operation whose result a quantized one reads (layers, additions,
    concatenations, average pooling, activations other than ReLU and ReLU6, which runtimes merge
    into the layer before). A ReLU that only a fake-quantizer reads is applied by it; what only a
    fake-quantizer reads of a BatchNorm is written over. The model's output stays in float.

    A model that cannot be traced is prepared by module swap: every layer quantizes its own input,
    BatchNorm and additions stay in float; a warning says so and why. A warning also names layers
    that have a weight and stay in float, of other types or subclasses of those above. The weights
    of a traced model are quantized together, see :func:`divqat.quantize.group_weights`.

    The float model's checkpoints load into the result (``load_state_dict``, strict).

    Args:
        model: any module built of the layers above; left as it is.
        config: a :class:`QuantConfig` or a preset's name.
        example_input: one batch as the model takes it, [N, …]; needed to trace.

    Raises:
        TypeError: ``model`` is no module, or an argument stands in another's place.
        ValueError: no layer to quantize, an unknown preset, a name in ``skip`` that does not
            exist, a model that is prepared already, a layer that is pruned or weight-normed, or an
            ``example_input`` on which it fails.
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
    model = copied("model", model)
    if example_input is not None:
        _check_example(model, example_input)
    try:
        if example_input is None:
            raise ValueError("no example_input was given")
        graph_module = _trace(model, example_input)
    except Exception as error:  # whatever the model's own forward raises under tracing
        warnings.warn(
            f"{type(model).__name__} was not traced ({type(error).__name__}: {error}); its layers "
            "are swapped one by one, BatchNorm and additions stay in float",
            stacklevel=2,
        )
        swap(model, config, config.activation)
        return model.train()
    unused = model.state_dict().keys() - graph_module.state_dict().keys()
    renamed = _fuse_batchnorm(graph_module, config)
    accept_float_keys(graph_module, renamed, unused)
    swap(graph_module, config, None)
    _quantize_activations(graph_module, config)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    graph_module.remember_float_layers()
    link_inputs(graph_module)
    # The graph calls every layer, in an order that is known.
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
    """Tell a wrong example from a model that cannot be traced."""
    with _evaluating(model):
        try:
            model(example_input)
        except Exception as error:  # whatever the model's own forward raises
            raise ValueError(
                "example_input: wanted a batch as the model takes it, got one on which it raises "
                f"{type(error).__name__}: {error}"
            ) from error


def _trace(model: nn.Module, example_input: Tensor) -> PreparedModule:
    """Trace, and find out which nodes are tensors by running the example in eval mode."""
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
    """Replace each Conv2d whose only reader is a BatchNorm2d, both called once.

    Returns:
        The prefix of each BatchNorm's keys, and what it is now.
    """
    calls = [node.target for node in graph_module.graph.nodes if node.op == "call_module"]
    renamed = {}
    for node in list(graph_module.graph.nodes):
        if patterns.kind(graph_module, node) is not nn.BatchNorm2d:
            continue
        source = node.all_input_nodes[0]
        if patterns.kind(graph_module, source) is not nn.Conv2d or len(source.users) != 1:
            continue
        if calls.count(node.target) != 1 or calls.count(source.target) != 1:
            continue
        conv = graph_module.get_submodule(source.target)
        bn = graph_module.get_submodule(node.target)
        if config.skips(source.target) or not (bn.affine and bn.track_running_stats):
            continue
        if config.weight.learned and not config.weight.per_channel:
            continue  # one learned scale cannot follow the channels' factors
        graph_module.set_submodule(source.target, conv_bn(conv, bn, config.weight))
        renamed[f"{node.target}."] = f"{source.target}.bn."
        node.replace_all_uses_with(source)
        graph_module.graph.erase_node(node)
        graph_module.delete_submodule(node.target)
    return renamed


def _quantize_activations(graph_module: fx.GraphModule, config: QuantConfig) -> None:
    """Put a fake-quantizer behind every value that a quantized operation reads."""
    nodes = list(graph_module.graph.nodes)
    sources: dict[fx.Node, None] = {}  # in order, without repeats
    for node in nodes:
        if any(config.skips(name) for name in patterns.scopes(node)):
            continue
        if node.op == "call_function" and node.target in patterns.LAYER_FUNCTIONS:
            warnings.warn(f"{node.name} is a functional layer and stays in float", stacklevel=3)
        if not patterns.wants_grid(graph_module, node) or not patterns.is_float(node):
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
        # A node may be called as a method of nn.Module is: "to", "half".
        taken = hasattr(nn.Module, source.name)
        name = f"fake_quantize.{source.name}{'_' if taken else ''}"
        graph_module.add_submodule(name, quantizer)
        users = list(source.users)
        with graph_module.graph.inserting_after(source):
            quantized = graph_module.graph.call_module(name, (source,))
        quantized.meta = source.meta
        for user in users:
            # What is not computed on a grid reads the value itself: the model's output above all.
            if user.op != "output":
                user.replace_input_with(source, quantized)
        if isinstance(quantizer, FakeQuantize):
            if list(source.users) == [quantized]:
                _fuse_relu(graph_module, source, quantized, quantizer)
            quantizer.inplace = config.inplace and _is_overwritable(graph_module, quantized)


def _fuse_relu(
    graph_module: fx.GraphModule, relu: fx.Node, quantized: fx.Node, quantizer: FakeQuantize
) -> None:
    """Let the quantizer that alone reads a ReLU apply it: one pass, and one mask for both."""
    if patterns.kind(graph_module, relu) not in patterns.RELUS:
        return
    source = relu.all_input_nodes[0]
    if patterns.is_inplace(graph_module, relu) and len(source.users) > 1:
        return  # the others read what it has written
    quantizer.relu = True
    quantized.replace_input_with(relu, source)
    graph_module.graph.erase_node(relu)


def _is_overwritable(graph_module: fx.GraphModule, quantized: fx.Node) -> bool:
    """Whether what a quantizer reads is a BatchNorm's, and no one else's.

    BatchNorm keeps its input for the backward, not its output; a folded one with frozen statistics
    is a convolution, which does the same.
    """
    source = quantized.all_input_nodes[0]
    if patterns.kind(graph_module, source) not in patterns.BATCHNORMS:
        return False
    return list(source.users) == [quantized]
