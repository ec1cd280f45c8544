"""What there is to do: every input photo with its identity and split, in an order that depends on their names alone."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.identities import folder_identities, identity_or_nobody, read_identities
from lib.faces.images import PHOTO_SUFFIXES
from lib.faces.photo_names import junk, stored_name
from lib.faces.splits import split_of

logger = logging.getLogger(__name__)

MIN_LISTED_SHARE = 0.5
"""Of the photos that a list names, how many must be there, unless a flag says otherwise."""

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar", ".rec")

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("photo", pa.string(), nullable=False),
        pa.field("identity", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("status", pa.string()),  # missing or no_identity where there is nothing to look at, else null
        pa.field("source", pa.string()),  # Parquet input: the file, below the photo root
        pa.field("group", pa.int64()),  # Parquet input: the row group of that file
        pa.field("row", pa.int64()),  # Parquet input: the row in that group
    ]
)


@dataclass(frozen=True, kw_only=True)
class ParquetColumns:
    """The columns of Parquet input."""

    image: str = "image"
    """Encoded photo: binary, or a struct with `bytes` and `path` as Hugging Face writes it."""
    identity: str = "identity"
    photo: str = "photo"


@dataclass(frozen=True)
class Manifest:
    """All input photos.

    Attributes:
        photos: rows as in `MANIFEST_SCHEMA`; sorted by split and name, or for Parquet input in the files' order.
        num_bytes: size of the photos, or of what Parquet holds: other photos of the same names are told by it.
        num_passed_over: files that are no photos: by suffix, `hidden`, or the junk folder that they lie in.
    """

    photos: pa.Table
    num_bytes: int
    num_passed_over: dict[str, int]

    def __len__(self) -> int:
        return len(self.photos)

    def digest(self) -> str:
        """Return a hash over names, identities and splits: the same input gives the same, on any machine."""
        digest = hashlib.sha256()
        for name in self.photos.column_names:
            if name == "group" and self.photos[name].null_count == len(self):
                continue  # photos in files had their digest before there was such a column
            for batch in self.photos.select([name]).to_batches(max_chunksize=65536):
                digest.update("".join(f"{value!r}\n" for value in batch.column(0).to_pylist()).encode())
        return digest.hexdigest()[:16]


def read_manifest(
    photos_url: str,
    identities_url: str | None,
    *,
    split_seed: int,
    columns: ParquetColumns,
    identities_required: bool,
    min_listed_share: float = MIN_LISTED_SHARE,
) -> Manifest:
    """List the photos and give each its identity and split.

    `identities_url` may be None, or name a file that is not there: then the folder a photo lies in is its identity, or
    nobody's where `identities_required` is False.

    Raises:
        UserError: no photos, or an identities file that cannot be trusted.
    """
    if not storage.exists(photos_url):
        raise UserError(
            f"--photos {storage.redacted(photos_url)} is not there: put the photos there, name their folder by "
            "--photos, or set DATA_URL to the folder above photos/ (jobs/sample.py draws some to try)"
        )
    names, parquet_names, num_bytes, passed_over = _list_photos(photos_url)
    if names and parquet_names:
        raise UserError(
            f"{storage.redacted(photos_url)} holds both Parquet files ({len(parquet_names)}, such as "
            f"{parquet_names[0]}) and pictures ({len(names)}, such as {names[0]}): name the folder of the ones or of "
            "the others by --photos, or move what is not meant elsewhere"
        )
    has_list = identities_url is not None and storage.exists(identities_url)
    manifest = None
    if parquet_names:
        manifest = _from_parquet(
            photos_url, parquet_names, columns, split_seed, required=identities_required, has_list=has_list
        )
        names = manifest.photos["photo"].to_pylist()
    elif not names and not has_list:
        kinds = f" ({_counted(passed_over)} lie there)" if passed_over else ""
        raise UserError(
            f"{storage.redacted(photos_url)} holds no photos{kinds}: {', '.join(PHOTO_SUFFIXES)} and .parquet are read"
        )
    listed: dict[str, str | None] = {}
    if has_list:
        listed = read_identities(identities_url or "", names, photos_url=photos_url, min_listed_share=min_listed_share)
    if manifest is not None:
        if not has_list:
            return manifest
        identities = [listed.get(name) for name in names]
        return _with_identities(manifest, identities, split_seed, required=identities_required)
    if has_list:
        photos, identities, statuses = _join(names, listed)
    else:
        photos, identities, statuses = _by_folder(names, photos_url, identities_url, required=identities_required)
    photos_table = _table(photos, identities, statuses, split_seed)
    order = pc.sort_indices(photos_table, sort_keys=[("split", "ascending"), ("photo", "ascending")])
    return Manifest(photos_table.take(order), num_bytes, passed_over)


def _list_photos(photos_url: str) -> tuple[list[str], list[str], int, dict[str, int]]:
    if photos_url.endswith(".parquet"):
        return [], [""], 0, {}
    if (ending := photos_url.lower()).endswith(_ARCHIVES):
        raise UserError(
            f"--photos {storage.redacted(photos_url)} is an archive, which is not read: unpack it, and name the folder"
        )
    if ending.endswith(PHOTO_SUFFIXES):
        raise UserError(f"--photos {storage.redacted(photos_url)} is one photo: name the folder that it lies in")
    names, parquet_names, num_bytes, passed_over = [], [], 0, Counter[str]()
    for info in storage.list_files(photos_url, skip_prefixes=()):
        suffix = os.path.splitext(info.path)[1].lower()  # noqa: PTH122 - names of object stores are no paths
        if kind := junk(info.path):
            passed_over[kind] += 1
        elif suffix in PHOTO_SUFFIXES:
            names.append(stored_name(info.path))
            num_bytes += info.num_bytes
        elif suffix == ".parquet":
            parquet_names.append(info.path)
        else:
            passed_over[suffix or "no suffix"] += 1
    return names, parquet_names, num_bytes, dict(passed_over)


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


def _with_identities(manifest: Manifest, identities: Sequence[str | None], seed: int, *, required: bool) -> Manifest:
    """Return the rows of Parquet files with identities from a list instead of a column."""
    photos = manifest.photos
    statuses = [table.NO_IDENTITY if required and identity is None else None for identity in identities]
    made = _table(photos["photo"].to_pylist(), identities, statuses, seed)
    for index, name in ((4, "source"), (5, "group"), (6, "row")):
        made = made.set_column(index, MANIFEST_SCHEMA.field(name), photos[name])
    return Manifest(made, manifest.num_bytes, manifest.num_passed_over)


def _from_parquet(
    photos_url: str, names: list[str], columns: ParquetColumns, seed: int, *, required: bool, has_list: bool
) -> Manifest:
    """Return the rows of Parquet files; with a list of identities, no column of them is needed."""
    parts, num_bytes, num_nobody = [], 0, 0
    for name in names:
        url = storage.join(photos_url, name) if name else photos_url
        with storage.open_parquet(url) as file:
            _check_columns(url, file.schema_arrow, columns, identity_required=required and not has_list)
            known = set(file.schema_arrow.names) - {columns.image}
            content = file.read(columns=[column for column in (columns.identity, columns.photo) if column in known])
            num_rows = file.metadata.num_rows
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            num_bytes += sum(group.total_byte_size for group in groups)
            sizes = [group.num_rows for group in groups]
        nobody: list[str | None] = [None] * num_rows
        identities = nobody
        if columns.identity in known and not has_list:
            texts = _texts(url, content, columns.identity)
            identities = [identity_or_nobody(text) for text in texts]
            num_nobody += sum(text is not None for text in texts) - sum(one is not None for one in identities)
        stem = name or url.rsplit("/", 1)[1]
        numbered: list[str | None] = [f"{stem}#{row}" for row in range(num_rows)]
        keys = _texts(url, content, columns.photo) if columns.photo in known else numbered
        statuses = [table.NO_IDENTITY if required and identity is None else None for identity in identities]
        part = _table(keys, identities, statuses, seed)
        firsts = np.repeat(np.cumsum([0, *sizes])[:-1], sizes)
        places = (pa.repeat(name, num_rows), np.repeat(np.arange(len(sizes)), sizes), np.arange(num_rows) - firsts)
        for index, place in enumerate(places, start=4):
            part = part.set_column(index, MANIFEST_SCHEMA.field(index), pa.array(place))
        parts.append(part)
    if num_nobody:
        logger.warning("%d rows have an identity that says there is none (blank, nan, None, null)", num_nobody)
    photos = pa.concat_tables(parts)
    if not len(photos):
        raise UserError(f"{storage.redacted(photos_url)} holds no rows")
    num_distinct = pc.count_distinct(photos["photo"]).as_py()
    if num_distinct != len(photos):
        raise UserError(
            f"column {columns.photo!r} of {storage.redacted(photos_url)} names {len(photos)} photos by {num_distinct} "
            "names: name a column of distinct keys by --photo-column"
        )
    return Manifest(photos, num_bytes, {})


def _check_columns(url: str, schema: pa.Schema, columns: ParquetColumns, *, identity_required: bool) -> None:
    wanted = [("--image-column", columns.image)]
    if identity_required:
        wanted.append(("--identity-column", columns.identity))
    for flag, column in wanted:
        if column not in schema.names:
            raise UserError(
                f"{storage.redacted(url)} has no column {column!r}: name it by {flag}; "
                f"there are {', '.join(schema.names)}"
            )
    kind = schema.field(columns.image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if kind not in (pa.binary(), pa.large_binary(), pa.binary_view()):
        raise UserError(
            f"column {columns.image!r} of {storage.redacted(url)} is of type {kind}: name by --image-column the one of "
            "the encoded photos, binary or a struct with `bytes`"
        )


def _texts(url: str, content: pa.Table, column: str) -> list[str | None]:
    try:
        return pc.cast(content[column], pa.string()).to_pylist()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise UserError(
            f"column {column!r} of {storage.redacted(url)} holds no names but {content[column].type}: "
            "name the columns by --identity-column and --photo-column"
        ) from error


def _table(
    photos: Iterable[str | None], identities: Iterable[str | None], statuses: Iterable[str | None], seed: int
) -> pa.Table:
    splits: dict[str, str] = {}
    photos, identities = list(photos), list(identities)
    split_names = []
    for photo, identity in zip(photos, identities, strict=True):
        # Who stands for nobody is split by its own name.
        key = identity if identity is not None else f"photo:{photo}"
        if identity is None:
            split_names.append(split_of(key, seed))
        else:
            split_names.append(splits.get(key) or splits.setdefault(key, split_of(key, seed)))
    nothing = pa.nulls(len(photos))
    arrays = [
        pa.array(photos, pa.string()),
        pa.array(identities, pa.string()),
        pa.array(split_names, pa.string()),
        pa.array(list(statuses), pa.string()),
        nothing.cast(pa.string()),
        nothing.cast(pa.int64()),
        nothing.cast(pa.int64()),
    ]
    return pa.Table.from_arrays(arrays, schema=MANIFEST_SCHEMA)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {suffix}" for suffix, number in sorted(counts.items()))
