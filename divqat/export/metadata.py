"""The declared input of an exported ONNX file, and the normalization in its graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from divqat.victim.metadata import KEY, InputMetadata


def check_metadata(metadata: InputMetadata, values: Sequence[Any]) -> None:
    """Check that the arguments of a model are what ``metadata`` can describe.

    Raises:
        TypeError: ``metadata`` is no :class:`InputMetadata`.
        ValueError: they are anything but one batch of pictures [N, C, H, W] with C of its channels.
    """
    if not isinstance(metadata, InputMetadata):
        raise TypeError(f"metadata: wanted an InputMetadata, got {type(metadata).__name__}")
    if metadata.layout != "NCHW":
        raise ValueError(f"metadata: layout: wanted NCHW in an ONNX file, got {metadata.layout}")
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) != 1 or tensors[0].dim() != 4:
        got = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise ValueError(f"metadata: wanted a model of one input [N, C, H, W], got {got}")
    metadata.check_channels(tensors[0].shape[1])


def declare_input(model: Any, metadata: InputMetadata) -> None:
    """Write ``metadata`` into an ``onnx.ModelProto``, and if its ``dtype`` is uint8 normalize the
    input in the graph: Cast, Div, Sub.

    These are the operations of :func:`divqat.data.to_float`, so that the model gets the very floats
    of its training: pictures often lie between two codes of the input's grid, where the last bit
    decides.

    Raises:
        ValueError: there are more or fewer classes than outputs.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    width = graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    if metadata.classes is not None and len(metadata.classes) != width:
        raise ValueError(
            f"metadata: classes: wanted {width}, one for each output, got {len(metadata.classes)}"
        )
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, metadata.to_json()
    if metadata.dtype != "uint8":
        return
    (images,) = graph.input
    prefix = f"{images.name}/normalize"
    for node in graph.node:
        names = [f"{prefix}/shifted" if name == images.name else name for name in node.input]
        node.input[:] = names
    images.type.tensor_type.elem_type = TensorProto.UINT8
    for name, values in (("divisor", metadata.divisor), ("shift", metadata.shift)):
        graph.initializer.append(numpy_helper.from_array(values, f"{prefix}/{name}"))
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Cast", [images.name], "floats", {"to": TensorProto.FLOAT}),
        ("Div", [f"{prefix}/floats", f"{prefix}/divisor"], "scaled", {}),
        ("Sub", [f"{prefix}/scaled", f"{prefix}/shift"], "shifted", {}),
    ]
    nodes = [
        helper.make_node(op, names, [f"{prefix}/{output}"], name=f"{prefix}/{op}", **attributes)
        for op, names, output, attributes in steps
    ]
    following = [*nodes, *(_copy(node) for node in graph.node)]
    del graph.node[:]
    graph.node.extend(following)


def _copy(node: Any) -> Any:
    copied = type(node)()
    copied.CopyFrom(node)
    return copied
