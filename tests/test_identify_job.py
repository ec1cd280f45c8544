"""`jobs/identify.py` as a user runs it: known people, strangers, photos without a face, and bad galleries."""

import csv
import json
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lib.errors import UserError
from lib.recognition import gallery_search
from lib.recognition.embed_job import EmbedConfig, embed_job
from lib.recognition.embeddings_table import read_embeddings
from lib.recognition.identify_job import IdentifyConfig, identify
from tests.job_runner import RayHead, run_here


@pytest.fixture(scope="module")
def gallery_url(
    connected_head: RayHead, model_url: str, faces_url: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Return the embeddings of the people of the split train: those of the others are strangers."""
    output = str(tmp_path_factory.mktemp("gallery é") / "train")
    embed_job(EmbedConfig(model=model_url, faces=faces_url, splits=("train",), output=output))
    return output


@pytest.fixture(scope="module")
def photos(sample_data: Path, aligned: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with photos of the gallery, of strangers, of two people, and of nobody."""
    folder = tmp_path_factory.mktemp("in question")
    for split in ("train", "test"):
        names = [row["photo"] for row in aligned if row["split"] == split and row["num_faces"] == 1][:6]
        for name in names:
            (folder / split).mkdir(exist_ok=True)
            os.link(sample_data / "photos" / name, folder / split / name)
    double = next(row["photo"] for row in aligned if row["split"] == "train" and row["num_faces"] == 2)
    os.link(sample_data / "photos" / double, folder / f"two {double}")
    Image.new("RGB", (320, 240), (90, 120, 90)).save(folder / "meadow.png")
    (folder / "identities.txt").write_text("this list is of other photos and says nothing here 1\n")
    return folder


def test_known_people_are_named_strangers_are_not_and_every_photo_is_accounted_for(
    connected_head: RayHead,
    model_url: str,
    gallery_url: str,
    faces_url: str,
    aligned: list[dict],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gallery_search, "GROUP_ROWS", 1)  # the photos of each split are a group: workers search
    packed = tmp_path / "in question.tar"
    with tarfile.open(packed, "w") as archive:
        archive.add(photos, ".")  # as `tar -C folder .` does
    flags = ["--model", model_url, "--gallery", gallery_url, "--photos", str(packed), "--faces", faces_url]
    flags += ["--threshold", "0.0001", "--output", str(tmp_path / "out é"), "--identities", str(tmp_path / "who é.csv")]
    people = {row["photo"]: row["identity"] for row in aligned}
    lines = [f"{packed.name}/{path.relative_to(photos)},{people[path.name]}" for path in sorted(photos.glob("t*/*"))]
    (tmp_path / "who é.csv").write_text("\n".join(["photo,identity", *lines, ""]))
    done = run_here("identify.py", *flags, extra=connected_head.environment)
    assert done.status == 0, done.errors
    assert done.result["files"] > 1
    files = [tmp_path / "out é" / f"matches-{n:05d}.parquet" for n in range(done.result["files"])]
    assert [done.result["matches"], done.result["csv"]] == [str(files[0]), str(files[0].with_suffix(".csv"))]
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    best = {row["photo"].removeprefix(f"{packed.name}/"): row for row in rows if row["rank"] in (1, None)}
    train = {name: row for name, row in best.items() if name.startswith("train/")}
    assert len(train) == 6
    for photo, row in train.items():
        name = photo.removeprefix("train/").removesuffix("#0")
        # The same photo is in the gallery: distance 0, but for the last digits of another batch.
        assert row["decision"] == row["identity"] == people[name]
        assert row["distance"] < 1e-4
        assert row["x1"] > row["x0"]
    assert {row["decision"] for name, row in best.items() if name.startswith("test/")} == {"unknown"}
    assert sum(name.startswith("two ") for name in best) == 2
    nobody = best["meadow.png"]
    assert (nobody["status"], nobody["rank"], nobody["decision"]) == ("no_face", None, None)
    assert sorted({row["rank"] for row in rows if row["rank"]}) == [1, 2, 3, 4, 5]
    assert done.result["faces"] == done.result["identified"] + done.result["unknown"] == 6 + 6 + 2
    assert done.result["photos_without_face"] == 1
    measured = done.result["open_set"]
    assert (measured["mated_probes"], measured["non_mated_probes"], measured["photos_without_name"]) == (6, 6, 2)
    assert (measured["tpir"], measured["fpir"], measured["rank_1"]) == (1.0, 0.0, 1.0)
    assert "open set: TPIR 100.00%" in done.errors

    known = read_embeddings(gallery_url)
    probes = read_embeddings(str(tmp_path / "out é" / "embeddings"))
    for row in rows:
        if row["rank"]:
            probe_D = probes.embeddings_ND[probes.photos.index(row["photo"])]
            distances_G = np.linalg.norm(known.embeddings_ND[~known.failed_N] - probe_D, axis=1)
            assert row["distance"] == pytest.approx(np.sort(distances_G)[row["rank"] - 1], abs=1e-4)
    listed = [row for file in files for row in csv.DictReader(file.with_suffix(".csv").open())]
    assert [row["photo"] for row in listed] == [row["photo"] for row in rows]
    assert not (tmp_path / "out é" / "_search").exists()
    sheet = cv2.imread(str(tmp_path / "out é" / "matches.jpg"))
    assert sheet.shape == (18 + 14 * 156, 6 * 120, 3)
    tiles = sheet[18:].reshape(14, 156, 6, 120, 3)[:, :116]
    assert (tiles.std(axis=(1, 3, 4)) > 10).all()  # a picture in every place


def test_bad_galleries_and_settings_are_refused(model_url: str, gallery_url: str, photos: Path, tmp_path: Path) -> None:
    def refused(**settings: object) -> str:
        values = {"model": model_url, "gallery": gallery_url, "photos": str(photos), "dry_run": True, **settings}
        with pytest.raises(UserError) as caught:
            identify(IdentifyConfig(**values))  # type: ignore[arg-type]
        return str(caught.value)

    assert "no finished embeddings at" in refused(gallery=str(tmp_path))
    assert "/nowhere is not there" in refused(photos="/nowhere")
    assert "--top is 0" in refused(top=0)
    assert "--faces-policy is 'some'" in refused(faces_policy="some")
    assert "--threshold is nan" in refused(threshold=float("nan"))
    assert "--gpus is -1" in refused(gpus=-1)

    other = tmp_path / "other" / "model"
    other.mkdir(parents=True)
    for path in Path(model_url).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    spec = json.loads((other / "model.json").read_text())
    (other / "model.json").write_text(json.dumps({**spec, "threshold": None}))
    assert "no threshold yet" in refused(model=str(other))
    (other / "model.json").write_text(json.dumps({**spec, "mean": [0.0, 0.0, 0.0]}))
    assert "made by another model than" in refused(model=str(other))
