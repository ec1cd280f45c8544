"""Crops on their way into a model: batches, another alignment, what is no picture; which model and folder are meant."""

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from lib import storage
from lib.cluster import Precision
from lib.errors import UserError
from lib.faces import table
from lib.faces.aligned import ARCFACE_SIDE, UNKNOWN, AlignedCrops
from lib.faces.alignment import ARCFACE, EYES, Alignment, align
from lib.faces.images import Photo
from lib.layout import Layout
from lib.recognition.blocks import BLOCKS_AHEAD, CPU_BLOCK, GPU_BLOCK, Blocks
from lib.recognition.embed_job import model_name
from lib.recognition.embed_worker import Computing, EmbedWorker
from lib.recognition.embedder import TorchEmbedder, find_model, load_embedder
from lib.recognition.face_source import FacesSource, check_source, faces_source
from lib.recognition.model import SPEC_NAME, embed, load_model
from lib.recognition.recognizer import decoded_crop


class Recorder:
    """An `Embedder` that keeps the crops and gives their means."""

    url, digest, embedding_dim = "a model", "0", 3
    threshold: float | None = None
    fingerprint: Mapping[str, Any] = {}

    def __init__(self, template: str, value: float = 1.0, errors: list[Exception | None] | None = None) -> None:
        self.template = template
        self.value = value
        self.batches: list[np.ndarray] = []
        self.errors = errors or []

    def embed(self, crops_NHWC: np.ndarray) -> np.ndarray:
        """Return the mean of each channel."""
        self.batches.append(crops_NHWC)
        return crops_NHWC.mean(axis=(1, 2)).astype(np.float32) * np.float32(self.value)

    def buffer(self, num: int) -> np.ndarray:
        """Return crops full of rubbish."""
        side = ARCFACE_SIDE if self.template == ARCFACE else Alignment().image_size
        return np.full((num, side, side, 3), 77, np.uint8)

    def launch(self, crops_NHWC: np.ndarray) -> Callable[[], np.ndarray]:
        """Fail as `errors` say, else compute when the result is asked for, as a GPU may."""
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return lambda: self.embed(crops_NHWC)


@pytest.fixture(scope="module")
def faces(faces_url: str) -> list[dict]:
    """Return the aligned rows of the drawn people."""
    rows = [
        row for path in sorted(Path(faces_url).glob("split=*/*")) for row in pq.ParquetFile(path).read().to_pylist()
    ]
    return [row for row in rows if row["status"] == table.ALIGNED]


def test_a_worker_refuses_another_model_than_the_job_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.recognition.embed_worker.load_embedder", lambda *_, **__: Recorder(EYES))
    about = {"digest": "1", "embedding_dim": 3, "template": EYES}
    with pytest.raises(UserError, match="a model changed since this job began"):
        EmbedWorker(("a model", None, False), "out", None, {}, about, Computing())
    EmbedWorker(("a model", None, False), "out", None, {}, {**about, "digest": "0"}, Computing())


def test_crops_go_through_in_batches_and_in_order(faces: list[dict]) -> None:
    model = Recorder(EYES)
    embeddings_ND = Blocks(model, num_threads=3)(faces, Alignment())
    assert [len(batch) for batch in model.batches] == [CPU_BLOCK, len(faces) - CPU_BLOCK]
    for row, embedding_D in zip(faces, embeddings_ND, strict=True):
        np.testing.assert_allclose(embedding_D, decoded_crop(row["crop"]).mean(axis=(0, 1)), rtol=1e-4)


def test_the_last_block_is_filled_with_black_so_that_a_vector_does_not_depend_on_its_length(faces: list[dict]) -> None:
    model = Recorder(EYES)
    embeddings_ND = Blocks(model, size=16, is_padded=True)(faces[:35], Alignment())
    assert [len(batch) for batch in model.batches] == [16, 16, 16]
    assert embeddings_ND.shape == (35, 3)
    assert not model.batches[2][3:].any()
    assert model.batches[2][:3].any(axis=(1, 2, 3)).all()
    other = Recorder(EYES)
    np.testing.assert_array_equal(Blocks(other, size=16, is_padded=True)(faces[:33], Alignment()), embeddings_ND[:33])
    np.testing.assert_array_equal(other.batches[0], model.batches[0])
    assert Blocks(model, size=16, is_padded=True)([], Alignment()).shape == (0, 3)


def test_blocks_are_decoded_ahead_and_no_more_than_memory_is_meant_for(
    faces: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, ahead_enough = [], threading.Event()

    def counted(crop: bytes) -> np.ndarray:
        decoded.append(crop)
        if len(decoded) == 1 + BLOCKS_AHEAD:
            ahead_enough.set()
        return decoded_crop(crop)

    class Slow(Recorder):
        def launch(self, crops_NHWC: np.ndarray) -> Callable[[], np.ndarray]:
            assert ahead_enough.wait(60)  # the model has not begun, and the next blocks are there
            num_begun.append(len(decoded))
            return super().launch(crops_NHWC)

    num_begun: list[int] = []
    monkeypatch.setattr("lib.recognition.blocks.decoded_crop", counted)
    Blocks(Slow(EYES), size=1, num_threads=2)(faces[:12], Alignment())
    assert len(num_begun) == 12
    assert all(begun <= done + 1 + BLOCKS_AHEAD for done, begun in enumerate(num_begun))


def test_blocks_are_halved_where_the_device_has_no_memory_and_stay_so(
    faces: list[dict], caplog: pytest.LogCaptureFixture
) -> None:
    short = torch.OutOfMemoryError("CUDA out of memory")
    # The first block passes; the second fails whole, and then in its second half.
    model = Recorder(EYES, errors=[None, short, None, short])
    blocks = Blocks(model, size=16, is_padded=True)
    embeddings_ND = blocks(faces[:40], Alignment())
    assert [len(batch) for batch in model.batches] == [16] + [4] * 8
    np.testing.assert_array_equal(embeddings_ND, Blocks(Recorder(EYES), size=16)(faces[:40], Alignment()))
    assert caplog.messages == [f"the GPU has no memory for {num} faces at once: going on with fewer" for num in (16, 8)]


def test_a_device_without_memory_for_one_face_is_told(faces: list[dict]) -> None:
    model = Recorder(EYES, errors=[torch.OutOfMemoryError("CUDA out of memory")] * 3)
    with pytest.raises(UserError, match=r"no memory for one face of 'a model': .* --gpus 0"):
        Blocks(model, size=3)(faces[:3], Alignment())


def test_threads_share_a_model_one_pass_at_a_time(faces: list[dict]) -> None:
    inside: list[int] = []

    class Watched(Recorder):
        def launch(self, crops_NHWC: np.ndarray) -> Callable[[], np.ndarray]:
            inside.append(1)
            assert len(inside) == 1
            made_ND = self.embed(crops_NHWC)
            inside.clear()
            return lambda: made_ND

    blocks = Blocks(Watched(EYES), size=4, num_threads=2)
    parts = [faces[:10], faces[10:30], faces[5:20]]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda part: blocks(part, Alignment()), parts))
    for part, embeddings_ND in zip(parts, together, strict=True):
        np.testing.assert_array_equal(embeddings_ND, Blocks(Recorder(EYES), size=4)(part, Alignment()))


def _worker(faces_url: str, model_url: str, output: Path, **how: Any) -> tuple[EmbedWorker, list[dict[str, Any]]]:
    embedder = load_embedder(model_url)
    about = {"digest": embedder.digest, "embedding_dim": embedder.embedding_dim, "template": embedder.template}
    source = faces_source(faces_url, table.SPLITS)
    worker = EmbedWorker(
        (model_url, None, embedder.flip), str(output), None, source.fingerprint, about, Computing(**how)
    )
    return worker, [item for item, _, _ in source.items(embedder.digest)]


def test_a_worker_gives_the_same_files_whether_it_has_one_part_in_hand_or_three(
    faces_url: str, model_url: str, tmp_path: Path
) -> None:
    worker, items = _worker(faces_url, model_url, tmp_path / "one")
    assert not any(worker(item)["failure"] for item in items)
    others, items = _worker(faces_url, model_url, tmp_path / "three", num_threads=2)
    with ThreadPoolExecutor(3) as pool:
        for item, done in zip(items, pool.map(others, items), strict=True):
            assert not done["failure"]
            name = item["name"]
            assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
            # 64 faces at a time, the last block as long as it is, as one call for the whole part does.
            rows = pq.ParquetFile(tmp_path / "three" / name).read().to_pylist()
            crops = {row["photo"]: row["crop"] for row in storage.read_parquet(item["faces"]).to_pylist()}
            made = [row for row in rows if row["embedding"] is not None]
            if made:
                crops_NHWC = np.stack([decoded_crop(crops[row["photo"]]) for row in made])
                expected_ND = embed(load_model(model_url), crops_NHWC)
                np.testing.assert_array_equal([row["embedding"] for row in made], expected_ND.astype(float))
            assert all(crops[row["photo"]] is None for row in rows if row["embedding"] is None)


def test_a_worker_ends_when_its_gpu_fails_and_not_when_something_else_does(
    faces_url: str, model_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(BaseException):
        pass

    def end(reason: str) -> None:
        raise Ended(reason)

    def failing(error: Exception) -> Callable[..., Any]:
        def blocks(*_: Any) -> None:
            raise error

        return blocks

    monkeypatch.setattr("lib.recognition.embed_worker.end_worker", end)
    worker, items = _worker(faces_url, model_url, tmp_path)
    for lost in (
        torch.AcceleratorError("CUDA error: uncorrectable ECC error"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ):
        worker._blocks = failing(lost)  # type: ignore[assignment]
        with pytest.raises(Ended, match=r"its GPU failed \((CUDA error: unc|cuDNN)"):
            worker(items[0])
    worker._blocks = failing(RuntimeError("shapes differ"))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="shapes differ"):
        worker(items[0])
    assert not list(tmp_path.rglob("*.parquet"))


def test_bf16_is_close_to_fp32_and_taken_on_a_cpu_only_where_asked_for(faces: list[dict], model_url: str) -> None:
    plain_ND, automatic_ND, rounded_ND = (
        Blocks(load_embedder(model_url, precision=precision))(faces, Alignment())
        for precision in ("fp32", "auto", "bf16")
    )
    np.testing.assert_array_equal(automatic_ND, plain_ND)
    np.testing.assert_allclose(rounded_ND, plain_ND, atol=0.05)
    assert (rounded_ND != plain_ND).any()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TorchDynamoException("no compiler here"), r"not compiled \(no compiler here\)"),
        (torch.OutOfMemoryError("CUDA out of memory"), r"not compiled \(the GPU has no memory for 64 faces at once\)"),
    ],
)
def test_a_model_that_cannot_be_compiled_runs_as_it_is_with_one_line(
    error: Exception,
    line: str,
    faces: list[dict],
    model_url: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Any, **__: Any) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> None:
            raise error

        return call

    monkeypatch.setattr(torch, "compile", failing)
    embedder = load_embedder(model_url)
    assert isinstance(embedder, TorchEmbedder)
    assert not embedder.compile("auto", size=CPU_BLOCK, pays=True)  # not on a CPU
    assert not caplog.messages
    assert not embedder.compile("on", size=CPU_BLOCK, pays=True)
    assert len(caplog.messages) == 1
    assert re.match(line, caplog.messages[0])
    monkeypatch.undo()
    embeddings_ND = Blocks(embedder)(faces, Alignment())
    np.testing.assert_array_equal(embeddings_ND, Blocks(load_embedder(model_url))(faces, Alignment()))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_gives_the_vectors_of_the_cpu_and_the_same_ones_each_time(
    faces: list[dict], model_url: str, precision: Precision
) -> None:
    on_cpu_ND = Blocks(load_embedder(model_url))(faces, Alignment())
    embedder = load_embedder(model_url, device="cuda", precision=precision)
    blocks = Blocks(embedder, size=GPU_BLOCK, is_padded=True, num_threads=2)
    on_gpu_ND = blocks(faces, Alignment())
    np.testing.assert_allclose(on_gpu_ND, on_cpu_ND, atol=0.05 if precision == "bf16" else 2e-3)
    np.testing.assert_array_equal(blocks(faces, Alignment()), on_gpu_ND)
    np.testing.assert_array_equal(blocks(faces[:7], Alignment()), on_gpu_ND[:7])
    assert isinstance(embedder, TorchEmbedder)
    if embedder.compile("on", size=GPU_BLOCK, pays=True):
        np.testing.assert_allclose(blocks(faces, Alignment()), on_cpu_ND, atol=0.05)


def test_a_model_of_another_template_gets_crops_turned_to_it(faces: list[dict], sample_data: Path) -> None:
    model = Recorder(ARCFACE)
    Blocks(model)(faces[:20], Alignment())
    wanted = Alignment(template=ARCFACE, image_size=112)
    differences = []
    for row, crop_HWC in zip(faces[:20], model.batches[0], strict=True):
        photo = Photo((sample_data / "photos" / row["photo"]).read_bytes(), max_pixels=10**8)
        direct_HWC = align(photo, np.array(row["box"]), np.array(row["landmarks"]).reshape(5, 2), wanted)[..., ::-1]
        middle = slice(24, 88)
        differences.append(np.abs(crop_HWC[middle, middle].astype(int) - direct_HWC[middle, middle]).mean())
    assert np.median(differences) < 4  # twice resampled and once compressed


def _crops(template: str) -> FacesSource:
    made = ARCFACE if template == ARCFACE else EYES
    how = AlignedCrops(template=template, alignment=Alignment(template=made, image_size=ARCFACE_SIDE))
    return FacesSource(url="faces", run_id="0", fingerprint=how.fingerprint(), file_names=[], num_rows=[])


@pytest.mark.parametrize("template", [EYES, UNKNOWN])
def test_crops_without_landmarks_are_refused_before_any_work_where_the_model_wants_them_turned(template: str) -> None:
    with pytest.raises(UserError, match=f"wants faces aligned as arcface-112, .* --aligned {template} have no landm"):
        check_source(_crops(template), Recorder(ARCFACE), strict=False)


@pytest.mark.parametrize(("template", "wanted"), [(EYES, EYES), (UNKNOWN, EYES), (ARCFACE, ARCFACE), (ARCFACE, EYES)])
def test_crops_of_the_models_template_or_with_landmarks_are_taken(template: str, wanted: str) -> None:
    assert check_source(_crops(template), Recorder(wanted), strict=True) == []


def test_a_crop_that_is_no_picture_is_told() -> None:
    with pytest.raises(UserError, match="a crop of the faces table is no picture"):
        Blocks(Recorder(EYES))([{"crop": b"?"}], Alignment())


def test_embeddings_that_are_not_finite_are_told(faces: list[dict]) -> None:
    with pytest.raises(UserError, match="'a model' gives NaN or infinity for 5 of 5 faces"):
        Blocks(Recorder(EYES, float("nan")))(faces[:5], Alignment())


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://b/runs/first é/model", "first é"),
        ("/m/mobile.onnx", "mobile"),
        ("/runs/first é/model.onnx", "first é"),
        ("/my model/", "my model"),
        ("model", "model"),
    ],
)
def test_a_model_is_called_after_its_run(url: str, name: str) -> None:
    assert model_name(url) == name


def test_the_one_run_with_a_model_is_the_default(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a model yet"):
        find_model(Layout(str(tmp_path)), None)
    for run in ("a b", "c"):
        (tmp_path / "runs" / run / "model").mkdir(parents=True)
        (tmp_path / "runs" / run / "model" / SPEC_NAME).write_text("{}")
        if run == "a b":
            assert find_model(Layout(str(tmp_path)), None) == str(tmp_path / "runs" / "a b" / "model")
    with pytest.raises(UserError, match=r"2 runs in .* have a model \(a b, c\): name one by --model"):
        find_model(Layout(str(tmp_path)), None)
    assert find_model(Layout(str(tmp_path)), str(tmp_path / "runs" / "c")) == str(tmp_path / "runs" / "c" / "model")
