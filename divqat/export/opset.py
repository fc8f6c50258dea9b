"""Other opsets than the one that PyTorch's exporter writes, and weights packed into 4 bits.

Between opsets 13 and 21 only the spelling of a quantized CNN's operators changes: attributes were
added, or became inputs. ``onnx.version_converter`` fails at most of them, and so they are written
back here, by the schemas of the ``onnx`` package.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from divqat.export.graph import module_name

DEFAULT, OLDEST, NEWEST = 20, 13, 21
PACKED = 21  # first opset with INT4
LOWEST, HIGHEST = -8, 7  # INT4


def chosen_opset(opset: int | None, pack_int4: bool) -> int:
    """The opset for the arguments of :func:`divqat.export.export_onnx`.

    Raises:
        TypeError, ValueError: they are wrong.
    """
    if opset is None:
        return PACKED if pack_int4 else DEFAULT
    if not isinstance(opset, int) or isinstance(opset, bool):
        raise TypeError(f"opset: wanted a number, got {opset!r}")
    if not OLDEST <= opset <= NEWEST:
        raise ValueError(f"opset: wanted {OLDEST} to {NEWEST}, got {opset}")
    if pack_int4 and opset < PACKED:
        raise ValueError(f"pack_int4: wanted opset {PACKED}, which has INT4, got {opset}")
    return opset


def set_opset(model: Any, opset: int) -> None:
    """Rewrite an ``onnx.ModelProto`` of opset 20 for another.

    Raises:
        ValueError: a node has no spelling in ``opset``; the error names it.
    """
    for node in model.graph.node:
        if opset < DEFAULT and node.domain == "":
            if node.op_type.startswith("Reduce"):
                _axes_to_attribute(model.graph, node, opset)
            _drop_defaults(node, opset)
        elif node.op_type == "GroupNormalization":
            raise _refusal(node, opset, "scales and shifts groups before opset 21")
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset


def _drop_defaults(node: Any, opset: int) -> None:
    """Drop the attributes that ``opset`` does not have; they must have their defaults."""
    from onnx import defs, helper

    new = defs.get_schema(node.op_type, DEFAULT)
    try:
        old = defs.get_schema(node.op_type, opset)
    except defs.SchemaError:
        raise _refusal(node, opset, f"it came with opset {_first(node.op_type)}") from None
    if len(node.input) > old.max_input or len(node.output) > old.max_output:
        raise _refusal(node, opset, f"it has {len(node.input)} inputs, {old.max_input} at most")
    kept = []
    for attribute in node.attribute:
        if attribute.name in old.attributes:
            kept.append(attribute)
            continue
        default = new.attributes[attribute.name].default_value
        value = helper.get_attribute_value(attribute)
        if attribute.name == "allowzero":  # differs only for tensors without values
            usual = True
        elif not default.name:  # dilations of 1, which a schema cannot write
            usual = bool((np.ravel(value) == 1).all())
        else:
            usual = helper.get_attribute_value(default) == value
        if not usual:
            raise _refusal(node, opset, f"it has no {attribute.name}={value}")
    del node.attribute[:]
    node.attribute.extend(kept)


def _axes_to_attribute(graph: Any, node: Any, opset: int) -> None:
    """Axes of a reduction are an input since opset 18, of ReduceSum since 13."""
    from onnx import defs, helper, numpy_helper

    old = defs.get_schema(node.op_type, opset)
    if len(node.input) < 2 or "axes" not in old.attributes:
        return
    axes = [constant for constant in graph.initializer if constant.name == node.input[1]]
    if len(axes) != 1:
        raise _refusal(node, opset, "its axes are computed")
    del node.input[1:]
    if not any(axes[0].name in other.input for other in graph.node):
        graph.initializer.remove(axes[0])
    node.attribute.append(helper.make_attribute("axes", numpy_helper.to_array(axes[0]).tolist()))


def _first(op: str) -> int:
    from onnx import defs

    return int(min(s.since_version for s in defs.get_all_schemas_with_history() if s.name == op))


def _refusal(node: Any, opset: int, reason: str) -> ValueError:
    return ValueError(
        f"{module_name(node)}: opset: {node.op_type} cannot be written in opset {opset}: {reason}"
    )


def pack_weights(graph: Any) -> int:
    """Store the weights of at most 4 bits as INT4, two in a byte; their number.

    :func:`divqat.convert` stretches narrow weights to int8 codes that are multiples of a power of
    two, which the scale takes back here: the weights stay the same to the last bit.

    Raises:
        ValueError: there is none.
    """
    from onnx import TensorProto, helper, numpy_helper

    constants = {constant.name: constant for constant in graph.initializer}
    packed = 0
    for node in graph.node:
        codes = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.data_type != TensorProto.INT8:
            continue
        values = numpy_helper.to_array(codes)
        factor = 1 << _factor_bits(values)
        if values.min() < LOWEST * factor or values.max() > HIGHEST * factor:
            continue
        scale = numpy_helper.to_array(constants[node.input[1]])
        name = f"{node.input[0]}/scale"  # its own, as equal scales are one constant
        graph.initializer.append(numpy_helper.from_array(scale * np.float32(factor), name))
        node.input[1] = name
        for name, part in ((node.input[0], values // factor), *_zeros(node, constants)):
            tensor = helper.make_tensor(name, TensorProto.INT4, part.shape, part.ravel().tolist())
            constants[name].CopyFrom(tensor)
        packed += 1
    if not packed:
        raise ValueError("pack_int4: wanted a model with weights of at most 4 bits, got none")
    for value in graph.value_info:
        if value.name in constants and constants[value.name].data_type == TensorProto.INT4:
            value.type.tensor_type.elem_type = TensorProto.INT4
    used = {name for node in graph.node for name in node.input}
    for name, constant in constants.items():
        if name not in used:
            graph.initializer.remove(constant)
    return packed


def _factor_bits(codes: np.ndarray) -> int:
    """The largest power of two, up to 2⁷, that divides all codes."""
    bits = int(np.bitwise_or.reduce(codes.view(np.uint8), axis=None))
    return (bits & -bits).bit_length() - 1 if bits else 0


def _zeros(node: Any, constants: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    from onnx import numpy_helper

    return [(name, numpy_helper.to_array(constants[name])) for name in node.input[2:3]]
