"""Put fake-quantizers into the graph of a traced model."""

from __future__ import annotations

from torch import fx, nn

from divqat.nn.fake_quantize import FakeQuantize, activation_quantizer
from divqat.quantize import patterns
from divqat.quantize.config import QuantConfig
from divqat.quantize.functional import constants
from divqat.quantize.twins import is_layer, only_in_training, twins


def quantize_activations(graph_module: fx.GraphModule, config: QuantConfig) -> None:
    """Insert a fake-quantizer after every value that a quantized operation reads or a convolution
    computes. What only training mode computes stays in float, but for the inputs of layers."""
    sources: dict[fx.Node, None] = {}  # in order, without repeats
    constant, twin = constants(graph_module.graph), twins(graph_module)
    for node in list(graph_module.graph.nodes):
        if any(config.skips(name) for name in patterns.scopes(node)):
            continue
        trained = only_in_training(node) and node not in twin and not is_layer(graph_module, node)
        if trained or not patterns.is_float(node):
            continue
        if patterns.quantizes_inputs(graph_module, node):
            for value in patterns.tensor_inputs(graph_module, node):
                source = patterns.producer(graph_module, value)
                # What only training adds before a deployed layer, such as noise, is in float.
                added = node in twin and only_in_training(source) and source not in twin
                if not added and source not in constant and patterns.is_gridded(source):
                    sources[source] = None
        if patterns.is_convolution(graph_module, node):
            sources[_fused_activation(graph_module, node)] = None
    shared = {source: twin[source] for source in sources if twin.get(source) in sources}
    inserted = {
        source: _insert_quantizer(graph_module, source, config)
        for source in sources
        if source not in shared
    }
    for source, other in shared.items():
        if (quantized := inserted[other]) is not None:
            _insert_quantizer(graph_module, source, config, str(quantized.target))


def _fused_activation(graph_module: fx.GraphModule, conv: fx.Node) -> fx.Node:
    """The activation that runtimes fuse into a convolution, or the convolution."""
    users = list(conv.users)
    fused = len(users) == 1 and patterns.operation(graph_module, users[0]) in patterns.FUSED
    return users[0] if fused else conv


def _insert_quantizer(
    graph_module: fx.GraphModule, source: fx.Node, config: QuantConfig, shared: str | None = None
) -> fx.Node | None:
    """Let the users of ``source`` read it quantized; ``shared`` is the quantizer of its twin."""
    of_convolution = patterns.is_convolution(graph_module, source) or (
        source.op != "placeholder"
        and bool(source.all_input_nodes)
        and patterns.is_convolution(graph_module, source.all_input_nodes[0])
    )
    # The model's output stays in float, but for that of a convolution.
    users = [user for user in source.users if user.op != "output" or of_convolution]
    if not users:
        return None
    is_input = source.op == "placeholder"
    name = shared
    if name is None:
        new = activation_quantizer(config.input() if is_input else config.activation)
        if isinstance(new, FakeQuantize):
            new.mode, new.inplace = config.mode, config.inplace
        # A node may have the name of a method of nn.Module: "to", "half".
        taken = hasattr(nn.Module, source.name)
        name = f"fake_quantize.{source.name}{'_' if taken else ''}"
        graph_module.add_submodule(name, new)
    quantizer = graph_module.get_submodule(name)
    with graph_module.graph.inserting_after(source):
        quantized = graph_module.graph.call_module(name, (source,))
    quantized.meta = dict(source.meta)
    for user in users:
        user.replace_input_with(source, quantized)
    if isinstance(quantizer, FakeQuantize):
        if list(source.users) == [quantized]:
            _fuse_relu(graph_module, source, quantized, quantizer)
        quantizer.inplace &= _is_overwritable(graph_module, quantized)
    return quantized


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
