"""Writes the matches of one group of probes, once all shards of the gallery are searched for it.

Shapes: N rows of the probes of a group, B of them with a face, K matches of each.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lib import storage
from lib.part_workers import summary
from lib.recognition.embeddings_table import read_part
from lib.recognition.gallery import hashes_of, names_of, parts_of
from lib.recognition.gallery_search import Found, SearchPlan, found_for
from lib.recognition.matches import SHEET_FACES, Matches, matches_csv

_NAME = re.compile(r"matches(-\d{5,})?\.(parquet|csv)")


@dataclass(frozen=True, kw_only=True)
class MatchPlan:
    """How the matches of a search are written.

    Attributes:
        output: folder of the matches.
        threshold: the largest distance of the same person.
        with_names: the probes have identities, to measure by.
        several: each face of a photo is a probe, `photo#n`.
    """

    search: SearchPlan
    output: str
    threshold: float
    with_names: bool
    several: bool

    def file_name(self, group: int, suffix: str) -> str:
        """Return the name of the file of a group: without a number where there is one group."""
        return f"matches.{suffix}" if len(self.search.groups) == 1 else f"matches-{group:05d}.{suffix}"

    def counts_url(self, group: int) -> str:
        """Return the file with the counts of a group, which says that its matches are written."""
        return storage.join(self.search.url, f"counts-{group:05d}.json")

    def named_url(self, group: int) -> str:
        """Return the file with what is measured of a group."""
        return storage.join(self.search.url, f"named-{group:05d}.parquet")


def left_to_write(plan: MatchPlan) -> list[int]:
    """Return the groups whose matches are not written yet, after removing what earlier searches left of them."""
    there = {info.path for info in storage.list_files(plan.search.url, suffix=".json")}
    left = [n for n in range(len(plan.search.groups)) if plan.counts_url(n).rpartition("/")[2] not in there]
    written = set(range(len(plan.search.groups))) - set(left)
    kept = {plan.file_name(group, suffix) for group in written for suffix in ("parquet", "csv")}
    files, _ = storage.children(plan.output)
    for name in files:
        if _NAME.fullmatch(name) and name not in kept:
            storage.remove(storage.join(plan.output, name))
    return left


class MatchWorker:
    """Writes the matches of groups, each as a table and a CSV file."""

    def __init__(self, plan: MatchPlan) -> None:
        self._plan = plan

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Write the matches of one group, and return its summary."""
        return summary(self.write, item)

    def write(self, item: dict[str, Any]) -> tuple[int, int]:
        """Write the matches and the counts of one group, and return its number of rows."""
        plan, search, group = self._plan, self._plan.search, item["group"]
        parts = [_without_vectors(url, search.model) for url in search.group_parts(group)]
        probes = pa.concat_tables([rows for rows, _ in parts])
        has_face_N = np.concatenate([has_face for _, has_face in parts])
        found = found_for(search, group)
        names = names_of(found[0], lambda part: search.known_part(part, ["photo", "identity"]), ("photo", "identity"))
        matches = Matches(probes, has_face_N, names["identity"], names["photo"], found[1], plan.threshold)
        table = matches.table()
        storage.write_parquet(storage.join(plan.output, plan.file_name(group, "parquet")), table)
        storage.write_bytes(storage.join(plan.output, plan.file_name(group, "csv")), matches_csv(table))
        counts = {
            "rows": len(probes),
            "faces": len(found[0]),
            "unknown": int(matches.is_unknown.sum()),
            "shown_parts": [search.gallery_parts[part] for part in parts_of(found[0][:SHEET_FACES])],
        }
        if plan.with_names:
            named, counted = named_probes(probes, has_face_N, names["identity"], found, several=plan.several)
            storage.write_parquet(plan.named_url(group), named)
            counts |= counted
        storage.write_json(plan.counts_url(group), counts)
        return len(probes), 0


def named_probes(
    probes: pa.Table, has_face_N: NDArray[np.bool_], identity_BK: NDArray[np.object_], found: Found, *, several: bool
) -> tuple[pa.Table, dict[str, int]]:
    """Return hashes of who the probes are and of who is nearest, the distance, and how many photos do not count.

    With `several`, each face of a photo is a probe. Photos with several faces are left out, because the list does not
    say which face the name belongs to. All faces of a photo are in one group.
    """
    # The names of a photo's faces end in #0, #1 and so on.
    photo_N = [
        name.rpartition("#")[0] if several and has_face else name
        for name, has_face in zip(probes["photo"].to_pylist(), has_face_N, strict=True)
    ]
    num_faces = Counter(photo_N)
    is_named_N = probes["identity"].is_valid().to_numpy()
    is_kept_N = is_named_N & np.array([num_faces[photo] == 1 for photo in photo_N], bool)
    distance_N = np.full(len(probes), np.inf, np.float32)
    distance_N[has_face_N] = found[1][:, 0]
    nearest_N = np.zeros(len(probes), np.uint64)
    nearest_N[has_face_N] = hashes_of(pa.array(identity_BK[:, 0], pa.string()))
    person_N = hashes_of(probes["identity"])
    columns: dict[str, NDArray[Any]] = {"person": person_N, "nearest": nearest_N, "distance": distance_N}
    num_named = len({photo for photo, is_named in zip(photo_N, is_named_N, strict=True) if is_named})
    counts = {
        "photos_of_several_faces": num_named - int(is_kept_N.sum()),
        "photos_without_name": len(num_faces) - num_named,
    }
    return pa.table({name: values[is_kept_N] for name, values in columns.items()}), counts


def _without_vectors(url: str, model: dict[str, Any]) -> tuple[pa.Table, NDArray[np.bool_]]:
    """Return the rows of a part, and which of them have an embedding."""
    rows = read_part(url, model, ["photo", "identity", "status", "box", "embedding"])
    return rows.drop_columns(["embedding"]), rows["embedding"].is_valid().to_numpy()
