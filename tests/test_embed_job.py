"""`jobs/embed.py` as a user runs it: from faces and from photos, killed and started again, on S3, with bad input."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lib import storage
from lib.faces import table
from lib.faces.table import FINGERPRINT_KEY
from lib.recognition.embeddings_table import MODEL_KEY, read_embeddings
from lib.recognition.model import embed, load_model, save_model
from lib.recognition.recognizer import decoded_crop
from tests.job_runner import RayHead, kill_session, ray_head, run_job, start_job, wait_until
from tests.s3_server import S3Server

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def head(s3_server: S3Server) -> Iterator[RayHead]:
    """Start a cluster of 3 logical CPUs whose nodes know the bucket's keys."""
    with ray_head(num_cpus=3, extra=s3_server.environment()) as head:
        yield head


def flags(model_url: str, faces_url: str, output: Path | str) -> list[str]:
    return ["--model", model_url, "--faces", faces_url, "--output", str(output)]


def digests(folder: Path) -> dict[str, str]:
    parts = sorted(folder.glob("split=*/*"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in parts}


@pytest.fixture(scope="module")
def undisturbed(
    head: RayHead, model_url: str, faces_url: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """Return the embeddings of the drawn people, and what the job said."""
    output = tmp_path_factory.mktemp("embeddings é") / "all"
    done = run_job("embed.py", *flags(model_url, faces_url, output), extra=head.environment)
    assert done.status == 0, done.errors
    return output, done.result


def test_every_face_gets_the_embedding_of_its_crop(
    undisturbed: tuple[Path, dict], model_url: str, faces_url: str
) -> None:
    output, result = undisturbed
    made = read_embeddings(str(output))
    model = load_model(model_url)
    faces = {
        row["photo"]: row
        for path in Path(faces_url).glob("split=*/*")
        for row in pq.ParquetFile(path).read().to_pylist()
    }
    assert sorted(made.photos) == sorted(faces)
    assert result["rows"] == result["rows_processed"] == len(faces)
    assert result["aligned"] == sum(row["status"] == table.ALIGNED for row in faces.values())
    for index, photo in enumerate(made.photos):
        row = faces[photo]
        assert (made.identities[index], made.statuses[index]) == (row["identity"], row["status"])
        assert made.failed_N[index] == (row["crop"] is None)
        if row["crop"] is not None:
            expected_D = embed(model, decoded_crop(row["crop"])[None])[0]
            np.testing.assert_allclose(made.embeddings_ND[index], expected_D, atol=1e-5)
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


def test_photos_give_the_embeddings_of_their_faces(
    head: RayHead, undisturbed: tuple[Path, dict], sample_data: Path, model_url: str, tmp_path: Path
) -> None:
    photos = ["--photos", str(sample_data / "photos"), "--output", str(tmp_path / "e")]
    done = run_job("embed.py", "--model", model_url, *photos, extra=head.environment)
    assert done.status == 0, done.errors
    assert digests(tmp_path / "e") == digests(undisturbed[0])


def test_after_kill_9_the_same_command_does_what_is_missing(
    head: RayHead, undisturbed: tuple[Path, dict], sample_data: Path, model_url: str, tmp_path: Path
) -> None:
    output = tmp_path / "e"
    arguments = ["--model", model_url, "--photos", str(sample_data / "photos"), "--output", str(output)]
    with start_job("embed.py", *arguments) as job:
        try:
            wait_until(lambda: any(output.glob("split=*/part-*.parquet")), job)
        finally:
            kill_session(job.pid)
    assert not (output / "_SUCCESS").exists()
    again = run_job("embed.py", *arguments, extra=head.environment)
    assert again.status == 0, again.errors
    assert 0 < again.result["rows_processed"] < again.result["rows"]
    assert digests(output) == digests(undisturbed[0])
    third = run_job("embed.py", *arguments)
    assert third.result["rows_processed"] == 0
    assert third.result["aligned"] == undisturbed[1]["aligned"]


def test_embeddings_go_to_the_folder_of_the_run_and_only_the_splits_asked_for(
    head: RayHead, model_url: str, faces_url: str, tmp_path: Path
) -> None:
    save_model(load_model(model_url), str(tmp_path / "runs" / "first" / "model"))
    done = run_job(
        "embed.py", "--data", str(tmp_path), "--faces", faces_url, "--splits", "test", extra=head.environment
    )
    assert done.status == 0, done.errors
    output = tmp_path / "embeddings" / "first"
    assert done.result["embeddings"] == str(output)
    assert {path.parent.name for path in output.glob("*/*.parquet")} == {"split=test"}


def test_a_bucket_holds_model_faces_and_embeddings(
    head: RayHead, s3_bucket: str, undisturbed: tuple[Path, dict], model_url: str, faces_url: str
) -> None:
    for folder, name in ((model_url, "runs/ü 1/model"), (faces_url, "faces")):
        for info in storage.list_files(folder, skip_prefixes=(".",)):
            storage.write_bytes(f"{s3_bucket}/{name}/{info.path}", storage.read_bytes(f"{folder}/{info.path}"))
    done = run_job("embed.py", "--data", s3_bucket, extra=head.environment)
    assert done.status == 0, done.errors
    there = read_embeddings(f"{s3_bucket}/embeddings/ü 1")
    assert np.array_equal(there.embeddings_ND, read_embeddings(str(undisturbed[0])).embeddings_ND)


def test_other_settings_are_refused_unless_they_may_overwrite(
    head: RayHead, model_url: str, faces_url: str, tmp_path: Path
) -> None:
    done = run_job("embed.py", *flags(model_url, faces_url, tmp_path / "e"), "--splits", "val", extra=head.environment)
    assert done.status == 0, done.errors
    torch.manual_seed(1)
    model = load_model(model_url)
    torch.nn.init.normal_(model.head[0].weight)
    save_model(model, str(tmp_path / "other"))
    other = [*flags(str(tmp_path / "other"), faces_url, tmp_path / "e"), "--splits", "val"]
    refused = run_job("embed.py", *other)
    assert refused.status == 2
    assert "model: " in refused.last_error
    replaced = run_job("embed.py", *other, "--overwrite", extra=head.environment)
    assert replaced.status == 0, replaced.errors
    assert replaced.result["rows_processed"] == replaced.result["rows"] > 0


def test_faces_of_another_fingerprint_are_warned_of_or_refused(model_url: str, faces_url: str, tmp_path: Path) -> None:
    model = load_model(model_url)
    model.spec = dataclasses.replace(model.spec, fingerprint={**model.spec.fingerprint, "eye_height": 0.5})
    save_model(model, str(tmp_path / "model"))
    arguments = [*flags(str(tmp_path / "model"), faces_url, tmp_path / "e"), "--dry-run"]
    warned = run_job("embed.py", *arguments)
    assert warned.status == 0, warned.errors
    assert "eye_height: 0.4 here, 0.5 there" in warned.errors
    assert not (tmp_path / "e").exists()
    refused = run_job("embed.py", *arguments, "--strict")
    assert refused.status == 2
    assert "eye_height: 0.4 here, 0.5 there" in refused.last_error


def test_a_model_that_gives_nan_ends_the_job_in_one_line(
    head: RayHead, model_url: str, faces_url: str, tmp_path: Path
) -> None:
    model = load_model(model_url)
    torch.nn.init.constant_(model.head[0].weight, 3e38)  # finite itself, but no product with it is
    save_model(model, str(tmp_path / "model"))
    ended = run_job("embed.py", *flags(str(tmp_path / "model"), faces_url, tmp_path / "e"), extra=head.environment)
    assert ended.status == 1
    assert "gives NaN or infinity" in ended.last_error
    assert "Traceback" not in ended.errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no run in"),
        (["--model", "/nowhere/model"], "no model at '/nowhere/model'"),
        (["--model", "MODEL"], "no finished faces at"),
        (["--model", "MODEL", "--faces", "FACES", "--photos", "/p"], "both given"),
        (["--model", "MODEL", "--photos", "/nowhere/photos"], "/nowhere/photos is not there"),
        (["--model", "MODEL", "--faces", "FACES", "--splits", "tset"], "--splits is tset"),
        (["--model", "MODEL", "--faces", "FACES", "--gpus", "1"], "--gpus is 1, but the cluster has 0"),
        (["--model", "MODEL", "--faces", "FACES", "--output", "/proc/e"], "/proc/e"),
        (["--model", "MODEL", "--faces", "FACES", "--output", "FACES"], "choose another folder"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(
    model_url: str, faces_url: str, tmp_path: Path, arguments: list[str], said: str
) -> None:
    named = {"MODEL": model_url, "FACES": faces_url}
    refused = run_job("embed.py", "--data", str(tmp_path), *(named.get(each, each) for each in arguments))
    assert refused.status == 2, refused.errors
    assert said in refused.last_error
    assert "Traceback" not in refused.errors
    assert refused.output == ""
