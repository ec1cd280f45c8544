"""`jobs/embed.py` as a user runs it: from faces and from photos, killed and started again, on S3, with bad input."""

import dataclasses
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lib import storage
from lib.errors import JobError, UserError
from lib.faces import table
from lib.faces.table import FINGERPRINT_KEY
from lib.recognition.embed_job import EmbedConfig, embed_job
from lib.recognition.embeddings_table import MODEL_KEY, read_embeddings
from lib.recognition.model import embed, load_model, save_model
from lib.recognition.recognizer import decoded_crop
from tests.faces.sources.test_recordio import insightface
from tests.job_runner import RayHead, kill_session, run_here, run_job, start_job, wait_until


def digests(folder: Path) -> dict[str, str]:
    parts = sorted(folder.glob("split=*/*"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in parts}


@pytest.fixture(scope="module")
def undisturbed(
    connected_head: RayHead, model_url: str, faces_url: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """Return the embeddings of the drawn people, and what the job said."""
    output = tmp_path_factory.mktemp("embeddings é") / "all"
    flags = ["--model", model_url, "--faces", faces_url, "--output", str(output)]
    done = run_job("embed.py", *flags, extra=connected_head.environment)
    assert done.status == 0, done.errors
    return output, done.result


def test_every_face_gets_the_embedding_of_its_crop(
    undisturbed: tuple[Path, dict], model_url: str, faces_rows: list[dict]
) -> None:
    output, result = undisturbed
    made = read_embeddings(str(output))
    faces = {row["photo"]: row for row in faces_rows}
    assert sorted(made.photos) == sorted(faces)
    assert result["rows"] == result["rows_processed"] == len(faces)
    assert result["aligned"] == sum(row["status"] == table.ALIGNED for row in faces_rows)
    expected_ND = embed(
        load_model(model_url), np.stack([decoded_crop(row["crop"]) for row in faces_rows if row["crop"]])
    )
    expected = dict(zip([row["photo"] for row in faces_rows if row["crop"]], expected_ND, strict=True))
    for index, photo in enumerate(made.photos):
        row = faces[photo]
        assert (made.identities[index], made.statuses[index]) == (row["identity"], row["status"])
        assert made.splits[index] == row["split"]
        assert made.failed_N[index] == (row["crop"] is None)
        if row["crop"] is not None:
            np.testing.assert_allclose(made.embeddings_ND[index], expected[photo], atol=1e-5)
            assert made.boxes_N4[index].tolist() == row["box"]
    assert made.failed_N.any()


def test_the_metadata_tells_the_model_and_the_fingerprint(undisturbed: tuple[Path, dict], model_url: str) -> None:
    output, _ = undisturbed
    for path in output.glob("split=*/*.parquet"):
        metadata = pq.read_schema(path).metadata
        assert json.loads(metadata[FINGERPRINT_KEY]) == load_model(model_url).spec.fingerprint
        model = json.loads(metadata[MODEL_KEY])
        assert (model["embedding_dim"], model["template"]) == (16, "eyes")
        assert len(model["digest"]) == 16
    success = json.loads((output / "_SUCCESS").read_text())
    assert success["model"] == {"url": model_url, **model}


@pytest.mark.slow
def test_photos_killed_and_started_again_give_the_embeddings_of_their_faces(
    connected_head: RayHead, undisturbed: tuple[Path, dict], sample_data: Path, model_url: str, tmp_path: Path
) -> None:
    photos, output = str(sample_data / "photos"), tmp_path / "e"
    arguments = ["--model", model_url, "--photos", photos, "--output", str(output)]
    with start_job("embed.py", *arguments, extra=connected_head.environment) as job:
        try:
            wait_until(lambda: any(output.glob("split=*/part-*.parquet")), job)
        finally:
            kill_session(job.pid)
    assert not (output / "_SUCCESS").exists()
    config = EmbedConfig(model=model_url, photos=photos, output=str(output))
    again = embed_job(config)
    assert 0 < again["rows_processed"] < again["rows"]
    # By the photos with many hands in two goes, and by the faces in one, to the last bit.
    assert digests(output) == digests(undisturbed[0])
    third = embed_job(config)
    assert third["rows_processed"] == 0
    assert third["aligned"] == undisturbed[1]["aligned"]


@pytest.mark.slow
def test_embeddings_go_to_the_folder_of_the_run_and_only_the_splits_asked_for(
    connected_head: RayHead, model_url: str, faces_url: str, tmp_path: Path
) -> None:
    save_model(load_model(model_url), str(tmp_path / "runs" / "first" / "model"))
    result = embed_job(EmbedConfig(data=str(tmp_path), faces=faces_url, splits=("val",)))
    output = tmp_path / "embeddings" / "first"
    assert result["embeddings"] == str(output)
    assert {path.parent.name for path in output.glob("*/*.parquet")} == {"split=val"}


def test_crops_of_a_record_file_are_embedded_as_they_are_with_mirror_images(
    connected_head: RayHead, undisturbed: tuple[Path, dict], model_url: str, aligned: list[dict], tmp_path: Path
) -> None:
    crops = [row["crop"] for row in aligned if row["split"] == "val"]
    insightface(tmp_path / "crops é.rec", crops, [float(number) for number in range(len(crops))])
    flags = ["--model", model_url, "--photos", str(tmp_path / "crops é.rec"), "--aligned", "eyes"]
    done = run_here("embed.py", *flags, "--output", str(tmp_path / "e"), "--flip")
    assert done.status == 0, done.errors
    assert done.result["aligned"] == len(crops)
    made, plain = read_embeddings(str(tmp_path / "e")), read_embeddings(str(undisturbed[0]))
    assert (made.model["flip"], plain.model["flip"]) == (True, False)
    assert sorted(map(str, made.identities), key=int) == [str(number) for number in range(len(crops))]
    model = load_model(model_url)
    model.spec = dataclasses.replace(model.spec, flip=True)
    expected_ND = embed(model, np.stack([decoded_crop(crops[int(str(each))]) for each in made.identities]))
    np.testing.assert_allclose(made.embeddings_ND, expected_ND, atol=1e-5)
    mixed = run_here("embed.py", *flags, "--output", str(tmp_path / "e"))
    assert mixed.status == 2
    assert "--output" in mixed.last_error


@pytest.mark.slow
def test_a_bucket_holds_model_faces_and_embeddings(
    connected_head: RayHead, s3_bucket: str, undisturbed: tuple[Path, dict], model_url: str, faces_url: str
) -> None:
    for folder, name in ((model_url, "runs/ü 1/model"), (faces_url, "faces")):
        for info in storage.list_files(folder, skip_prefixes=(".",)):
            storage.write_bytes(f"{s3_bucket}/{name}/{info.path}", storage.read_bytes(f"{folder}/{info.path}"))
    embed_job(EmbedConfig(data=s3_bucket))
    there = read_embeddings(f"{s3_bucket}/embeddings/ü 1")
    assert np.array_equal(there.embeddings_ND, read_embeddings(str(undisturbed[0])).embeddings_ND)


@pytest.mark.slow
def test_other_settings_are_refused_unless_they_may_overwrite(
    connected_head: RayHead, undisturbed: tuple[Path, dict], model_url: str, faces_url: str, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed[0], tmp_path / "e")
    torch.manual_seed(1)
    model = load_model(model_url)
    torch.nn.init.normal_(model.head[0].weight)
    save_model(model, str(tmp_path / "other"))
    other = EmbedConfig(model=str(tmp_path / "other"), faces=faces_url, output=str(tmp_path / "e"), splits=("val",))
    with pytest.raises(UserError, match="model: "):
        embed_job(other)
    replaced = embed_job(dataclasses.replace(other, overwrite=True))
    assert replaced["rows_processed"] == replaced["rows"] > 0
    parts = json.loads((tmp_path / "e" / "_SUCCESS").read_text())["parts"]
    assert {Path(name).parent.name for name in parts} == {"split=val"}


def test_faces_of_another_fingerprint_are_warned_of_or_refused(
    model_url: str, faces_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(model_url)
    model.spec = dataclasses.replace(model.spec, fingerprint={**model.spec.fingerprint, "eye_height": 0.5})
    save_model(model, str(tmp_path / "model"))
    config = EmbedConfig(model=str(tmp_path / "model"), faces=faces_url, output=str(tmp_path / "e"), dry_run=True)
    with caplog.at_level(logging.WARNING):
        embed_job(config)
    assert "eye_height: 0.4 here, 0.5 there" in caplog.text
    assert not (tmp_path / "e").exists()
    with pytest.raises(UserError, match=r"eye_height: 0\.4 here, 0\.5 there"):
        embed_job(dataclasses.replace(config, strict=True))


@pytest.mark.slow
def test_a_model_that_gives_nan_ends_the_job_in_one_line(
    connected_head: RayHead, model_url: str, faces_url: str, tmp_path: Path
) -> None:
    model = load_model(model_url)
    torch.nn.init.constant_(model.head[0].weight, 3e38)  # finite itself, but no product with it is
    save_model(model, str(tmp_path / "model"))
    with pytest.raises(JobError, match="gives NaN or infinity"):
        embed_job(EmbedConfig(model=str(tmp_path / "model"), faces=faces_url, output=str(tmp_path / "e")))
    assert not (tmp_path / "e" / "_SUCCESS").exists()


def test_what_cannot_start_says_so_in_one_line(
    connected_head: RayHead, model_url: str, faces_url: str, tmp_path: Path
) -> None:
    flags = ["--model", model_url, "--faces", faces_url, "--output", str(tmp_path / "e"), "--gpus", "1"]
    refused = run_here("embed.py", *flags)
    assert refused.status == 2, refused.errors
    assert "--gpus is 1, but the cluster has 0" in refused.last_error
    assert "Traceback" not in refused.errors
    assert refused.output == ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": None}, "no run in"),
        ({"model": "/nowhere/model"}, "no model at '/nowhere/model'"),
        ({"faces": None}, "no finished faces at"),
        ({"photos": "/p"}, "both given"),
        ({"faces": None, "photos": "/nowhere/photos"}, "/nowhere/photos is not there"),
        ({"splits": ("tset",)}, "--splits is tset"),
        ({"gpus": -1}, "--gpus is -1"),
        ({"output": "/proc/e"}, "/proc/e"),
        ({"output": "FACES"}, "choose another folder"),
    ],
)
def test_bad_input_is_refused(
    model_url: str, faces_url: str, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    wanted = {"data": str(tmp_path), "model": model_url, "faces": faces_url, **settings}
    with pytest.raises(UserError) as refused:
        embed_job(EmbedConfig(**{name: faces_url if value == "FACES" else value for name, value in wanted.items()}))
    assert said in str(refused.value)
