"""The interface of a source: it lists its photos shard by shard, and reads them.

A format is one file in this folder with one class: see `ContainerSource` for files that hold many photos.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lib import storage
from lib.errors import UserError
from lib.faces.images import PHOTO_SUFFIXES
from lib.faces.photo_names import junk
from lib.faces.sources.patterns import matches
from lib.listing import FileInfo

SCAN_SCHEMA = pa.schema(
    [
        pa.field("photo", pa.string(), nullable=False),  # a unique name that does not change
        pa.field("identity", pa.string()),  # by the source; null if it has none
        pa.field("source", pa.string()),  # the file with the photo, below the URL; null if the file is the photo
        pa.field("group", pa.int64()),  # the part of that file that is only readable from its start
        pa.field("row", pa.int64()),  # the place in that part, ascending
        pa.field("num_bytes", pa.int64(), nullable=False),  # the size of the photo; for Parquet, by its row group
        pa.field("mark", pa.string(), nullable=False),  # changes when the file changes; "" if unknown
    ]
)
"""The columns of a scan."""

BATCH_ROWS = 65_536

Row = Mapping[str, Any]
"""A row of a manifest: at least `photo`, `source`, `group` and `row`."""
Photo = tuple[Row, bytes | str]
"""A row with the photo's bytes, or with the status why there are none."""


@dataclass(frozen=True, kw_only=True)
class PhotoColumns:
    """The columns, or keys, of sources that have any."""

    image: str = "image"
    """Encoded photo: binary, or a struct with `bytes` and `path` as Hugging Face writes it."""
    identity: str | None = "identity"
    """None: identities come from elsewhere, and the column is not read."""
    photo: str = "photo"


class Shard(NamedTuple):
    """The unit of a scan: a folder ("" for all), a file, or the bytes of a file from `start` to `stop`."""

    name: str
    start: int = 0
    stop: int = 0
    mark: str = ""


class Run(NamedTuple):
    """Photos that lie one after the other in bytes that were read at once.

    Attributes:
        data_B: the bytes, uint8.
        start_N: where each photo begins; -1 for one that `read` has to read.
        stop_N: where it ends.
    """

    data_B: NDArray[np.uint8]
    start_N: NDArray[np.int64]
    stop_N: NDArray[np.int64]


class Source(ABC):
    """Photos below a URL, all in one format. It can be pickled, and a copy of it works on another machine.

    Attributes:
        foreign_file: a file of another format, if one was listed.
        list_url: file with the names of the photos; None if the storage lists them.
        passed_over: number of files or records that are no photos, by kind, found by `shards` and `scan`.
    """

    format: ClassVar[str]
    """Its name, as `--photos-format` takes it."""
    what: ClassVar[str]
    """Its files in words, for messages."""
    suffixes: ClassVar[tuple[str, ...]]
    """Suffixes of its files, in lower case."""
    companions: ClassVar[tuple[str, ...]] = ()
    """Suffixes of files without photos that may be beside them."""
    list_url: str | None = None
    foreign_file = ""

    def __init__(
        self,
        url: str,
        columns: PhotoColumns,
        *,
        foreign: Mapping[str, str],
        identities_required: bool = False,
        patterns: Sequence[str] = (),
    ) -> None:
        """Make a source.

        Args:
            url: of a folder of its files, or of one.
            columns: where images, identities and names are, if the format has columns.
            foreign: suffixes of other formats, with their names; such a file ends a scan.
            identities_required: a file without identities is refused.
            patterns: only files below the URL that match one of these are read.
        """
        self.url = url
        self.columns = columns
        self.identities_required = identities_required
        self._patterns = frozenset(patterns)
        self.passed_over: Counter[str] = Counter()
        self._foreign = foreign

    @property
    def is_sorted(self) -> bool:
        """Whether the order of its files decides the order of its photos."""
        return True

    @abstractmethod
    def shards(self) -> list[Shard]:
        """Return the shards, in the order of the photos."""

    @abstractmethod
    def scan(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        """Yield the photos of a shard as batches of `SCAN_SCHEMA`.

        Raises:
            UserError: a file of it cannot be used.
        """

    @abstractmethod
    def read(self, rows: Iterable[Row], *, num_ahead: int) -> Generator[Photo, None, None]:
        """Yield each row with its photo, in order; about `num_ahead` photos are in memory at a time.

        Rows of one file must be in the order of the scan.

        Raises:
            UserError: a file that holds photos cannot be read.
        """

    def read_run(self, name: str, rows: pa.Table) -> Run | None:  # noqa: ARG002
        """Return the photos of rows of one file, in the order of the scan, if they can be read at once; else None.

        It spares the work for each photo where photos are copied, and bounds how much is in memory.
        """
        return None

    def file_url(self, name: str) -> str:
        """Return the URL of a file; the name "" is the source's own URL."""
        return storage.join(self.url, name) if name else self.url

    def listed(self, folder: str) -> Iterator[FileInfo]:
        """Yield all files in a folder below the URL."""
        for info in storage.list_files(self.file_url(folder), skip_prefixes=(), in_order=self.is_sorted):
            yield info._replace(path=storage.join(folder, info.path)) if folder else info

    def files(self, folder: str = "") -> Iterator[FileInfo]:
        """Yield the source's files in a folder below the URL, or the URL itself if that is one of them.

        Raises:
            UserError: there are files of another format among them.
        """
        if self.url.lower().endswith(self.suffixes) and not self._patterns:
            yield FileInfo("", *storage.file_info(self.url)[1:])
            return
        yield from self.chosen(self.listed(folder))

    def chosen(self, listed: Iterable[FileInfo]) -> Iterator[FileInfo]:
        """Yield the source's files among those of a listing; raises as `files`."""
        ours = theirs = ""
        foreign = tuple(self._foreign)
        unmatched = set(self._patterns)
        for info in listed:
            path = info.path
            if self._patterns:
                if (pattern := matches(path, self._patterns)) is None:
                    continue
                unmatched.discard(pattern)
            if kind := junk(path):
                self.passed_over[kind] += 1
                continue
            name = path.lower()
            if is_ours := name.endswith(self.suffixes):
                ours = ours or path
            elif name.endswith(foreign):
                theirs = self.foreign_file = theirs or path
            else:
                self.passed_over[suffix_of(path) or "no suffix"] += 1
            if ours and theirs:
                self.refuse_both(ours, theirs)
            if is_ours:
                yield info
        if unmatched:
            raise UserError(
                f"{len(unmatched)} of the {len(self._patterns)} files that --photos names are not in "
                f"{storage.redacted(self.url)}, such as {min(unmatched)}: copy them there, or correct --photos"
            )

    def refuse_both(self, ours: str, theirs: str) -> NoReturn:
        """Raise UserError for a file of this format and one of another."""
        other = next(what for suffix, what in self._foreign.items() if theirs.lower().endswith(suffix))
        raise UserError(
            f"{storage.redacted(self.url)} holds both {self.what} (such as {ours}) and {other} (such as {theirs}): "
            "name the folder of the ones or of the others by --photos, or give --photos-format "
            f"{self.format}, which passes over the others"
        )


class ContainerSource(Source):
    """Files with many photos each. A format adds how to scan and read one."""

    has_folders: ClassVar[bool] = False
    """Whether its photos are in folders, which are the identities if no photo has another one."""

    def shards(self) -> list[Shard]:
        """Return one shard per file."""
        return [Shard(info.path, 0, info.num_bytes, info.mark) for info in self.files()]

    def read(self, rows: Iterable[Row], *, num_ahead: int) -> Generator[Photo, None, None]:  # noqa: ARG002
        """Yield each row with its photo; the format decides how much is in memory at a time."""
        for name, mine in groupby(rows, key=lambda row: row["source"]):
            yield from self.read_file(name, mine)

    @abstractmethod
    def read_file(self, name: str, rows: Iterable[Row]) -> Iterator[Photo]:
        """Yield the photos of rows of one file, in order."""

    def stem(self, name: str) -> str:
        """Return the beginning of the names of a file's photos."""
        return name or self.url.rstrip("/").rpartition("/")[2]


def scan_batch(
    shard: Shard,
    names: Sequence[str | None],
    identities: Sequence[str | None],
    rows: Sequence[int],
    sizes: Sequence[int],
    *,
    group: int = 0,
) -> pa.RecordBatch:
    """Return photos of one file as a batch of `SCAN_SCHEMA`."""
    num = len(names)
    arrays = [
        pa.array(names, pa.string()),
        pa.array(identities, pa.string()),
        pa.repeat(pa.scalar(shard.name, pa.string()), num),
        pa.repeat(pa.scalar(group, pa.int64()), num),
        pa.array(rows, pa.int64()),
        pa.array(sizes, pa.int64()),
        pa.repeat(pa.scalar(shard.mark, pa.string()), num),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SCAN_SCHEMA)


def suffix_of(path: str) -> str:
    """Return the suffix of a name in lower case, "" if it has none."""
    name = path.rpartition("/")[2].lower()
    return "".join(name.rpartition(".")[1:]) if "." in name[1:] else ""


def is_photo(path: str) -> bool:
    """Return whether a name has the suffix of a photo."""
    return path.lower().endswith(PHOTO_SUFFIXES)
