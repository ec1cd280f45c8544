"""Pictures and the packaged detector for tests of detection."""

from functools import lru_cache

import numpy as np
import onnxruntime
from retinaface.weights import WEIGHTS

from lib.faces.detection import RetinaFace, load_detector
from lib.faces.detector_runtimes import Network, Outputs
from lib.faces.images import Photo
from lib.sample.sample_job import SamplePlan, draw_photo

SURE = 0.9


@lru_cache
def pictures() -> list[np.ndarray]:
    """Return drawn photos of one, two and no people, of many sizes."""
    plan = SamplePlan(identities=24, photos_per_identity=1, seed=5)
    photos = [photo for photo in range(len(plan)) if plan.special(photo)[0] != "broken"]
    return [Photo(draw_photo(plan, photo)[0], max_pixels=10**8).pixels() for photo in photos]


@lru_cache
def packaged() -> RetinaFace:
    detector = load_detector("retinaface")
    assert isinstance(detector, RetinaFace)
    return detector


@lru_cache
def float32_network() -> Network:
    """Return the packaged network as ONNX Runtime runs it, without any of our code."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(bytes(WEIGHTS), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(pictures_BHW3: np.ndarray) -> Outputs:
        mean = np.float32([104, 117, 123])
        outputs = session.run(None, {name: (pictures_BHW3.astype(np.float32) - mean).transpose(0, 3, 1, 2)})
        return outputs[0], outputs[1], outputs[2]

    return run
