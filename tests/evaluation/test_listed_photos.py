"""Only the photos that pairs name are embedded, and the pairs are those of the whole list."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lib import storage
from lib.evaluation.listed_photos import photos_and_pairs
from lib.evaluation.pairs import made_pairs
from lib.faces import table
from lib.faces.face_filter import EVERY_FACE
from lib.recognition.embed_worker import Computing, EmbedWorker
from lib.recognition.embedder import load_embedder
from lib.recognition.face_source import FacesSource, faces_source
from tests.training.learnable_faces import write_faces


@pytest.fixture(scope="module")
def many_faces(made_once: Callable[[str, Callable[[Path], object]], Path]) -> str:
    """Return a table of 600 test photos, and some of the other splits."""
    people = {"train": 4, "val": 4, "test": 30}
    return str(made_once("many faces é", lambda folder: write_faces(folder, people=people, photos=20)))


def rows_of(source: FacesSource) -> list[dict]:
    """Return photo and identity of every row of a source's files, in order."""
    names = ["photo", "identity"]
    return [
        row
        for file_name in source.file_names
        for row in storage.read_parquet(storage.join(source.url, file_name), table.columns(*names)).to_pylist()
    ]


def embedded(source: FacesSource, model_url: str, output: Path) -> list[str]:
    """Return the photos of the rows that the worker of embed writes for the items of a source."""
    embedder = load_embedder(model_url)
    about = {"digest": embedder.digest, "embedding_dim": embedder.embedding_dim, "template": embedder.template}
    worker = EmbedWorker((model_url, None, embedder.flip), str(output), None, source.fingerprint, about, Computing())
    photos = []
    for item, (name,), num_rows in source.items(embedder.digest):
        assert worker(item) | {"seconds": 0, "node": ""} == {
            "count": num_rows,
            "copied": 0,
            "failure": "",
            "seconds": 0,
            "node": "",
        }
        photos += storage.read_parquet(storage.join(str(output), name))["photo"].to_pylist()
    return photos


def test_of_made_pairs_only_the_photos_in_them_are_embedded(many_faces: str, model_url: str, tmp_path: Path) -> None:
    source = faces_source(many_faces, ["test"])
    photos, pairs, (chosen,) = photos_and_pairs([source], None, EVERY_FACE, num_pairs=40, seed=3)
    rows = rows_of(source)
    whole = made_pairs([row["photo"] for row in rows], [row["identity"] for row in rows], num_pairs=40, seed=3)
    for side in ("a_P", "b_P"):
        assert [photos.names[n] for n in getattr(pairs, side)] == [rows[n]["photo"] for n in getattr(whole, side)]
    np.testing.assert_array_equal(pairs.same_P, whole.same_P)
    np.testing.assert_array_equal(pairs.fold_P, whole.fold_P)

    assert isinstance(chosen, FacesSource)
    assert set(photos.names) == {photos.names[n] for n in np.concatenate([pairs.a_P, pairs.b_P])}
    assert len(photos.names) <= 80 < len(rows) == 600
    assert embedded(chosen, model_url, tmp_path / "few") == photos.names
    named = {row["photo"]: row["identity"] for row in rows}
    assert photos.identities == [named[name] for name in photos.names]
    assert set(photos.splits) == {"test"}


def test_the_whole_split_is_embedded_where_it_is_asked_for(many_faces: str) -> None:
    source = faces_source(many_faces, ["test"])
    photos, pairs, (chosen,) = photos_and_pairs([source], None, EVERY_FACE, num_pairs=40, seed=3, whole_split=True)
    assert isinstance(chosen, FacesSource)
    assert sum(chosen.num_rows) == len(photos.names) == 600
    fewer, same_pairs, _ = photos_and_pairs([source], None, EVERY_FACE, num_pairs=40, seed=3)
    assert [photos.names[n] for n in pairs.a_P] == [fewer.names[n] for n in same_pairs.a_P]


def test_of_a_list_only_its_photos_are_embedded_whatever_their_split(
    many_faces: str, model_url: str, tmp_path: Path
) -> None:
    source = faces_source(many_faces, table.SPLITS)
    rows = rows_of(source)
    a, b, c = rows[2]["photo"], rows[400]["photo"], rows[-1]["photo"]
    (tmp_path / "pairs.csv").write_text(f"photo_a,photo_b,same\n{c},{a},0\n{a},{b},0\n{b},gone.jpg,1\n")
    photos, pairs, (chosen,) = photos_and_pairs([source], str(tmp_path / "pairs.csv"), EVERY_FACE, num_pairs=40, seed=3)
    assert photos.names == [a, b, c]
    assert [(photos.names[m], photos.names[n]) for m, n in zip(pairs.a_P, pairs.b_P, strict=True)] == [(c, a), (a, b)]
    assert pairs.missing_photos == ("gone.jpg",)
    assert isinstance(chosen, FacesSource)
    assert embedded(chosen, model_url, tmp_path / "three") == [a, b, c]


def test_other_pairs_are_other_files_and_the_same_pairs_the_same(many_faces: str) -> None:
    source = faces_source(many_faces, ["test"])

    def files(seed: int, num_pairs: int = 40) -> list[str]:
        chosen = photos_and_pairs([source], None, EVERY_FACE, num_pairs=num_pairs, seed=seed)[2][0]
        return [name for _, names, _ in chosen.items("model") for name in names]

    assert files(3) == files(3)
    assert not set(files(3)) & set(files(4))
    whole = [name for _, names, _ in source.items("model") for name in names]
    assert not set(files(3)) & set(whole)
