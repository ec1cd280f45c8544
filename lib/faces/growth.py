"""What changed between the finished version of a faces table and the photos of now."""

import logging
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.part_plan import MADE_OF, PartPlan
from lib.parts import Found, made_again, next_version

logger = logging.getLogger(__name__)

MAX_GONE_SHARE = 0.5
"""Photos of the finished version that may be gone. More of them are taken for a wrong --photos."""

_READERS = 16


@dataclass(frozen=True)
class Changes:
    """Numbers of photos."""

    new: int
    changed: int
    gone: int
    relabelled: int

    def __str__(self) -> str:
        numbers = f"{self.new} photos are new, {self.changed} changed, {self.gone} gone"
        return f"{numbers}, {self.relabelled} of another identity"


def changes(found: Found, plan: PartPlan, names: Collection[str], *, policy: str) -> Changes:
    """Return how the photos of now differ from those of the finished version; only parts that differ are read.

    Raises:
        UserError, JobError: an older part cannot be read.
    """
    assert found.success is not None
    dropped = [name for name in found.success["parts"] if name not in names and name in found.present]
    added = [part for part in plan.parts if not found.success["parts"].keys() >= set(part.file_names())]
    columns = table.columns("photo", MADE_OF, "identity")
    before: dict[str, tuple[int, str | None]] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        for rows in pool.map(lambda name: storage.read_parquet(storage.join(found.url, name), columns), dropped):
            for photo, made_of, identity in _values(rows):
                before[re.sub(r"#\d+$", "", photo) if policy == "all" else photo] = made_of, identity
    now = {
        photo: (made_of, identity)
        for part in added
        for photo, made_of, identity in _values(plan.photos.slice(part.start, part.stop - part.start))
    }
    both = now.keys() & before.keys()
    num_changed = sum(now[photo][0] != before[photo][0] for photo in both)
    return Changes(
        new=len(now) - len(both),
        changed=num_changed,
        gone=len(before) - len(both),
        relabelled=sum(now[photo] != before[photo] for photo in both) - num_changed,
    )


def _values(rows: pa.Table) -> Sequence[tuple[str, int, str | None]]:
    return list(zip(*(rows[name].to_pylist() for name in ("photo", MADE_OF, "identity")), strict=True))


def refuse_other_photos(found: Found, changed: Changes, photos_url: str) -> None:
    """Raise UserError where most photos of the finished version are gone: --photos may name another folder."""
    assert found.success is not None
    num_before = int(found.success["counts"].get("photos", 0))
    if changed.gone > MAX_GONE_SHARE * num_before:
        raise UserError(
            f"{changed.gone} of the {num_before} photos of {storage.redacted(found.url)} are not in "
            f"{storage.redacted(photos_url)}: correct --photos, choose another folder by --faces, or replace the table "
            "with --overwrite"
        )


def names_to_retry(found: Found, names: Sequence[str], statuses: Collection[str]) -> dict[str, str]:
    """Return the files to make again for `--retry`: those of the finished version with a photo of these statuses.

    Each comes with the name that it gets.
    """
    finished = [name for name in names if found.success is not None and name in found.success["parts"]]
    wanted, version = pa.array(sorted(statuses), pa.string()), next_version(found)

    def has_any(name: str) -> bool:
        rows = storage.read_parquet(storage.join(found.url, name), table.columns("status"))
        return bool(pc.any(pc.is_in(rows["status"], wanted)).as_py())

    with ThreadPoolExecutor(_READERS) as pool:
        chosen = list(pool.map(has_any, finished))
    return {name: made_again(name, version) for name, again in zip(finished, chosen, strict=True) if again}
