"""Photos in Parquet files: a column of encoded images, and one of identities."""

import logging
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.identities import identity_or_nobody
from lib.faces.sources.source import SCAN_SCHEMA, ContainerSource, Photo, Row, Shard

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 8
"""Photos of Parquet in memory at once: as many of the largest size fill the 2 GiB that Arrow's `binary` can address."""

COLUMN_BUFFER_BYTES = 4 * 2**20
"""Of a Parquet column that is read bit by bit: large enough that a bucket's latency does not count."""


class ParquetSource(ContainerSource):
    """Parquet files. The `group` of a photo is its row group."""

    format = "parquet"
    what = "Parquet files"
    suffixes = (".parquet",)

    def scan(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a file, a batch for each row group."""
        url = self.file_url(shard.name)
        first = 0
        with storage.open_parquet(url) as file:
            columns = _known_columns(file.schema_arrow, self)
            _check_columns(url, file.schema_arrow, self)
            content = file.read(columns=[*columns])
            groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        num_rows = sum(about.num_rows for about in groups)
        texts = _texts(url, content, self.columns.identity, columns) or [None] * num_rows
        identities = [identity_or_nobody(text) for text in texts]
        num_nobody = sum(text is not None for text in texts) - sum(one is not None for one in identities)
        names = _texts(url, content, self.columns.photo, columns) or [
            f"{self.stem(shard.name)}#{row}" for row in range(num_rows)
        ]
        for group, about in enumerate(groups):
            if about.num_rows:
                rows = slice(first, first + about.num_rows)
                yield _batch(names[rows], identities[rows], shard, group, about)
            first += about.num_rows
        if num_nobody:
            logger.warning(
                "%d rows of %s have an identity that says there is none (blank, nan, None, null)",
                *(num_nobody, storage.redacted(url)),
            )

    def read_file(self, name: str, rows: Iterable[Row]) -> Iterator[Photo]:
        """Yield the images of a file, a few of which are in memory at a time; `missing` where one is null."""
        for group, wanted in groupby(rows, key=lambda row: row["group"]):
            mine = list(wanted)
            images = _group_images(self.file_url(name), self.columns.image, group, [row["row"] for row in mine])
            for row, image in zip(mine, images, strict=True):
                yield row, table.MISSING if image is None else image


def _batch(
    names: list[str | None], identities: list[str | None], shard: Shard, group: int, about: pq.RowGroupMetaData
) -> pa.RecordBatch:
    num = about.num_rows
    share, rest = divmod(about.total_byte_size, num)
    arrays = [
        pa.array(names, pa.string()),
        pa.array(identities, pa.string()),
        pa.repeat(pa.scalar(shard.name, pa.string()), num),
        pa.repeat(pa.scalar(group, pa.int64()), num),
        pa.array(range(num), pa.int64()),
        pa.array([share + rest, *[share] * (num - 1)], pa.int64()),
        pa.repeat(pa.scalar(shard.mark, pa.string()), num),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SCAN_SCHEMA)


def _known_columns(schema: pa.Schema, source: ParquetSource) -> set[str]:
    wanted = {source.columns.identity, source.columns.photo} - {source.columns.image, None}
    return {name for name in wanted if name is not None and name in schema.names}


def _check_columns(url: str, schema: pa.Schema, source: ParquetSource) -> None:
    wanted = [("--image-column", source.columns.image)]
    if source.identities_required and source.columns.identity is not None:
        wanted.append(("--identity-column", source.columns.identity))
    for flag, column in wanted:
        if column not in schema.names:
            raise UserError(
                f"{storage.redacted(url)} has no column {column!r}: name it by {flag}; "
                f"there are {', '.join(schema.names)}"
            )
    kind = schema.field(source.columns.image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if kind not in (pa.binary(), pa.large_binary(), pa.binary_view()):
        raise UserError(
            f"column {source.columns.image!r} of {storage.redacted(url)} is of type {kind}: name by --image-column the "
            "one of the encoded photos, binary or a struct with `bytes`"
        )


def _texts(url: str, content: pa.Table, column: str | None, known: set[str]) -> list[str | None]:
    """Return the values of a column as text, nothing if it is not there."""
    if column not in known:
        return []
    try:
        texts: list[str | None] = pc.cast(content[column], pa.string()).to_pylist()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise UserError(
            f"column {column!r} of {storage.redacted(url)} holds no names but {content[column].type}: "
            "name the columns by --identity-column and --photo-column"
        ) from error
    return texts


def _group_images(url: str, column: str, group: int, rows: list[int]) -> Iterator[bytes | None]:
    """Yield the encoded photos of ascending rows of a row group, of which a few are in memory at a time."""
    first, position = 0, 0
    with storage.open_parquet(url, buffer_size=COLUMN_BUFFER_BYTES) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False):
            while position < len(rows) and rows[position] < first + len(batch):
                image: Any = batch.column(0)[rows[position] - first].as_py()
                yield image.get("bytes") if isinstance(image, dict) else image
                position += 1
            first += len(batch)
            if position == len(rows):
                return
