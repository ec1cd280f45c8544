"""Decisions become a new list of identities, once; nothing that somebody wrote is lost."""

import json
from pathlib import Path

import pytest

from lib import storage
from lib.curation.apply import EARLIER_NAME, apply_decisions
from lib.curation.changes import (
    CURATION_NAME,
    IDENTITIES_DIGEST,
    changes_table,
    digest_of_list,
    digest_of_table,
    write_about,
)
from lib.curation.curate_job import CurateConfig, curate
from lib.errors import UserError
from lib.faces import table
from tests.curation.test_review import proposal
from tests.training.learnable_faces import write_faces

PHOTO = "person 0/“0”.jpg"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with faces, a list of identities in a dialect of its own, and a proposal for the first photo."""
    folder = tmp_path / "my data é"
    faces_url = write_faces(folder / "faces", people={"train": 2, "val": 1}, photos=2)
    (folder / "identities.txt").write_text(f"# mine\n{PHOTO};person 0\n")
    changes = changes_table([proposal("relabel", [0], 0, 1)], [], [PHOTO], ["train"], ["person 0", "person 1"], [])
    storage.write_parquet(str(folder / "curation" / CURATION_NAME), changes)
    listed = digest_of_list((folder / "identities.txt").read_bytes())
    digest = digest_of_table(table.read_success(faces_url))
    write_about(str(folder / "curation"), faces_url, digest, **{IDENTITIES_DIGEST: listed})
    return folder


def apply(data: Path) -> dict:
    return curate(CurateConfig(data=str(data), apply_over=0.0))


def test_the_list_before_is_kept_byte_for_byte_and_the_same_command_again_changes_nothing(data: Path) -> None:
    before = (data / "identities.txt").read_bytes()
    for _ in range(2):  # as after a kill behind the last write
        assert apply(data)["photos_changed"] == 1
        assert (data / "curation" / EARLIER_NAME).read_bytes() == before
        lines = (data / "identities.txt").read_text().splitlines()
        assert (lines[0], len(lines), lines[1]) == ("photo,identity", 7, f"{PHOTO},person 1")


def test_a_list_that_somebody_edited_since_is_refused_and_left_alone(data: Path) -> None:
    for edited in (b"person 0/x.jpg person 7\n", None):
        if edited is None:
            (data / "identities.txt").unlink()
        else:
            (data / "identities.txt").write_bytes(edited)
        with pytest.raises(UserError, match="changed since the proposals were made, and would be lost"):
            apply(data)
        assert not (data / "curation" / EARLIER_NAME).exists()


def test_a_table_that_changed_since_is_refused_and_nothing_is_written(data: Path) -> None:
    before = (data / "identities.txt").read_bytes()
    success = json.loads((data / "faces" / "_SUCCESS").read_text())
    (data / "faces" / "_SUCCESS").write_text(json.dumps({**success, "run_id": "another"}))
    with pytest.raises(UserError, match="since the proposals were made: run jobs/curate"):
        apply(data)
    assert (data / "identities.txt").read_bytes() == before


def test_proposals_from_before_the_list_was_noted_are_applied(data: Path) -> None:
    about = json.loads((data / "curation" / "curation.json").read_text())
    (data / "curation" / "curation.json").write_text(json.dumps({"faces_digest": about["faces_digest"]}))
    (data / "identities.txt").unlink()
    urls = (str(data / name) for name in ("curation", "faces", "identities.txt"))
    assert apply_decisions(*urls, None, over=0.5, dry_run=False).num_photos == 1
    assert (data / "curation" / EARLIER_NAME).read_text().splitlines()[1] == f"{PHOTO},person 0"
