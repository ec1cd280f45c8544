"""The photos of a faces table or of a folder, and the pairs to compare.

Shapes: N photos of the source.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lib import storage
from lib.evaluation.model_metrics import Photos, photos_of
from lib.evaluation.pair_files import read_pairs
from lib.evaluation.pairs import Pairs, made_pairs
from lib.evaluation.set_figures import linked_people
from lib.faces import table
from lib.faces.face_filter import FaceFilter
from lib.faces.manifest import Manifest
from lib.parts import split_in
from lib.recognition.face_source import FacesSource, PhotosSource, Source

_READERS = 16
"""Threads that read parts, to hide the latency of a bucket."""
_COLUMNS = ("photo", "identity", "status", "split")


def photos_and_pairs(
    sources: Sequence[Source],
    pairs_url: str | None,
    within: FaceFilter,
    *,
    num_pairs: int,
    seed: int,
    whole_split: bool = False,
) -> tuple[Photos, Pairs, list[Source]]:
    """Return the photos in pairs, their pairs, and the sources reduced to these photos.

    Faces that are not `within` are left out of the pairs. Without a file of pairs, `num_pairs` are made. With
    `whole_split`, the result then holds all photos that pairs could be made of.

    Raises:
        UserError: as `read_pairs` and `made_pairs` do.
    """
    if pairs_url is not None:
        photos, (pairs,), sources = photos_and_lists(sources, [pairs_url], within, seed=seed)
        return photos, pairs, sources
    listed = _listed(sources[0], within)
    is_out_N = _in_no_pair(sources[0], listed).to_numpy()
    taken, places_N = listed.filter(pa.array(~is_out_N)), np.flatnonzero(~is_out_N)
    pairs = made_pairs(taken["photo"], taken["identity"], num_pairs=num_pairs, seed=seed)
    if is_out_N.any():
        pairs = _with_note(pairs, _note(listed, is_out_N, "are in no pair"))
    if whole_split:
        photos = photos_of(*(taken[name].to_pylist() for name in ("photo", "identity", "split")))
        return photos, pairs, [_only(source, places_N) for source in sources]
    photos, (pairs,), places_N = _used(taken, places_N, [pairs])
    return photos, pairs, [_only(source, places_N) for source in sources]


def photos_and_lists(
    sources: Sequence[Source], urls: Sequence[str], within: FaceFilter, *, seed: int
) -> tuple[Photos, list[Pairs], list[Source]]:
    """Return the photos in the pairs of several files, the pairs of each, and the sources reduced to these photos.

    Raises:
        UserError: as `read_pairs` does.
    """
    listed = _listed(sources[0], within)
    is_out_N = pc.fill_null(pc.equal(listed["status"], _not_within(within)), False).to_numpy()
    taken, places_N = listed.filter(pa.array(~is_out_N)), np.flatnonzero(~is_out_N)
    lists = [read_pairs(url, taken["photo"], seed=seed) for url in urls]
    if is_out_N.any():
        lists[0] = _with_note(lists[0], _note(listed, is_out_N, "are left out"))
    photos, lists, places_N = _used(taken, places_N, lists)
    return photos, lists, [_only(source, places_N) for source in sources]


def _with_note(pairs: Pairs, note: str) -> Pairs:
    return replace(pairs, note="; ".join(filter(None, [pairs.note, note])))


def _used(
    taken: pa.Table, places_N: NDArray[np.int64], lists: Sequence[Pairs]
) -> tuple[Photos, list[Pairs], NDArray[np.int64]]:
    """Return the photos that are in pairs, the pairs as indices into them, and their places in the list.

    If identities contradict the pairs, as when all photos lie in one folder, they are ignored: then two photos show one
    person if same pairs join them.
    """
    used_M = np.unique(np.concatenate([side_P for pairs in lists for side_P in (pairs.a_P, pairs.b_P)]))
    lists = [
        replace(pairs, a_P=np.searchsorted(used_M, pairs.a_P), b_P=np.searchsorted(used_M, pairs.b_P))
        for pairs in lists
    ]
    taken = taken.take(pa.array(used_M))
    photos = photos_of(*(taken[name].to_pylist() for name in ("photo", "identity", "split")))
    if any(np.any(~each.same_P & (photos.people_N[each.a_P] == photos.people_N[each.b_P])) for each in lists):
        a_S, b_S = (np.concatenate([getattr(each, side)[each.same_P] for each in lists]) for side in ("a_P", "b_P"))
        photos = replace(photos, people_N=linked_people(a_S, b_S, len(used_M)))
    return photos, lists, places_N[used_M]


def _in_no_pair(source: Source, listed: pa.Table) -> pa.ChunkedArray:
    """Return which photos are left out of the pairs that are made.

    A raw photo without a face stays in and counts as an error, because the model should have found the face. With a
    faces table the model alone is tested, so photos without a face are left out and reported.
    """
    if isinstance(source, FacesSource):
        is_out = pc.not_equal(listed["status"], table.ALIGNED)
    else:
        is_out = pc.is_in(listed["status"], pa.array([table.MISSING, table.NO_IDENTITY]))
    return pc.or_(pc.is_null(listed["identity"]), pc.fill_null(is_out, False))


def _note(listed: pa.Table, is_out_N: NDArray[np.bool_], what: str) -> str:
    statuses = pc.fill_null(listed["status"].filter(pa.array(is_out_N)), "of nobody known")
    counts = sorted((each["values"], each["counts"]) for each in pc.value_counts(statuses).to_pylist())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
    return f"{is_out_N.sum()} of {len(listed)} photos {what} ({reasons})"


def _only(source: Source, places_N: NDArray[np.int64]) -> Source:
    """Return a source with only the photos at these places of its list, given in rising order."""
    if isinstance(source, PhotosSource):
        photos = source.manifest.photos.take(pa.array(places_N))
        manifest = Manifest.of(photos, source.manifest.num_bytes, source.manifest.num_passed_over)
        return replace(source, manifest=manifest)
    stop_F = np.cumsum(source.num_rows)
    in_file = np.split(places_N, np.searchsorted(places_N, stop_F[:-1]))
    first_F = stop_F - source.num_rows
    files = zip(source.file_names, first_F, in_file, strict=True)
    return source.only({name: (places - first).tolist() for name, first, places in files})


def _not_within(taken: FaceFilter) -> str:
    return f"not within {taken}"


def _listed(source: Source, taken: FaceFilter) -> pa.Table:
    """Return photo, identity, status (if known) and split of every photo of a source.

    Aligned faces that are left out have a status that says so.
    """
    if isinstance(source, PhotosSource):
        return source.manifest.photos.select(_COLUMNS)
    with ThreadPoolExecutor(_READERS) as pool:
        parts = list(pool.map(lambda name: _listed_part(source.url, name, taken), source.file_names))
    return pa.concat_tables(parts).unify_dictionaries()


def _listed_part(url: str, name: str, taken: FaceFilter) -> pa.Table:
    part = _read_part(storage.join(url, name), taken)
    splits = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(part), np.int8)), pa.array([split_in(name)]))
    return part.append_column("split", splits)


def _read_part(url: str, taken: FaceFilter) -> pa.Table:
    with storage.open_parquet(url, table.columns("photo", "identity", "status")) as file:
        taken.check(file.schema_arrow, storage.redacted(url))
        rows = file.read(columns=["photo", "identity", "status", *taken.columns])
    if taken:
        is_out = pc.and_(pc.equal(rows["status"], table.ALIGNED), pc.invert(taken.keeps(rows)))
        rows = rows.set_column(2, "status", pc.if_else(is_out, _not_within(taken), rows["status"]))
    return rows.select(["photo", "identity", "status"])
