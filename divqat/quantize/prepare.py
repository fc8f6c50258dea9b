"""Turn a float model into one that trains with fake quantization."""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx, nn

from divqat.nn.output import RectifiedOutput
from divqat.quantize import patterns
from divqat.quantize.activations import quantize_activations
from divqat.quantize.checks import (
    check_example,
    check_is_float,
    check_parameters,
    check_types,
    deep_copy,
)
from divqat.quantize.config import QuantConfig, preset
from divqat.quantize.floats import float_layers, without_kernel
from divqat.quantize.functional import float_functions, lift_functions
from divqat.quantize.group_weights import group_weights
from divqat.quantize.link_inputs import link_inputs
from divqat.quantize.swap import LAYERS, can_fold, conv_bn, layer_type, swap
from divqat.quantize.tracing import PreparedModule, capture, rename_keys, split


def prepare(
    model: nn.Module,
    config: QuantConfig | str = "x86",
    example_input: Any = None,
    *,
    strict: bool = False,
) -> nn.Module:
    """A copy of ``model`` in training mode whose layers and activations are fake-quantized.

    The model is traced with the example, in training and in eval mode
    (:mod:`divqat.quantize.tracing`); the result switches between the two as the model does. Conv2d
    + BatchNorm become one :class:`QuantConvBn2d`; Conv2d, ConvTranspose2d and Linear become their
    quantized counterparts under the same names, and functions that multiply by a weight become
    :class:`divqat.nn.QuantFunction`. A fake-quantizer follows every convolution, and every
    operation whose result a quantized operation reads (layers, additions, concatenations, average
    pooling, activations other than ReLU and ReLU6, which runtimes fuse into the preceding layer).
    If only a fake-quantizer reads a ReLU, it also applies the ReLU; if only a fake-quantizer reads
    a BatchNorm, it works in place. The output of a linear layer stays in float unless
    ``config.rectify_output``.

    A model that cannot be traced is prepared by module swap: every layer quantizes its own input,
    and operations between them stay in float; a warning gives the reason. A BatchNorm2d that reads
    a convolution's output in the example is folded; a later call in another order is an error.

    A warning also names layers with a weight that will run in float, because they are not quantized
    or because the runtime has no integer kernel for them (:mod:`divqat.quantize.operators`). The
    weights of a traced model are quantized together, see :func:`divqat.quantize.group_weights`.

    The float model's checkpoints load into the result (``load_state_dict``, strict), and its state
    dict has the float model's keys, besides those of the quantizers.

    Args:
        model: any module with layers of these types; it is not changed.
        config: a :class:`QuantConfig` or the name of a preset.
        example_input: a batch [N, …] for the model's forward, a tuple of its arguments, or a
            dictionary of arguments by name; needed for tracing. Arguments that are no tensors
            are constants of the result.
        strict: layers that will run in float are an error.

    Raises:
        TypeError: ``model`` is not a module, or the arguments are in the wrong order.
        ValueError: there is no layer to quantize, the preset is unknown, a name in ``skip`` does
            not exist or one in ``layer_bits`` is not that of a quantized layer, the model is
            already prepared, a layer is pruned or weight-normed, the model fails on
            ``example_input``, a layer will run in float although ``strict``, or the output is to be
            rectified and the model cannot be traced or returns anything but one tensor.
    """
    check_types(model, config, example_input)
    if isinstance(config, str):
        config = preset(config)
    check_is_float(model)
    names = {name for name, _ in model.named_modules()}
    for name in config.skip:
        if name not in names:
            raise ValueError(f"skip: wanted names of modules, got {name!r}")
    if layer_type(model):
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
    prepared = deep_copy("model", model)
    if example_input is not None:
        check_example(prepared, example_input)
    try:
        if example_input is None:
            raise ValueError("no example_input was given")
        graph_module, renamed = capture(prepared, example_input)
    except Exception as error:  # the model's forward may raise anything under tracing
        reason = f"({type(error).__name__}: {error})"
        if strict or config.rectify_output:
            name = "strict" if strict else "rectify_output"
            raise ValueError(
                f"{name}: wanted a model that can be traced, got {type(model).__name__} {reason}"
            ) from error
        warnings.warn(
            f"{type(model).__name__} was not traced {reason}; its layers are swapped one by one, "
            "and operations between them stay in float",
            stacklevel=2,
        )
        # Another copy: tracing may have changed the first.
        if example_input is None:
            prepared = deep_copy("model", model)
        else:
            from divqat.quantize.fold_by_calls import fold_by_calls

            prepared, renamed = fold_by_calls(model, example_input, config)
            rename_keys(prepared, renamed)
        swap(prepared, config, config.activation)
        _report_float(prepared, config, strict)
        return prepared.train()
    _quantize(graph_module, config, renamed)
    _report_float(graph_module, config, strict)
    # The order in which the graph calls the layers is known.
    return group_weights(graph_module).train()


def _quantize(model: PreparedModule, config: QuantConfig, renamed: dict[str, str]) -> None:
    """Put quantized layers and fake-quantizers into a traced model."""
    lift_functions(model, config)
    _fuse_batchnorm(model, config, renamed)
    rename_keys(model, renamed)
    swap(model, config, None)
    quantize_activations(model, config)
    if config.rectify_output:
        _rectify_output(model, config)
    split(model)
    for node in model.graph.nodes:
        node.meta.pop("value", None)
    model.remember_float_layers()
    link_inputs(model)


def _report_float(model: nn.Module, config: QuantConfig, strict: bool) -> None:
    """Warn of layers that will run in float and that ``config.skip`` does not name; ValueError if
    ``strict``."""
    floats = float_layers(model) + without_kernel(model, config)
    if isinstance(model, fx.GraphModule):
        floats += float_functions(model, config)
    lines = [str(layer) for layer in floats if not config.skips(layer.name)]
    if not lines:
        return
    if strict:
        raise ValueError("strict: wanted all layers in int8, got\n" + "\n".join(lines))
    warnings.warn("layers that will run in float:\n" + "\n".join(lines), stacklevel=3)


def _fuse_batchnorm(
    graph_module: fx.GraphModule, config: QuantConfig, renamed: dict[str, str]
) -> None:
    """Fuse each Conv2d whose only user is a BatchNorm, if both are called once; add the new
    prefixes of the BatchNorm's keys to ``renamed``."""
    calls = [node.target for node in graph_module.graph.nodes if node.op == "call_module"]
    for node in list(graph_module.graph.nodes):
        if patterns.operation(graph_module, node) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
            continue
        source = node.all_input_nodes[0]
        if source.op != "call_module" or len(source.users) != 1:
            continue
        conv = graph_module.get_submodule(str(source.target))
        bn: Any = graph_module.get_submodule(str(node.target))
        if calls.count(node.target) != 1 or calls.count(source.target) != 1:
            continue
        if not can_fold(conv, str(source.target), bn, config):
            continue
        graph_module.set_submodule(str(source.target), conv_bn(conv, bn, config.weight))
        old, new = f"{node.target}.", f"{source.target}.bn."
        for name, now in renamed.items():
            if now.startswith(old):
                renamed[name] = new + now[len(old) :]
        renamed[old] = new
        node.replace_all_uses_with(source)
        graph_module.graph.erase_node(node)
        graph_module.set_submodule(str(node.target), _children(bn))


def _children(bn: nn.Module) -> nn.Module:
    """What remains at the place of a BatchNorm: the modules in it, such as an activation."""
    rest = nn.Identity()
    rest._modules, bn._modules = bn._modules, {}
    return rest


def _rectify_output(graph_module: fx.GraphModule, config: QuantConfig) -> None:
    """Quantize the value that the model returns, with 0 for all values below."""
    output = graph_module.graph.output_node()
    results: Any = output.args[0]
    logits = results["eval"]
    one = isinstance(logits, fx.Node) and patterns.is_float(logits)
    if not one or results["train"] is not logits:
        raise ValueError(
            "rectify_output: wanted a model that returns one tensor of logits, got "
            + " and ".join(map(str, dict.fromkeys((logits, results["train"]))))
        )
    name = "fake_quantize.output"
    graph_module.add_submodule(name, RectifiedOutput(config.activation))
    with graph_module.graph.inserting_before(output):
        quantized = graph_module.graph.call_module(name, (logits,))
    quantized.meta = dict(logits.meta)
    output.replace_input_with(logits, quantized)
