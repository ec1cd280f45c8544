"""The photos of a faces table or of a folder, and which of them are compared with which."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.evaluation.model_metrics import Photos, photos_of
from lib.evaluation.pair_files import read_pairs
from lib.evaluation.pairs import Pairs, made_pairs
from lib.faces import table
from lib.faces.face_filter import FaceFilter
from lib.faces.manifest import Manifest
from lib.parts import split_in
from lib.recognition.face_source import FacesSource, PhotosSource, Source


def photos_and_pairs(
    sources: list[Source], pairs_url: str | None, within: FaceFilter, *, num_pairs: int, seed: int
) -> tuple[Photos, Pairs, list[Source]]:
    """Return the photos, their pairs, and the sources without photos that are in no pair, where that is cheap.

    Faces that are not `within` are in no pair. Without a file of pairs, `num_pairs` are made.

    Raises:
        UserError: as `read_pairs` and `made_pairs` do.
    """
    names, identities, statuses, splits = _listed(sources[0], within)
    if pairs_url is None:
        # A raw photo without a face counts as an error, because the model should have found the face. A faces table
        # tests the model alone; photos that are in no pair are reported.
        is_cut_out = isinstance(sources[0], FacesSource)
        left_out = {table.MISSING, table.NO_IDENTITY} if not is_cut_out else set(statuses) - {table.ALIGNED}
        taken = [
            n
            for n, (identity, status) in enumerate(zip(identities, statuses, strict=True))
            if identity is not None and status not in left_out
        ]
        photos = photos_of([names[n] for n in taken], [identities[n] for n in taken], [splits[n] for n in taken])
        people = [str(identities[n]) for n in taken]
        pairs = made_pairs(photos.names, people, num_pairs=num_pairs, seed=seed)
        if len(taken) < len(names):
            unused = Counter(statuses[n] or "of nobody known" for n in set(range(len(names))).difference(taken))
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(unused.items()))
            note = f"{len(names) - len(taken)} of {len(names)} photos are in no pair ({reasons})"
            pairs = replace(pairs, note="; ".join(filter(None, [pairs.note, note])))
        return photos, pairs, sources
    note = ""
    if within:
        inside = [n for n, status in enumerate(statuses) if status != _not_within(within)]
        note = f"{len(names) - len(inside)} of {len(names)} photos are left out ({_not_within(within)})"
        names, splits = [names[n] for n in inside], [splits[n] for n in inside]
        identities = [identities[n] for n in inside]
    pairs = read_pairs(pairs_url, names, seed=seed)
    pairs = replace(pairs, note="; ".join(filter(None, [pairs.note, note])))
    if isinstance(sources[0], FacesSource):
        return photos_of(names, identities, splits), pairs, sources
    used_N = np.unique(np.concatenate([pairs.a_P, pairs.b_P]))
    place_N = np.full(len(names), -1)
    place_N[used_N] = np.arange(len(used_N))
    kept = [
        _with_photos(source, source.manifest.photos.take(used_N))
        for source in sources
        if isinstance(source, PhotosSource)
    ]
    pairs = replace(pairs, a_P=place_N[pairs.a_P], b_P=place_N[pairs.b_P])
    photos = photos_of([names[n] for n in used_N], [identities[n] for n in used_N], [splits[n] for n in used_N])
    return photos, pairs, list(kept)


def _with_photos(source: PhotosSource, photos: pa.Table) -> PhotosSource:
    return replace(source, manifest=Manifest.of(photos, source.manifest.num_bytes, source.manifest.num_passed_over))


def _not_within(taken: FaceFilter) -> str:
    return f"not within {taken}"


def _listed(source: Source, taken: FaceFilter) -> tuple[list[str], list[str | None], list[str | None], list[str]]:
    """Return name, identity, status (if known) and split of every photo of a source.

    The status of aligned faces that are left out says so.
    """
    if isinstance(source, PhotosSource):
        columns = ("photo", "identity", "status", "split")
        photos = source.manifest.photos
        names, identities, statuses, splits = (photos[column].to_pylist() for column in columns)
        return names, identities, statuses, splits
    parts = [_read_part(storage.join(source.url, name), taken) for name in source.file_names]
    rows = pa.concat_tables(parts)
    in_split = [split_in(name) for name in source.file_names]
    splits = [split for split, part in zip(in_split, parts, strict=True) for _ in range(len(part))]
    names, identities, statuses = (rows[column].to_pylist() for column in ("photo", "identity", "status"))
    return names, identities, statuses, splits


def _read_part(url: str, taken: FaceFilter) -> pa.Table:
    with storage.open_parquet(url, table.columns("photo", "identity", "status")) as file:
        taken.check(file.schema_arrow, storage.redacted(url))
        rows = file.read(columns=["photo", "identity", "status", *taken.columns])
    if taken:
        is_out = pc.and_(pc.equal(rows["status"], table.ALIGNED), pc.invert(taken.keeps(rows)))
        rows = rows.set_column(2, "status", pc.if_else(is_out, _not_within(taken), rows["status"]))
    return rows.select(["photo", "identity", "status"])
