"""Runs the network of the detector on one CPU thread: OpenVINO for the packaged ONNX file, PyTorch for a .pth file.

Shape suffixes: B pictures, A anchors.
"""

import ctypes
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from lib.errors import UserError

MEAN_BGR = (104.0, 117.0, 123.0)
CLOSE_UP_SIDE = 160
"""Side of a close-up for the second look at a face: the smallest size with good landmarks."""

Outputs = tuple[np.ndarray, np.ndarray, np.ndarray]
Network = Callable[[np.ndarray], Outputs]
"""uint8 BGR [B, H, W, 3] -> float32 box offsets [B, A, 4], probabilities [B, A, 2], landmark offsets [B, A, 10]."""


def openvino_network(weights: bytes) -> Network:
    """Run the ONNX file on one CPU thread, in bfloat16 if the CPU supports it (docs/measurements.md compares)."""
    # The runtime plans again, for 2 ms, whenever the size differs from the last one. Close-ups have one size, so they
    # get their own network. Requests are not shared, because detectors may run in several threads.
    whole, close_up = (network.create_infer_request() for network in _compiled(weights))

    def run(pictures_BHW3: np.ndarray) -> Outputs:
        request = close_up if max(pictures_BHW3.shape[1:3]) <= CLOSE_UP_SIDE else whole
        request.infer({0: pictures_BHW3})
        offsets, probabilities, points = (request.get_output_tensor(i).data for i in range(3))
        return offsets, probabilities, points

    return run


_compiling = threading.Lock()
_compiled_by_sha256: dict[str, tuple[Any, Any]] = {}


def _compiled(weights: bytes) -> tuple[Any, Any]:
    """Return the compiled networks of the weights, for whole photos and for close-ups: one of each per process.

    They are never destroyed. On CPUs with AMX, OpenVINO gives the thread that compiles a network an alternate signal
    stack, and restores the previous one when the network is destroyed. Two networks destroyed in the order in which
    they were made leave the thread with a stack that is no longer mapped, and the next signal kills the process.
    """
    digest = hashlib.sha256(weights).hexdigest()
    with _compiling:
        if digest not in _compiled_by_sha256:
            networks = _compile(weights)
            for network in networks:
                # Not even at the end of the process: signals can still come then.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(network))
            _compiled_by_sha256[digest] = networks
        return _compiled_by_sha256[digest]


def _compile(weights: bytes) -> tuple[Any, Any]:
    import openvino
    from openvino.preprocess import PrePostProcessor

    core = openvino.Core()
    try:
        model = core.read_model(model=weights)
        processor = PrePostProcessor(model)
        tensor = processor.input().tensor()
        tensor.set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC")).set_shape([-1, -1, -1, 3])
        processor.input().preprocess().convert_element_type(openvino.Type.f32).mean(list(MEAN_BGR))
        processor.input().model().set_layout(openvino.Layout("NCHW"))
        built = processor.build()
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": "1",
            # With pinning, all workers of a node would run on its first core.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "bf16",
        }
        return core.compile_model(built, "CPU", properties), core.compile_model(built, "CPU", properties)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"--detector-weights is no RetinaFace as ONNX: {reason}") from error


def torch_network(weights: bytes) -> Network:
    """Run the original's .pth file."""
    import torch

    from lib.faces.retinaface import load_network

    model = load_network(weights, is_torch=True)
    mean_311 = torch.tensor(MEAN_BGR).view(3, 1, 1)

    def run(pictures_BHW3: np.ndarray) -> Outputs:
        with torch.inference_mode():
            pictures = torch.from_numpy(pictures_BHW3).permute(0, 3, 1, 2).float() - mean_311
            offsets, probabilities, points = (output.numpy() for output in model(pictures))
        return offsets, probabilities, points

    return run
