"""Checks how much memory an ONNX file would take, before anything runs it."""

import contextlib
import math
from typing import Any

import onnx
from onnx import numpy_helper

from lib.errors import UserError

MAX_MADE_BYTES = 256_000_000
"""Memory that the operators of a file may fill from constant shapes, beyond twice the size of the file."""
MAX_AXES = 8


def check_memory(url: str, model: onnx.ModelProto) -> None:
    """Raise UserError if a file makes constants far larger than itself: they take memory when it is loaded."""
    limit = 2 * model.ByteSize() + MAX_MADE_BYTES
    asked = sum(_made_bytes(graph) for graph in (model.graph, *model.functions))
    if asked > limit:
        raise UserError(
            f"{url!r} asks for {asked / 1e9:.1f} GB of constants in a file of {model.ByteSize() / 1e6:.1f} MB: "
            "take a file from its maker"
        )


def _made_bytes(graph: Any) -> int:
    """Return the bytes that the operators of a graph, and of the graphs inside it, make from constant shapes."""
    constants = {tensor.name: tensor for tensor in getattr(graph, "initializer", ())}
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            constants.update((node.output[0], each.t) for each in node.attribute if each.name == "value")
    total = 0
    for node in graph.node:
        # The shape is the only input, or the second one.
        place = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}.get(node.op_type)
        shape = constants.get(node.input[place]) if place is not None and len(node.input) > place else None
        # Data outside of the file is never read, and a shape has few axes.
        if shape is not None and not shape.data_location and len(shape.dims) == 1 and shape.dims[0] <= MAX_AXES:
            # A damaged shape is refused when the file is loaded.
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                total += 4 * math.prod(max(0, int(size)) for size in numpy_helper.to_array(shape))
        total += sum(_made_bytes(within) for each in node.attribute for within in (each.g, *each.graphs) if within.node)
    return total
