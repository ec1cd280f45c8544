"""What there is to do: every input photo with its identity and split, in an order that depends on their names alone."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.images import PHOTO_SUFFIXES
from lib.faces.splits import split_of

logger = logging.getLogger(__name__)

_MAX_NAMED = 5

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("photo", pa.string(), nullable=False),
        pa.field("identity", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("status", pa.string()),  # missing or no_identity where there is nothing to look at, else null
        pa.field("source", pa.string()),  # Parquet input: the file, below the photo root
        pa.field("row", pa.int64()),  # Parquet input: the row in that file
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
        num_passed_over: files that are no photos by their names, by suffix.
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
            for batch in self.photos.select([name]).to_batches(max_chunksize=65536):
                digest.update("".join(f"{value!r}\n" for value in batch.column(0).to_pylist()).encode())
        return digest.hexdigest()[:16]


def read_manifest(
    photos_url: str, identities_url: str | None, *, split_seed: int, columns: ParquetColumns, identities_required: bool
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
    if photos_url.endswith(".parquet"):
        return _from_parquet(photos_url, [""], columns, split_seed, required=identities_required)
    names, parquet_names, num_bytes, passed_over = _list_photos(photos_url)
    if parquet_names and not names:
        return _from_parquet(photos_url, parquet_names, columns, split_seed, required=identities_required)
    listed = _read_identities(identities_url) if identities_url and storage.exists(identities_url) else None
    if not names and not listed:
        kinds = f" ({_counted(passed_over)} lie there)" if passed_over else ""
        raise UserError(
            f"{storage.redacted(photos_url)} holds no photos{kinds}: {', '.join(PHOTO_SUFFIXES)} and .parquet are read"
        )
    if listed is not None:
        photos, identities, statuses = _join(names, listed)
    else:
        photos, identities, statuses = _by_folder(names, photos_url, identities_url, required=identities_required)
    photos_table = _table(photos, identities, statuses, split_seed)
    order = pc.sort_indices(photos_table, sort_keys=[("split", "ascending"), ("photo", "ascending")])
    return Manifest(photos_table.take(order), num_bytes, passed_over)


def safe_name(name: str) -> bool:
    """Return whether a name stays below the folder it is looked up in."""
    return bool(name) and not name.startswith(("/", "\\")) and ".." not in name.replace("\\", "/").split("/")


def _list_photos(photos_url: str) -> tuple[list[str], list[str], int, dict[str, int]]:
    names, parquet_names, num_bytes, passed_over = [], [], 0, Counter[str]()
    for info in storage.list_files(photos_url, skip_prefixes=(".",)):  # cameras write _DSC0001.JPG
        suffix = os.path.splitext(info.path)[1].lower()  # noqa: PTH122 - names of object stores are no paths
        if suffix in PHOTO_SUFFIXES:
            names.append(_utf8(info.path))
            num_bytes += info.num_bytes
        elif suffix == ".parquet":
            parquet_names.append(info.path)
        else:
            passed_over[suffix or "no suffix"] += 1
    return names, parquet_names, num_bytes, dict(passed_over)


def _utf8(name: str) -> str:
    # A name that is no UTF-8 cannot stand in Parquet; its bytes are escaped as in a URL, and undone when it is read.
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _read_identities(url: str) -> dict[str, str]:
    """Return photo -> identity from lines of "photo-name identity"; the name may hold spaces."""
    try:
        text = storage.read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{url} is not UTF-8 text ({error}): save it as UTF-8") from error
    listed: dict[str, str] = {}
    malformed, outside, doubled = [], [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        fields = line.strip().rsplit(maxsplit=1)
        if len(fields) < 2:
            malformed.append(number)
            continue
        name, identity = fields
        if not safe_name(name):
            outside.append(f"line {number} ({name})")
        elif listed.setdefault(name, identity) != identity:
            doubled.append(f"line {number} ({name}: {listed[name]} and {identity})")
    if malformed:
        numbers = ", ".join(map(str, malformed[:_MAX_NAMED]))
        raise UserError(
            f'{url}: {len(malformed)} lines are not "photo-name identity", such as line {numbers}: mend them'
        )
    if outside:
        raise UserError(f"{url}: {_some(outside)} leads out of the photo folder: only names below it are read")
    if doubled:
        raise UserError(f"{url}: {_some(doubled)} has two identities: keep the right one")
    return listed


def _join(names: list[str], listed: dict[str, str]) -> tuple[list[str], list[str | None], list[str | None]]:
    present = set(names)
    missing = sorted(name for name in listed if name not in present)
    identities = [listed.get(name) for name in names] + [listed[name] for name in missing]
    statuses = [None if name in listed else table.NO_IDENTITY for name in names] + [table.MISSING] * len(missing)
    return names + missing, identities, statuses


def _by_folder(
    names: list[str], photos_url: str, identities_url: str | None, *, required: bool
) -> tuple[list[str], list[str | None], list[str | None]]:
    folders = [name.rpartition("/")[0] or None for name in names]
    if required and not any(folders):
        shown = storage.redacted(identities_url or "identities.txt")
        raise UserError(
            f"{shown} is not there, and {storage.redacted(photos_url)} has no folder per "
            'identity: write lines of "photo-name identity" into that file, name another by --identities, '
            "or take every face of photos without identities with --faces-policy all"
        )
    statuses = [table.NO_IDENTITY if required and folder is None else None for folder in folders]
    return names, folders, statuses


def _from_parquet(photos_url: str, names: list[str], columns: ParquetColumns, seed: int, *, required: bool) -> Manifest:
    parts, num_bytes = [], 0
    for name in names:
        url = storage.join(photos_url, name) if name else photos_url
        with storage.open_parquet(url) as file:
            _check_columns(url, file.schema_arrow, columns, identity_required=required)
            known = set(file.schema_arrow.names) - {columns.image}
            content = file.read(columns=[column for column in (columns.identity, columns.photo) if column in known])
            num_rows = file.metadata.num_rows
            num_bytes += sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        nobody: list[str | None] = [None] * num_rows
        identities = _texts(url, content, columns.identity) if columns.identity in known else nobody
        stem = name or url.rsplit("/", 1)[1]
        numbered: list[str | None] = [f"{stem}#{row}" for row in range(num_rows)]
        keys = _texts(url, content, columns.photo) if columns.photo in known else numbered
        statuses = [table.NO_IDENTITY if required and identity is None else None for identity in identities]
        part = _table(keys, identities, statuses, seed)
        part = part.set_column(4, MANIFEST_SCHEMA.field("source"), pa.array([name] * num_rows, pa.string()))
        parts.append(part.set_column(5, MANIFEST_SCHEMA.field("row"), pa.array(np.arange(num_rows), pa.int64())))
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
    ]
    return pa.Table.from_arrays(arrays, schema=MANIFEST_SCHEMA)


def _some(items: list[str]) -> str:
    more = len(items) - _MAX_NAMED
    return ", ".join(items[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {suffix}" for suffix, number in sorted(counts.items()))
