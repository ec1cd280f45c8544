"""`jobs/curate.py` as a user runs it: proposals and their page, decisions applied, and a table that changed since."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import storage
from lib.curation.changes import changes_table, digest_of_table, write_about
from lib.curation.curate_job import CurateConfig, curate
from lib.errors import UserError
from lib.faces.preprocess_config import PreprocessConfig
from lib.faces.preprocess_job import preprocess
from lib.recognition.embed_job import EmbedConfig, embed_job
from tests.job_runner import RayHead, run_job


@pytest.fixture(scope="module")
def strayed(aligned: list[dict]) -> tuple[str, str, str]:
    """Return a photo that looks like another person, its identity, and that person."""
    first, *others = (row for row in aligned if row["identity"] is not None)
    other = next(row for row in others if row["identity"] != first["identity"])
    return first["photo"], first["identity"], other["identity"]


@pytest.fixture(scope="module")
def embeddings_url(
    connected_head: RayHead,
    model_url: str,
    faces_url: str,
    strayed: tuple[str, str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """Return embeddings in which each person has a direction, and one photo that of another person."""
    output = tmp_path_factory.mktemp("embeddings é") / "m"
    embed_job(EmbedConfig(model=model_url, faces=faces_url, output=str(output)))
    rng = np.random.default_rng(0)
    people: dict[str, np.ndarray] = {}
    sizes = {}
    for path in sorted(output.rglob("*.parquet")):
        rows = pq.read_table(path)
        vectors: list[list[float] | None] = []
        for row in rows.to_pylist():
            person = strayed[2] if row["photo"] == strayed[0] else row["identity"]
            vector_D = people.setdefault(person, rng.normal(size=16)) + 0.2 * rng.normal(size=16)
            has_face = row["embedding"] is not None
            vectors.append((vector_D / np.linalg.norm(vector_D)).tolist() if has_face else None)
        at = rows.schema.get_field_index("embedding")
        field = rows.schema.field(at)
        pq.write_table(rows.set_column(at, field, pa.array(vectors, field.type)), path)
        sizes[str(path.relative_to(output))] = path.stat().st_size
    success = json.loads((output / "_SUCCESS").read_text())
    (output / "_SUCCESS").write_text(json.dumps({**success, "parts": sizes}))
    return str(output)


@pytest.fixture
def data(sample_data: Path, faces_url: str, tmp_path: Path) -> Path:
    """Return a folder with photos, identities and faces of its own."""
    folder = tmp_path / "my data é"
    folder.mkdir()
    (folder / "photos").symlink_to(sample_data / "photos")
    shutil.copy(sample_data / "identities.txt", folder / "identities.txt")
    shutil.copytree(faces_url, folder / "faces")
    return folder


def test_a_wrong_label_is_found_reviewed_and_corrected(
    connected_head: RayHead, model_url: str, embeddings_url: str, strayed: tuple[str, str, str], data: Path
) -> None:
    photo, identity, person = strayed
    flags = ("--data", str(data), "--model", model_url)
    done = run_job(
        "curate.py", *flags, "--embeddings", embeddings_url, "--threshold", "0.7", extra=connected_head.environment
    )
    assert done.status == 0, done.errors
    rows = pq.read_table(data / "curation" / "curation.parquet").to_pylist()
    (found,) = [row for row in rows if row["kind"] == "relabel"]
    assert (found["photos"], found["identity"], found["to_identity"]) == ([photo], identity, person)
    assert "look at" in done.errors
    assert b"<img" in (data / "curation" / "curation.html").read_bytes()

    decisions = data / "my decisions.csv"
    decisions.write_text(f"proposal\n{found['proposal']}\n")
    before = (data / "identities.txt").read_bytes()
    planned = curate(CurateConfig(data=str(data), apply=str(decisions), dry_run=True))
    assert (planned["changes"], planned["photos_changed"]) == (1, 1)
    assert (data / "identities.txt").read_bytes() == before
    applied = curate(CurateConfig(data=str(data), apply=str(decisions)))
    assert applied["photos_changed"] == 1
    preprocess(PreprocessConfig(data=str(data)))
    by_photo = {row["photo"]: row["identity"] for row in faces_of(data)}
    assert by_photo[photo] == person
    with pytest.raises(UserError, match="changed since the proposals were made"):
        curate(CurateConfig(data=str(data), apply=str(decisions)))

    shutil.copy(data / "curation" / "identities-before.csv", data / "identities.txt")
    preprocess(PreprocessConfig(data=str(data)))
    assert {row["photo"]: row["identity"] for row in faces_of(data)} == {**by_photo, photo: identity}


def faces_of(data: Path) -> list[dict]:
    """Return the rows of a faces table, but for photos that do not exist."""
    names = json.loads((data / "faces" / "_SUCCESS").read_text())["parts"]
    tables = [pq.ParquetFile(data / "faces" / name).read(["photo", "identity", "status"]) for name in names]
    return [row for row in pa.concat_tables(tables).to_pylist() if row["status"] != "missing"]


@pytest.mark.slow
def test_photos_of_a_test_set_are_found_in_the_faces(
    connected_head: RayHead, model_url: str, faces_url: str, aligned: list[dict], tmp_path: Path
) -> None:
    done = curate(
        CurateConfig(model=model_url, faces=faces_url, against=faces_url, output=str(tmp_path / "out"), threshold=0.1)
    )
    rows = pq.read_table(tmp_path / "out" / "curation.parquet").to_pylist()
    leaked = [row for row in rows if row["in_test_set"]]
    assert done["faces"] == len(aligned)
    assert {row["photos"][0] for row in leaked if row["photos"] == row["evidence"]} == {row["photo"] for row in aligned}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"threshold": 0.0}, "--threshold is 0.0"),
        ({"shown": 0}, "--shown is 0"),
        ({"apply": "a.csv", "apply_over": 0.5}, "--apply and --apply-over are both given"),
        ({"apply_over": 1.5}, "--apply-over is 1.5"),
    ],
)
def test_impossible_flags_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CurateConfig(**flags)


def test_decisions_need_proposals_and_must_be_of_them(faces_url: str, data: Path) -> None:
    decisions = data / "decisions.csv"
    with pytest.raises(UserError, match=r"no proposals in .*curation"):
        curate(CurateConfig(data=str(data), apply=str(decisions)))
    success = json.loads((data / "faces" / "_SUCCESS").read_text())
    write_about(str(data / "curation"), str(data / "faces"), digest_of_table(success))
    storage.write_parquet(str(data / "curation" / "curation.parquet"), changes_table([], [], [], [], [], []))
    for content, message in ((b"x\n1\n", "no list of proposals"), (b"proposal\n7\n", "names proposal 7")):
        decisions.write_bytes(content)
        with pytest.raises(UserError, match=message):
            curate(CurateConfig(data=str(data), apply=str(decisions)))
