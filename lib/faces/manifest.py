"""What there is to do: every input photo with its identity and split, in an order that depends on their names alone."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.identities import folder_identities, read_identities
from lib.faces.images import PHOTO_SUFFIXES
from lib.faces.sources.folder import FolderSource
from lib.faces.sources.source import SCAN_SCHEMA, ContainerSource, Source
from lib.faces.splits import Splits, named_people

logger = logging.getLogger(__name__)

MIN_LISTED_SHARE = 0.5
"""Of the photos that a list names, how many must be there, unless a flag says otherwise."""

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("photo", pa.string(), nullable=False),
        pa.field("identity", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("status", pa.string()),  # missing or no_identity where there is nothing to look at, else null
        pa.field("source", pa.string()),  # these five as in `SCAN_SCHEMA`
        pa.field("group", pa.int64()),
        pa.field("row", pa.int64()),
        pa.field("num_bytes", pa.int64()),
        pa.field("mark", pa.string()),
    ]
)

SCANNED = ("source", "group", "row", "num_bytes", "mark")


@dataclass(frozen=True)
class Manifest:
    """All input photos.

    Attributes:
        photos: rows as in `MANIFEST_SCHEMA`; sorted by split and name, or in the order of the files that hold them.
        num_bytes: size of the photos, or of what Parquet holds: other photos of the same names are told by it.
        num_passed_over: files that are no photos: by suffix, `hidden`, or the junk folder that they lie in.
    """

    photos: pa.Table
    num_bytes: int
    num_passed_over: dict[str, int]

    def __len__(self) -> int:
        return len(self.photos)

    def old_digest(self) -> str:
        """Return the hash over names, identities and splits by which tables without versions tell their input."""
        digest = hashlib.sha256()
        for name in ("photo", "identity", "split", "status", "source", "group", "row"):
            if name == "group" and self.photos[name].null_count == len(self):
                continue  # photos in files had their digest before there was such a column
            for batch in self.photos.select([name]).to_batches(max_chunksize=65536):
                digest.update("".join(f"{value!r}\n" for value in batch.column(0).to_pylist()).encode())
        return digest.hexdigest()[:16]


def read_manifest(
    source: Source,
    identities_url: str | None,
    *,
    split_seed: int = 0,
    splits: Splits | None = None,
    identities_required: bool,
    min_listed_share: float = MIN_LISTED_SHARE,
    exclude: Sequence[str] = (),
) -> Manifest:
    """List the photos of a source and give each its identity and split.

    `identities_url` may be None, or name a file that is not there. Then the source says the identities, or the folder
    of a photo is its identity, or it is nobody's where `identities_required` is False.

    Raises:
        UserError: no photos, or an identities file that cannot be trusted.
    """
    chosen = splits or Splits(seed=split_seed)
    has_list = identities_url is not None and storage.exists(identities_url)
    scanned, num_bytes = _scanned(source)
    shown = storage.redacted(source.url)
    if isinstance(source, FolderSource):
        if not len(scanned) and not has_list:
            kinds = f" ({_counted(source.passed_over)} lie there)" if source.passed_over else ""
            raise UserError(
                f"{shown} holds no photos{kinds}: {', '.join(PHOTO_SUFFIXES)} are read, and .parquet, .rec, .tar, .zip "
                "and .arrow files of photos"
            )
    elif not len(scanned):
        raise UserError(f"{shown} holds no rows")
    else:
        _check_distinct(source, scanned)
    names = scanned["photo"].to_pylist()
    listed: dict[str, str | None] = {}
    if has_list:
        listed = read_identities(identities_url or "", names, photos_url=source.url, min_listed_share=min_listed_share)
    if not isinstance(source, FolderSource):
        if has_list:
            identities = [listed.get(name) for name in names]
        elif isinstance(source, ContainerSource) and source.has_folders and not _any_identity(scanned):
            identities = folder_identities(_inner_names(source, names, scanned["source"].to_pylist()))
        else:
            identities = scanned["identity"].to_pylist()
        statuses = [table.NO_IDENTITY if identities_required and one is None else None for one in identities]
        photos_table = _table(names, identities, statuses, _without(chosen, exclude, names, identities))
        for place, column in enumerate(MANIFEST_SCHEMA.names):
            if column in SCANNED:
                photos_table = photos_table.set_column(place, MANIFEST_SCHEMA.field(place), scanned[column])
        return Manifest(photos_table, num_bytes, dict(source.passed_over))
    if has_list:
        photos, identities, statuses = _join(names, listed)
    else:
        photos, identities, statuses = _by_folder(names, source.url, identities_url, required=identities_required)
    photos_table = _table(photos, identities, statuses, _without(chosen, exclude, photos, identities))
    for column, absent in (("num_bytes", 0), ("mark", "")):
        field = MANIFEST_SCHEMA.field(column)
        values = pa.concat_arrays(
            [*scanned[column].chunks, pa.repeat(pa.scalar(absent, field.type), len(photos) - len(names))]
        )
        photos_table = photos_table.set_column(MANIFEST_SCHEMA.get_field_index(column), field, values)
    order = pc.sort_indices(photos_table, sort_keys=[("split", "ascending"), ("photo", "ascending")])
    return Manifest(photos_table.take(order), num_bytes, dict(source.passed_over))


def _scanned(source: Source) -> tuple[pa.Table, int]:
    """Return the photos of a source, and the sum of their sizes."""
    batches, num_bytes = [], 0
    for shard in source.shards():
        for batch in source.scan(shard):
            num_bytes += pc.sum(batch["num_bytes"]).as_py() or 0
            batches.append(batch)
    return pa.Table.from_batches(batches, SCAN_SCHEMA), num_bytes


def _any_identity(scanned: pa.Table) -> bool:
    return scanned["identity"].null_count < len(scanned)


def _inner_names(source: ContainerSource, names: list[str], files: list[str]) -> list[str]:
    """Return the names of photos in archives without those of the archives; of one without folders, below its stem."""
    several = len(set(files)) > 1
    inner = []
    for name, file in zip(names, files, strict=True):
        stem = source.stem(file)
        below = name[len(stem) + 1 :]
        inner.append(f"{stem.split('.')[0]}/{below}" if several and "/" not in below else below)
    return inner


def _check_distinct(source: Source, scanned: pa.Table) -> None:
    num_distinct = pc.count_distinct(scanned["photo"]).as_py()
    if num_distinct != len(scanned):
        raise UserError(
            f"column {source.columns.photo!r} of {storage.redacted(source.url)} names {len(scanned)} photos by "
            f"{num_distinct} names: name a column of distinct keys by --photo-column"
        )


def _join(names: list[str], listed: dict[str, str | None]) -> tuple[list[str], list[str | None], list[str | None]]:
    present = set(names)
    missing = sorted(name for name in listed if name not in present)
    identities = [listed.get(name) for name in names] + [listed[name] for name in missing]
    statuses = [None if listed.get(name) is not None else table.NO_IDENTITY for name in names]
    statuses += [table.MISSING] * len(missing)
    return names + missing, identities, statuses


def _by_folder(
    names: list[str], photos_url: str, identities_url: str | None, *, required: bool
) -> tuple[list[str], list[str | None], list[str | None]]:
    folders = folder_identities(names)
    if required and not any(folders):
        shown = storage.redacted(identities_url or "identities.txt")
        raise UserError(
            f"{shown} is not there, and {storage.redacted(photos_url)} has no folder per "
            'identity: write lines of "photo-name identity" into that file, name another by --identities, '
            "or take every face of photos without identities with --faces-policy all"
        )
    statuses = [table.NO_IDENTITY if required and folder is None else None for folder in folders]
    return names, folders, statuses


def _without(splits: Splits, exclude: Sequence[str], photos: Sequence[str], identities: Sequence[str | None]) -> Splits:
    """Return splits whose training leaves out the people that lists at the URLs `exclude` name."""
    excluded: set[str] = set()
    for url in exclude:
        people = {identity for identity in identities if identity is not None}
        found = named_people(url, people, dict(zip(photos, identities, strict=True)))
        (logger.info if found else logger.warning)(
            "%s names %d of the %d people here: they are left out of training",
            *(storage.redacted(url), len(found), len(people)),
        )
        excluded |= found
    return replace(splits, excluded=frozenset(excluded)) if exclude else splits


def _table(
    photos: Iterable[str], identities: Iterable[str | None], statuses: Iterable[str | None], splits: Splits
) -> pa.Table:
    photos, identities = list(photos), list(identities)
    split_names = [splits.of(photo, identity) for photo, identity in zip(photos, identities, strict=True)]
    nothing = pa.nulls(len(photos))
    arrays = [
        pa.array(photos, pa.string()),
        pa.array(identities, pa.string()),
        pa.array(split_names, pa.string()),
        pa.array(list(statuses), pa.string()),
        nothing.cast(pa.string()),
        nothing.cast(pa.int64()),
        nothing.cast(pa.int64()),
        nothing.cast(pa.int64()),
        nothing.cast(pa.string()),
    ]
    return pa.Table.from_arrays(arrays, schema=MANIFEST_SCHEMA)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {suffix}" for suffix, number in sorted(counts.items()))
