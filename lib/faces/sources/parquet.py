"""Photos in Parquet files: a column of encoded images, and one of identities."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import pyarrow as pa

from lib import storage
from lib.faces import table
from lib.faces.identities import identity_or_nobody
from lib.faces.sources.hugging_face import chosen_columns, texts_of
from lib.faces.sources.source import ContainerSource, Photo, Row, Shard, scan_batch

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 8
"""Photos of Parquet in memory at once: as many of the largest size fill the 2 GiB that Arrow's `binary` can address."""

COLUMN_BUFFER_BYTES = 4 * 2**20
"""Bytes of a Parquet column that are read at once: enough to hide the latency of a bucket."""


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
            schema = file.schema_arrow
            columns = chosen_columns(url, schema, self.columns, identities_required=self.identities_required)
            wanted = {columns.identity, columns.photo} & set(schema.names) - {columns.image}
            content = file.read(columns=[str(name) for name in wanted])
            groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        num_rows = sum(about.num_rows for about in groups)
        texts = texts_of(url, content, columns.identity, schema) or [None] * num_rows
        identities = [identity_or_nobody(text) for text in texts]
        num_nobody = sum(text is not None for text in texts) - sum(one is not None for one in identities)
        names = texts_of(url, content, columns.photo, schema) or [
            f"{self.stem(shard.name)}#{row}" for row in range(num_rows)
        ]
        for group, about in enumerate(groups):
            if about.num_rows:
                rows = slice(first, first + about.num_rows)
                share, rest = divmod(about.total_byte_size, about.num_rows)
                sizes = [share + rest, *[share] * (about.num_rows - 1)]
                yield scan_batch(shard, names[rows], identities[rows], range(about.num_rows), sizes, group=group)
            first += about.num_rows
        if num_nobody:
            logger.warning(
                "%d rows of %s have an identity that says there is none (blank, nan, None, null)",
                *(num_nobody, storage.redacted(url)),
            )

    def read_file(self, name: str, rows: Iterable[Row]) -> Iterator[Photo]:
        """Yield the images of a file, with a few in memory at a time; `missing` if an image is null."""
        url = self.file_url(name)
        schema = storage.parquet_schema(url)
        columns = chosen_columns(url, schema, replace(self.columns, identity=None), identities_required=False)
        for group, wanted in groupby(rows, key=lambda row: row["group"]):
            mine = list(wanted)
            images = _group_images(url, columns.image, group, [row["row"] for row in mine])
            for row, image in zip(mine, images, strict=True):
                yield row, table.MISSING if image is None else image


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
