"""The planned photos of a table as Parquet files, from which each worker reads the rows of its parts.

Once the list of photos is stored beside the table, a job that starts again reads it, and lists no folder again.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from lib import storage
from lib.errors import UserError
from lib.faces.manifest import MANIFEST_SCHEMA
from lib.parts import digest_of

MADE_OF = "made_of"
PLAN_SCHEMA = MANIFEST_SCHEMA.append(pa.field(MADE_OF, pa.int64()))
"""Columns of planned photos. `made_of` is a hash of all that decides a photo's rows, except identity and split."""

ROWS_A_GROUP = 4096
"""Few, because a worker reads whole groups, and a part has 1,000 rows at most."""
ROWS_A_SHARD = 128 * 1024
"""Few, because each part reads what a shard says of all its groups."""

_PARTS_NAME, _LISTED_NAME = "parts.parquet", "listed.json"
_PARTS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("shard", pa.int64()),
        pa.field("start", pa.int64()),
        pa.field("stop", pa.int64()),
        pa.field("names", pa.string()),
    ]
)
_LISTED = {"of": str, "layout": dict, "num_photos": int, "num_bytes": int, "num_passed_over": dict, "num_shards": int}


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows `start` to `stop` of a shard of the planned photos, and the file they become in each split."""

    key: str
    shard: int
    start: int
    stop: int
    names: Mapping[str, str]

    def __len__(self) -> int:
        return self.stop - self.start

    def file_names(self) -> list[str]:
        """Return the files of this part below the faces folder."""
        return list(self.names.values())


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """All parts of a table.

    Attributes:
        url: of the folder with the planned photos, in the order of the parts, as in `PLAN_SCHEMA`.
        layout: entries of the plan, so that later parts have the same borders.
        num_forgotten: photos left out because they, or the people in them, were forgotten.
        owner: the object that removes the folder, if it is on a scratch disk.
    """

    url: str
    parts: list[Part]
    layout: dict[str, Any]
    num_photos: int
    num_bytes: int
    num_passed_over: Mapping[str, int]
    num_forgotten: int = 0
    owner: Any = field(default=None, repr=False)

    def file_names(self) -> list[str]:
        """Return the files of all parts."""
        return [name for part in self.parts for name in part.file_names()]

    def renamed(self, names: Mapping[str, str]) -> "PartPlan":
        """Return the plan with new names for some of its files."""
        parts = [
            replace(part, names={split: names.get(name, name) for split, name in part.names.items()})
            for part in self.parts
        ]
        return replace(self, parts=parts)

    def rows(self, part: Part) -> pa.Table:
        """Return the planned photos of a part."""
        return read_rows(self.url, part.shard, part.start, part.stop)

    def stored(self, url: str, of: str) -> "PartPlan":
        """Copy the planned photos into a folder, and return the plan that reads them there. `of` tells lists apart.

        Each plan has a subfolder of its own. So if two jobs plan at once, the workers of one never read the other's.
        """
        folder = digest_of(sorted(self.file_names()))
        inner_url = storage.join(url, folder)
        num_shards = 1 + max((part.shard for part in self.parts), default=-1)
        for number in range(num_shards):
            copy_shard(self.url, inner_url, number)
        rows = [{**vars(part), "names": json.dumps(dict(part.names))} for part in self.parts]
        storage.write_parquet(storage.join(inner_url, _PARTS_NAME), pa.Table.from_pylist(rows, schema=_PARTS_SCHEMA))
        about = {"of": of, "layout": self.layout, "num_photos": self.num_photos, "num_bytes": self.num_bytes}
        more = {"num_passed_over": dict(self.num_passed_over), "num_shards": num_shards, "folder": folder}
        more |= {"num_forgotten": self.num_forgotten}
        storage.write_json(storage.join(url, _LISTED_NAME), {**about, **more})
        return replace(self, url=inner_url, owner=None)


def stored_plan(url: str, of: str) -> PartPlan | None:
    """Return the plan that `PartPlan.stored` wrote into a folder; None if it is incomplete or of another list."""
    listed_url = storage.join(url, _LISTED_NAME)
    if not storage.exists(listed_url):
        return None
    about = storage.read_json(listed_url, _LISTED)
    if about["of"] != of or not re.fullmatch(r"[0-9a-f]+", str(about.get("folder"))):
        return None
    url = storage.join(url, about["folder"])
    rows = storage.read_parquet(storage.join(url, _PARTS_NAME), list(_PARTS_SCHEMA)).to_pylist()
    parts = [Part(**{**row, "names": json.loads(row["names"])}) for row in rows]
    wanted = ("layout", "num_photos", "num_bytes", "num_passed_over")
    forgotten = int(about.get("num_forgotten", 0))
    return PartPlan(url=url, parts=parts, num_forgotten=forgotten, **{name: about[name] for name in wanted})


def copy_shard(from_url: str, to_url: str, number: int) -> None:
    """Copy a shard of planned photos from one folder to another."""
    storage.write_bytes(_shard_url(to_url, number), storage.read_bytes(_shard_url(from_url, number)))


def read_rows(url: str, shard: int, start: int, stop: int) -> pa.Table:
    """Return rows of a shard of planned photos; of a remote one, only their row groups are read.

    Raises:
        UserError: the shard is gone or was changed.
    """
    shard_url = _shard_url(url, shard)
    with storage.open_parquet(shard_url, list(PLAN_SCHEMA)) as file:
        first, skipped, groups = 0, 0, []
        for number in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(number).num_rows
            if end <= start:
                skipped = end
            elif first < stop:
                groups.append(number)
            first = end
        rows = file.read_row_groups(groups).slice(start - skipped, stop - start)
    if len(rows) != stop - start:
        raise UserError(
            f"{storage.redacted(shard_url)} has fewer rows than planned: remove its folder and run it again"
        )
    return rows


class PlanWriter:
    """Writes planned photos as shards on this machine. A part is in one shard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._shard, self._num_rows = -1, 0
        self._file: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def add(self, rows: pa.Table) -> tuple[int, int]:
        """Write the rows of a part; return the number of its shard, and the place of its first row there."""
        if self._file is None or self._num_rows >= ROWS_A_SHARD:
            self._close()
            self._shard, self._num_rows = self._shard + 1, 0
            self._file = pq.ParquetWriter(_shard_url(str(self.folder), self._shard), PLAN_SCHEMA, compression="zstd")
        start = self._num_rows
        self._num_rows += len(rows)
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= ROWS_A_GROUP:
            self._write()
        return self._shard, start

    def _write(self) -> None:
        if self._waiting:
            assert self._file is not None
            self._file.write_table(pa.concat_tables(self._waiting), row_group_size=ROWS_A_GROUP)
            self._waiting = []

    def _close(self) -> None:
        self._write()
        if self._file is not None:
            self._file.close()
            self._file = None


def _shard_url(url: str, number: int) -> str:
    return storage.join(url, f"photos-{number:05d}.parquet")
