"""The changes between the finished version of a faces table and the present photos."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.photo_database import PhotoDatabase
from lib.faces.plan_files import MADE_OF, PartPlan
from lib.parts import Found, made_again, next_version
from lib.threads import mapped

logger = logging.getLogger(__name__)

MAX_GONE_SHARE = 0.5
"""Share of the photos of the finished version that may be gone. If more are gone, --photos is probably wrong."""

_READERS = 16
_COMPARED = ["photo", MADE_OF, "identity"]


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
    """Return how the present photos differ from those of the finished version; reads only parts that differ.

    Raises:
        UserError, JobError: an older part cannot be read.
    """
    assert found.success is not None
    kept = set(names)
    dropped = [name for name in found.success["parts"] if name not in kept and name in found.present]
    added = [part for part in plan.parts if not found.success["parts"].keys() >= set(part.file_names())]
    columns = table.columns("photo", MADE_OF, "identity")
    database = PhotoDatabase()
    for name in ("faces", "now"):
        database.run(f"create table {name} (photo varchar, made_of bigint, identity varchar)")
    with mapped(
        lambda name: storage.read_parquet(storage.join(found.url, name), columns), dropped, num_threads=_READERS
    ) as parts:
        for rows in parts:
            database.append("faces", rows.select(_COMPARED))
    for part in added:
        database.append("now", plan.rows(part).select(_COMPARED))
    photo = "regexp_replace(photo, '#\\d+$', '')" if policy == "all" else "photo"
    database.run(
        f"""create table before as select {photo} as photo, any_value(made_of) as made_of,
        any_value(identity) as identity from faces group by all"""
        if policy == "all"
        else "create view before as from faces"
    )
    in_both = "n.photo is not null and b.photo is not null"
    numbers = database.rows(
        f"""select count(*) filter (b.photo is null),
            count(*) filter ({in_both} and n.made_of <> b.made_of),
            count(*) filter (n.photo is null),
            count(*) filter ({in_both} and n.made_of = b.made_of and n.identity is distinct from b.identity)
        from now n full join before b on n.photo = b.photo"""
    )
    return Changes(*numbers[0])


def refuse_other_photos(found: Found, changed: Changes, photos_url: str) -> None:
    """Raise UserError if most photos of the finished version are gone, because --photos may be wrong."""
    assert found.success is not None
    num_before = int(found.success["counts"].get("photos", 0))
    if changed.gone > MAX_GONE_SHARE * num_before:
        raise UserError(
            f"{changed.gone} of the {num_before} photos of {storage.redacted(found.url)} are not in "
            f"{storage.redacted(photos_url)}: correct --photos, choose another folder by --faces, or replace the table "
            "with --overwrite"
        )


def names_to_retry(found: Found, names: Sequence[str], statuses: Collection[str]) -> dict[str, str]:
    """Return the files to make again for `--retry`: those of the finished version with photos of these statuses.

    Each has its new name beside it.
    """
    finished = [name for name in names if found.success is not None and name in found.success["parts"]]
    wanted, version = pa.array(sorted(statuses), pa.string()), next_version(found)

    def has_any(name: str) -> bool:
        rows = storage.read_parquet(storage.join(found.url, name), table.columns("status"))
        return bool(pc.any(pc.is_in(rows["status"], wanted)).as_py())

    with mapped(has_any, finished, num_threads=_READERS) as chosen:
        return {name: made_again(name, version) for name, again in zip(finished, chosen, strict=True) if again}
