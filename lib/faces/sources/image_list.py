"""Photos named by a list beside them: `train.lst` of im2rec or of InsightFace."""

import logging
from collections.abc import Generator, Iterable, Iterator

import pyarrow as pa

from lib import storage
from lib.errors import UserError
from lib.faces.photo_names import safe_name, stored_name
from lib.faces.sources.folder import FolderSource
from lib.faces.sources.source import Photo, Row, Shard, Source, scan_batch

logger = logging.getLogger(__name__)


class ListSource(Source):
    """One list: `index, labels…, path` (im2rec), or `aligned, path, label…` (InsightFace), with tabs between.

    Paths are those below the folder of the list. The `row` of a photo is its line.
    """

    format = "lst"
    what = "a list of photos"
    suffixes = (".lst",)

    def shards(self) -> list[Shard]:
        """Return the list."""
        return [Shard(info.path, 0, info.num_bytes, info.mark) for info in self.files()]

    def scan(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        """Yield the photos of a list. Absent ones become `missing` when they are read."""
        url = self.file_url(shard.name)
        shown = storage.redacted(url)
        try:
            lines = storage.read_bytes(url).decode("utf-8", "surrogateescape").splitlines()
        except MemoryError as error:
            raise UserError(f"{shown} is too long for the memory of this machine: cut it") from error
        names, identities, rows = [], [], []
        odd: list[str] = []
        folder = self._folder(shard.name).removeprefix("file://").rstrip("/") + "/"
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            fields = [field.strip() for field in line.split("\t")]
            if len(fields) < 3 or not fields[0].lstrip("-").isdigit():
                raise UserError(
                    f"{shown}: line {number} is neither `index, label, path` nor `aligned, path, label` with tabs "
                    "between: mend it, or name the photos' folder by --photos"
                )
            path, label = (fields[-1], fields[1]) if _is_number(fields[1]) else (fields[1], fields[2])
            path = path.removeprefix(folder).removeprefix("./")
            if not safe_name(path):
                raise UserError(
                    f"{shown}: line {number} ({path}) leads out of the folder of the list: put the list above the "
                    "photos, with paths from there"
                )
            if not _is_number(label):
                odd.append(f"line {number} ({label})")
            names.append(stored_name(path))
            identities.append(_text(label))
            rows.append(number)
        if odd:
            logger.warning(
                "%s: %d labels are no numbers, such as %s: they are taken as names", *(shown, len(odd), odd[0])
            )
        if names:
            yield scan_batch(shard, names, identities, rows, [0] * len(names))

    def read(self, rows: Iterable[Row], *, num_ahead: int) -> Generator[Photo, None, None]:
        """Yield each row with its photo, as a folder does."""
        files = FolderSource(self._folder(""), self.columns, foreign={})
        yield from files.read(rows, num_ahead=num_ahead)

    def _folder(self, name: str) -> str:
        return self.file_url(name).rpartition("/")[0]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _text(label: str) -> str | None:
    """Return a label as text: im2rec writes 7 as `7.000000`."""
    if not _is_number(label):
        return label or None
    value = float(label)
    if value != value or value in (float("inf"), float("-inf")):
        return None
    return str(int(value)) if value == int(value) else label
