"""Which output of somebody's ONNX file is the embedding: the first, as everybody has it, or the one that is named.

Nothing is guessed: a classifier may give 1,000 logits beside 512 numbers of an embedding, in either order.
"""

from collections.abc import Mapping

import numpy as np

from lib.errors import UserError


def embedding_output(url: str, outputs: Mapping[str, np.ndarray], wanted: str | None) -> tuple[str, int]:
    """Return the name and the length of the embedding.

    Args:
        url: of the file, for messages.
        outputs: what the file gives for one face, in its order.
        wanted: the name that the user gave.

    Raises:
        UserError: there is no such output; it is no vector; or none is named and the first is none, or others could be
            the embedding, too.
    """
    if wanted is not None and wanted not in outputs:
        raise UserError(f"{url!r} has no output {wanted!r}: name one by --model-output, out of {_listed(outputs)}")
    name = wanted or next(iter(outputs))
    output = outputs[name]
    if wanted is None and len(outputs) > 1:
        possible = [name for name, each in outputs.items() if _may_be_embedding(each)]
        if possible != [name]:
            why = f"{len(possible)} of them could be the embedding" if possible else "none of them is one vector a face"
            if possible and name not in possible:
                why = f"the first, {name!r}, is not one vector a face"
            raise UserError(
                f"{url!r} has the outputs {_listed(outputs)}, and {why}: name the right one by --model-output NAME"
            )
    # A file with one output may give a map, such as [1, 512, 7, 7]: all its numbers are the vector.
    if output.ndim < 2 or output.shape[0] != 1 or output.size < 2 or output.dtype.kind != "f":
        raise UserError(
            f"{url!r} gives {output.dtype} of shape {list(output.shape)} for one face in its output {name!r}: one "
            f"vector per face is needed{'; its outputs are ' + _listed(outputs) if len(outputs) > 1 else ''}"
        )
    return name, int(output.size)


def _may_be_embedding(output: np.ndarray) -> bool:
    """Return whether this is one vector of two numbers or more for the face; other axes may have length 1."""
    lengths = [length for length in output.shape[1:] if length != 1]
    return output.dtype.kind == "f" and output.ndim >= 2 and output.shape[0] == 1 and len(lengths) == 1


def _listed(outputs: Mapping[str, np.ndarray]) -> str:
    """Return names and shapes, as in `logits [N, 1000], norm [N, 1]`."""
    shapes = {name: ["N", *each.shape[1:]] if each.ndim else [] for name, each in outputs.items()}
    return ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in shapes.items())
