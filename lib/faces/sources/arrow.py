"""Photos in Arrow stream files, as `save_to_disk` of Hugging Face's datasets writes them."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import pyarrow as pa

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.sources.hugging_face import chosen_columns, texts_of
from lib.faces.sources.source import ContainerSource, Photo, Row, Shard, scan_batch
from lib.ranged_files import RangedFile

logger = logging.getLogger(__name__)

_BROKEN = (pa.ArrowException, EOFError, OSError, UnicodeDecodeError)
"""Errors of Arrow for damaged streams. Errors of the storage are `UserError` or `JobError`."""


class ArrowSource(ContainerSource):
    """Arrow streams. The `group` of a photo is the place of its record batch in the file."""

    format = "arrow"
    what = "Arrow files"
    suffixes = (".arrow",)
    companions = (".json", ".lock")

    def scan(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a file, batch by batch; if it is cut off, those before the cut."""
        url = self.file_url(shard.name)
        first = 0
        with _explained(url):
            file = RangedFile(url)
            schema = _schema(file)
            columns = chosen_columns(url, schema, self.columns, identities_required=self.identities_required)
            while (place := file.tell()) < file.num_bytes:
                try:
                    batch = _next_batch(file, schema)
                except _BROKEN as error:
                    if isinstance(error, UserError):
                        raise
                    self.passed_over["record batches cut off"] += 1
                    logger.warning("%s is cut off or damaged: what follows is lost", storage.redacted(url))
                    return
                if batch is None:
                    return
                content = pa.Table.from_batches([batch])
                numbered = [f"{self.stem(shard.name)}#{row}" for row in range(first, first + len(batch))]
                names = texts_of(url, content, columns.photo, schema) or numbered
                identities = texts_of(url, content, columns.identity, schema) or [None] * len(batch)
                sizes = [0] * len(batch)
                yield scan_batch(shard, names, identities, range(len(batch)), sizes, group=place)
                first += len(batch)

    def read_file(self, name: str, rows: Iterable[Row]) -> Iterator[Photo]:
        """Yield the images of a file, with one record batch in memory; `missing` if an image is null."""
        url = self.file_url(name)
        with _explained(url):
            file = RangedFile(url)
            schema = _schema(file)
            columns = chosen_columns(url, schema, self.columns, identities_required=False)
            for place, wanted in groupby(rows, key=lambda row: row["group"]):
                file.seek(place)
                batch = _next_batch(file, schema)
                images = None if batch is None else batch.column(columns.image)
                for row in wanted:
                    image: Any = None if images is None else images[row["row"]].as_py()
                    data = image.get("bytes") if isinstance(image, dict) else image
                    yield row, table.MISSING if data is None else data


def _schema(file: RangedFile) -> pa.Schema:
    return pa.ipc.read_schema(_message(file, "schema"))


def _next_batch(file: RangedFile, schema: pa.Schema) -> pa.RecordBatch | None:
    """Return the record batch at the place of the file, None at its end."""
    try:
        message = _message(file, "record batch")
    except EOFError:
        return None
    batch = pa.ipc.read_record_batch(message, schema)
    batch.validate(full=True)
    return batch


def _message(file: RangedFile, kind: str) -> pa.Message:
    """Return the next message. Arrow believes what a damaged one says of itself, and ends the process."""
    message = pa.ipc.read_message(file)
    if message.type != kind:
        raise pa.ArrowInvalid(f"a message of type {message.type}, not {kind}")
    return message


@contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{storage.redacted(url)} is no whole Arrow stream: copy it again, or write it by save_to_disk"
        ) from error
