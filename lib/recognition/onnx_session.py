"""Opens an ONNX file in ONNX Runtime, and refuses files that could harm.

Only the graph of the file runs. External data is refused, and only ONNX Runtime's own operators exist.
"""

import logging
from collections.abc import Iterator
from typing import Any

import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from lib.errors import UserError
from lib.onnx_files import check_memory
from lib.storage import redacted

logger = logging.getLogger(__name__)

GPU_PROVIDER = "CUDAExecutionProvider"

REFUSED = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
    ValueError,
)
"""What ONNX Runtime raises for a file or an input that it does not take."""


def runtime_knows_gpus() -> bool:
    """Return whether the installed ONNX Runtime can run models on GPUs."""
    return GPU_PROVIDER in onnxruntime.get_available_providers()


def open_session(url: str, content: bytes, device: str) -> onnxruntime.InferenceSession:
    """Return a session of a file with this content.

    Raises:
        UserError: it is no ONNX model, keeps data in other files, or ONNX Runtime refuses it.
    """
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise UserError(f"{url!r} is no ONNX model: give one, or a model folder of this project") from error
    check_memory(url, model)
    if _first_operators(model) in (("Sub", "Mul"), ("Sub", "Div")):
        logger.warning(
            "%s begins with %s of its input, so it may normalise it itself: then use --mean 0 0 0 --std 1 1 1",
            url,
            " and ".join(_first_operators(model)),
        )
    graphs = [model.graph, *model.functions]
    outside = [tensor.name for graph in graphs for tensor in _tensors(graph) if tensor.data_location]
    if outside:
        raise UserError(
            f"{url!r} keeps data in other files ({', '.join(outside[:3])}), which are never read: "
            "save it as one file (onnx.save with save_as_external_data=False)"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # 1 in a worker that has one CPU
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        if runtime_knows_gpus():
            providers.insert(0, GPU_PROVIDER)
        else:  # FaceRecognizer.load(…, device="cuda") takes any model
            logger.warning("%s runs on the CPU: this ONNX Runtime has no GPU support", redacted(url))
    try:
        # Without ONNX Runtime's own retry, which prints to standard output.
        session = onnxruntime.InferenceSession(content, options, providers=providers, enable_fallback=0)
        # Names that are not UTF-8 show up when they are read.
        ends = [(each.name, each.shape, each.type) for each in (*session.get_inputs(), *session.get_outputs())]
        about = session.get_modelmeta().custom_metadata_map
    except REFUSED as error:
        remedy = _loading_remedy(str(error))
        raise UserError(f"{url!r} is no ONNX model that ONNX Runtime can run: {first_line(error)}: {remedy}") from error
    logger.debug("%s: %s, %s", url, ends, about)
    return session


def _loading_remedy(reason: str) -> str:
    """Return what to do about a file that ONNX Runtime refuses for a reason."""
    if "opset" in reason.lower():
        return "save it for an older opset"
    if "not a registered function" in reason or "No Op registered" in reason:
        return "export it with the standard operators alone"
    if "Could not find an implementation" in reason:
        return "export it in float32"
    return "export it again"


def _first_operators(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the kinds of the two operators that the input of a file goes through first."""
    found: list[str] = []
    name = model.graph.input[0].name if model.graph.input else ""
    for _ in range(2):
        taking = [node for node in model.graph.node if name in node.input]
        if len(taking) != 1 or not taking[0].output:
            break
        found.append(taking[0].op_type)
        name = taking[0].output[0]
    return tuple(found)


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield every tensor of a graph or a function, and of the graphs within."""
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for within in (attribute.g, *attribute.graphs):
                yield from _tensors(within)


def first_line(error: BaseException) -> str:
    """Return the first line of an error, for a message."""
    return str(error).strip().split("\n")[0][:300]
