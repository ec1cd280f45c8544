"""The photos of a faces table or of a folder, and which of them are compared with which.

Shapes: N photos of the source.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lib import storage
from lib.evaluation.model_metrics import Photos, photos_of
from lib.evaluation.pair_files import read_pairs
from lib.evaluation.pairs import Pairs, made_pairs
from lib.faces import table
from lib.faces.face_filter import FaceFilter
from lib.faces.manifest import Manifest
from lib.parts import split_in
from lib.recognition.face_source import FacesSource, PhotosSource, Source

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
    """Return the photos in pairs, their pairs, and the sources with these photos alone.

    Faces that are not `within` are in no pair. Without a file of pairs, `num_pairs` are made; with `whole_split` the
    photos are then all that could be in pairs.

    Raises:
        UserError: as `read_pairs` and `made_pairs` do.
    """
    listed = _listed(sources[0], within)
    left_out = _in_no_pair(sources[0], listed) if pairs_url is None else pc.equal(listed["status"], _not_within(within))
    is_out_N = pc.fill_null(left_out, False).to_numpy()
    places_N = np.flatnonzero(~is_out_N)
    taken = listed.filter(pa.array(~is_out_N))
    if pairs_url is None:
        pairs = made_pairs(taken["photo"], taken["identity"], num_pairs=num_pairs, seed=seed)
        note = _note(listed, is_out_N, "are in no pair") if is_out_N.any() else ""
    else:
        pairs = read_pairs(pairs_url, taken["photo"], seed=seed)
        note = _note(listed, is_out_N, "are left out") if is_out_N.any() else ""
    pairs = replace(pairs, note="; ".join(filter(None, [pairs.note, note])))
    if not whole_split:
        used_M = np.unique(np.concatenate([pairs.a_P, pairs.b_P]))
        pairs = replace(pairs, a_P=np.searchsorted(used_M, pairs.a_P), b_P=np.searchsorted(used_M, pairs.b_P))
        taken, places_N = taken.take(pa.array(used_M)), places_N[used_M]
    photos = photos_of(*(taken[name].to_pylist() for name in ("photo", "identity", "split")))
    return photos, pairs, [_only(source, places_N) for source in sources]


def _in_no_pair(source: Source, listed: pa.Table) -> pa.ChunkedArray:
    """Return which photos no pair is made of.

    A raw photo without a face counts as an error, because the model should have found the face. A faces table tests the
    model alone; photos that are in no pair are reported.
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
    """Return a source with the photos at these places of its list, rising, alone."""
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

    The status of aligned faces that are left out says so.
    """
    if isinstance(source, PhotosSource):
        return source.manifest.photos.select(_COLUMNS)
    parts = []
    for name in source.file_names:
        part = _read_part(storage.join(source.url, name), taken)
        splits = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(part), np.int8)), pa.array([split_in(name)]))
        parts.append(part.append_column("split", splits))
    return pa.concat_tables(parts).unify_dictionaries()


def _read_part(url: str, taken: FaceFilter) -> pa.Table:
    with storage.open_parquet(url, table.columns("photo", "identity", "status")) as file:
        taken.check(file.schema_arrow, storage.redacted(url))
        rows = file.read(columns=["photo", "identity", "status", *taken.columns])
    if taken:
        is_out = pc.and_(pc.equal(rows["status"], table.ALIGNED), pc.invert(taken.keeps(rows)))
        rows = rows.set_column(2, "status", pc.if_else(is_out, _not_within(taken), rows["status"]))
    return rows.select(["photo", "identity", "status"])
