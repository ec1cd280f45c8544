"""What an ONNX file asks for, looked at before anything runs it."""

import contextlib
import math
from typing import Any

import onnx
from onnx import numpy_helper

from lib.errors import UserError

MAX_MADE_BYTES = 256_000_000
"""What the operators of a file may make out of constant shapes, beyond the size of the file itself."""
MAX_AXES = 8


def check_memory(url: str, model: onnx.ModelProto) -> None:
    """Raise UserError where a file asks for constants far larger than itself, which take memory when it is loaded."""
    limit = 2 * model.ByteSize() + MAX_MADE_BYTES
    asked = sum(_made_bytes(graph) for graph in (model.graph, *model.functions))
    if asked > limit:
        raise UserError(
            f"{url!r} asks for {asked / 1e9:.1f} GB of constants in a file of {model.ByteSize() / 1e6:.1f} MB: "
            "take a file from its maker"
        )


def _made_bytes(graph: Any) -> int:
    """Return the bytes that the operators of a graph and of those within make out of constant shapes."""
    constants = {tensor.name: tensor for tensor in getattr(graph, "initializer", ())}
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            constants.update((node.output[0], each.t) for each in node.attribute if each.name == "value")
    total = 0
    for node in graph.node:
        # The shape that they make is their only, or their second input.
        place = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}.get(node.op_type)
        shape = constants.get(node.input[place]) if place is not None and len(node.input) > place else None
        # Data outside of the file is never read, and a shape has few axes.
        if shape is not None and not shape.data_location and len(shape.dims) == 1 and shape.dims[0] <= MAX_AXES:
            with contextlib.suppress(
                ValueError, TypeError, OverflowError
            ):  # a damaged one is refused when it is loaded
                total += 4 * math.prod(max(0, int(size)) for size in numpy_helper.to_array(shape))
        total += sum(_made_bytes(within) for each in node.attribute for within in (each.g, *each.graphs) if within.node)
    return total
