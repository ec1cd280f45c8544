"""The number of people in many parts of a table."""

import pyarrow as pa
import pyarrow.compute as pc

from lib.faces import table
from lib.faces.photo_database import BATCH_ROWS, PhotoDatabase


class People:
    """Counts the people of each split, in a database on disk because there may be millions."""

    def __init__(self) -> None:
        self._database = PhotoDatabase()
        self._database.run("create table people (split varchar, identity varchar)")
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0

    def add(self, split: str, identities: pa.ChunkedArray) -> None:
        """Count the people of a part."""
        identities = pc.unique(identities).drop_null()
        if not len(identities):
            return
        splits = pa.repeat(pa.scalar(split), len(identities))
        self._waiting.append(pa.table({"split": splits, "identity": identities}))
        self._num_waiting += len(identities)
        if self._num_waiting >= BATCH_ROWS:
            self._write()

    def by_split(self) -> dict[str, int]:
        """Return the number of identities of each split."""
        self._write()
        counts = dict(self._database.rows("select split, count(distinct identity) from people group by split"))
        return {split: counts.get(split, 0) for split in table.SPLITS}

    def num(self) -> int:
        """Return the number of identities of all splits together."""
        self._write()
        return int(self._database.value("select count(distinct identity) from people"))

    def _write(self) -> None:
        if self._waiting:
            self._database.append("people", pa.concat_tables(self._waiting))
            self._waiting, self._num_waiting = [], 0
