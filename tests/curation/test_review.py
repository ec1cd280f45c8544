"""From proposals to a new list of identities: the table, the page, the decisions, and what they change."""

import csv
import html
import io
import re
import urllib.parse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from lib.curation import page
from lib.curation.apply import changed, identities_csv
from lib.curation.changes import SCHEMA, changes_table
from lib.curation.duplicates import duplicates, light_pattern, near_pairs
from lib.curation.neighbour_graph import near_faces
from lib.curation.proposals import NOBODY, Proposal
from lib.faces.identities import read_identities
from lib.faces.images import to_jpeg
from lib.faces.photo_database import PhotoDatabase, columns_of
from lib.faces.sources.source import SCAN_SCHEMA
from tests.browser import document
from tests.faces.test_quality import drawn_crop


def proposal(kind: str, faces: list[int], identity: int, to: int | None, evidence: tuple[int, ...] = ()) -> Proposal:
    """Return a proposal that is fairly certain."""
    return Proposal(
        kind=kind,
        certainty=0.75,
        faces=np.array(faces),
        identity=identity,
        to=to,
        evidence=np.array(evidence, np.int64),
        distance=0.5,
    )


NAMES = ["Ann", "Ann~2", "Bob <b>", "=Cy"]
PHOTOS = [f"ph {n},é.jpg" for n in range(8)]
SPLITS = ["train"] * 4 + ["test"] * 4


@pytest.fixture
def changes() -> pa.Table:
    """Return one proposal of each kind."""
    found = [
        proposal("relabel", [0], 0, 2, (4, 5)),
        proposal("merge", [2, 3], 2, 3),
        proposal("split", [4], 0, None),
        proposal("outlier", [5], 0, NOBODY),
        proposal("assign", [6], NOBODY, 0),
        proposal("new", [6, 7], NOBODY, None),
        proposal("duplicate", [1], 0, NOBODY, (7,)),
    ]
    return changes_table(found, [proposal("duplicate", [2], 2, NOBODY, (1,))], PHOTOS, SPLITS, NAMES, ["t0", "t1"])


def test_the_table_names_everything_and_new_identities_are_new(changes: pa.Table) -> None:
    rows = changes.to_pylist()
    assert changes.schema.equals(SCHEMA)
    assert [row["proposal"] for row in rows] == list(range(8))
    targets = [row["to_identity"] for row in rows]
    assert targets == ["Bob <b>", "=Cy", "Ann~3", None, "Ann", "person-7", None, None]
    assert rows[0]["evidence"] == [PHOTOS[4], PHOTOS[5]]
    assert rows[0]["splits"] == ["test", "train"]
    assert (rows[7]["evidence"], rows[7]["in_test_set"], rows[7]["splits"]) == (["t1"], True, ["train"])


def test_a_browser_shows_the_proposals_and_saves_the_ticked_ones(changes: pa.Table, tmp_path: Path) -> None:
    crop = to_jpeg(np.ascontiguousarray(drawn_crop(0)[:, :, ::-1]), 90)
    rows = page.shown_rows(changes, 5)
    assert page.photos_shown(rows, against=True) == {"t1"}
    made = page.html("faces", changes, rows, dict.fromkeys(PHOTOS, crop), {"t1": crop})
    press = b"""<script>HTMLAnchorElement.prototype.click = function () { document.title = this.href + this.download; };
    document.getElementById("p3").click(); document.getElementById("save").click();</script></body>"""
    seen = document(made.replace(b"</body>", press), tmp_path)
    assert seen.count("<img") == 14
    assert "Bob &lt;b&gt;" in seen
    assert "7 ticked" in seen
    title = html.unescape(re.findall("<title>(.*?)</title>", seen, re.DOTALL)[0])
    head, _, saved = urllib.parse.unquote(title).partition(",")
    assert head == "data:text/csv;charset=utf-8"
    assert saved == "proposal\n0\n1\n2\n4\n5\n6\n7\ndecisions.csv"


def test_only_the_first_proposals_of_a_kind_are_shown() -> None:
    found = [proposal("outlier", [n], 0, NOBODY) for n in range(8)]
    table = changes_table(found, [], PHOTOS, SPLITS, NAMES, [])
    assert len(page.shown_rows(table, 3)) == 3
    assert b"The first 3 of" in page.html("faces", table, page.shown_rows(table, 3), {}, {})


def accepted(kind: str, photos: list[str], identity: str | None, to: str | None) -> dict[str, Any]:
    """Return a row of accepted proposals."""
    return {"kind": kind, "photos": photos, "identity": identity, "to_identity": to}


def test_changes_of_the_same_photos_follow_each_other() -> None:
    before = {"a": "A", "a2": "A", "b": "B", "c": "C", "d": None, "e": "B"}
    after = changed(
        before,
        [
            accepted("duplicate", ["e"], "B", None),
            accepted("merge", ["a", "a2"], "A", "B"),
            accepted("merge", ["b"], "B", "C"),
            accepted("assign", ["d"], None, "A"),
        ],
    )
    assert after == {"a": "C", "a2": "C", "b": "C", "c": "C", "d": "C", "e": None}
    assert changed(before, []) == before


def test_two_identities_that_are_merged_into_each_other_come_to_an_end() -> None:
    after = changed({"a": "A", "b": "B"}, [accepted("merge", ["a"], "A", "B"), accepted("merge", ["b"], "B", "A")])
    assert len(set(after.values())) <= 2


def test_the_list_is_read_back_as_it_was_meant(tmp_path: Path) -> None:
    identities = {"a b.jpg": "Ann, the first", 'q"uote.jpg': "Bob", "x/é.jpg": None, "plain.jpg": "C"}
    (tmp_path / "identities.txt").write_bytes(identities_csv(identities))
    database = PhotoDatabase()
    database.run(f"create table scanned ({columns_of(SCAN_SCHEMA)}, place bigint)")
    nothing = {field.name: pa.nulls(len(identities), field.type) for field in SCAN_SCHEMA}
    database.append(
        "scanned", pa.table({**nothing, "photo": pa.array(identities, pa.string()), "place": range(len(identities))})
    )
    url = str(tmp_path / "identities.txt")
    read_identities(url, database, photos_url="/photos", min_listed_share=0.5)
    assert dict(database.rows("select photo, identity from listed")) == identities
    assert next(csv.reader(io.StringIO(identities_csv(identities).decode()))) == ["photo", "identity"]


def recompressed(crop: np.ndarray) -> bytes:
    """Return a crop at half of its size and back, one pixel aside, with coarse compression."""
    moved = np.roll(cv2.resize(cv2.resize(crop, (120, 120), interpolation=cv2.INTER_AREA), (240, 240)), 1, axis=1)
    return to_jpeg(np.ascontiguousarray(moved[:, :, ::-1]), 50)


def test_copies_of_a_picture_are_found_and_other_pictures_are_not() -> None:
    crops = {f"{n}.jpg": to_jpeg(np.ascontiguousarray(drawn_crop(n)[:, :, ::-1]), 95) for n in range(6)}
    crops |= {f"copy of {n}.jpg": recompressed(drawn_crop(n)) for n in range(2)}
    photos = list(crops)
    every_pair = np.array([(a, b) for b in range(8) for a in range(b)])
    found = duplicates(every_pair, np.zeros(len(every_pair)), photos, np.zeros(8, np.int64), crops.items())
    assert [(each.evidence.tolist(), each.faces.tolist()) for each in found] == [([0], [6]), ([1], [7])]
    assert all(0 < each.certainty < 1 for each in found)
    assert light_pattern(crops["0.jpg"]).shape == (256,)


def test_near_pairs_are_each_pair_once_within_one_set_and_between_two() -> None:
    vectors_ND = np.array([[0, 0], [0, 1], [5, 5], [0, 1.5], [0, 0]], np.float32)
    pairs_P2, distances_P = near_faces(vectors_ND, 3).within(1.2)
    assert pairs_P2.tolist() == [[0, 1], [0, 4], [1, 3], [1, 4]]
    assert distances_P == pytest.approx([1, 0, 0.5, 1])
    pairs_P2, _ = near_pairs(vectors_ND, np.array([[5, 5], [9, 9]], np.float32), 0.6)
    assert pairs_P2.tolist() == [[2, 0]]
    assert len(near_pairs(np.empty((0, 2), np.float32), vectors_ND, 1.0)[0]) == 0
    assert len(near_faces(np.empty((0, 2), np.float32), 1.0).pairs_P2) == 0
