"""The identity of each photo, from a file such as identities.txt in any usual dialect, or from the photos' folders."""

import io
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from lib import storage
from lib.errors import UserError
from lib.faces.identity_dialects import Dialect, dialect_of
from lib.faces.listed_names import LISTED, find_photos
from lib.faces.photo_database import PhotoDatabase
from lib.faces.photo_names import safe_name, stored_name
from lib.local_files import refuse_special
from lib.ranged_files import RangedFile

logger = logging.getLogger(__name__)

NOBODY = ("nan", "NaN", "None", "null", "NULL", "<NA>", "N/A", "n/a", "#N/A", "NaT")
"""How pandas, Spark and spreadsheets write a missing value. Blank text means the same."""

SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval")

ANY_LISTED = 1e-9
"""With this share one listed photo is enough."""

_MAX_NAMED = 5
_MAX_SAMPLED = 500
_LINES_AT_ONCE = 65_536

Line = tuple[int, str]
"""The number of a line, from 1, and its text."""


def identity_or_nobody(identity: str | None) -> str | None:
    """Return the identity without blanks around it; None if it means a missing value."""
    stripped = identity and identity.strip()
    return None if not stripped or stripped in NOBODY else stripped


def read_identities(url: str, database: PhotoDatabase, *, photos_url: str, min_listed_share: float) -> None:
    """Make the table `listed` of photo and identity. Photos of the table `scanned` have their names on disk there.

    A line is "photo-name identity", or CSV with commas, semicolons or tabs, with or without a header, in either order.
    The dialect that names the most photos is taken.

    Raises:
        UserError: the file cannot be read so, or less than `min_listed_share` of the photos it lists exist.
    """
    folder = photos_url.rstrip("/").rpartition("/")[2]
    database.run("create table listed (photo varchar, identity varchar)")
    first, sample = _sample(url)
    if first is None:
        return
    dialect = dialect_of(first, sample, lambda names: _found(database, names, folder))
    faults = _Faults()
    database.run(f"create table lines ({LISTED})")
    lines = itertools.islice(_numbered(url), dialect.has_header, None)
    while batch := list(itertools.islice(lines, _LINES_AT_ONCE)):
        database.append("lines", _parsed(batch, dialect, faults))
    faults.refuse(url)
    find_photos(database, folder)
    _check_bytes(url, database)
    _check_doubled(url, database)
    database.run(
        """insert into listed select coalesce(photo, stored), any_value(identity) from lines
        group by coalesce(photo, stored)"""
    )
    _tell(url, database, faults)
    _check_share(url, photos_url, database, min_listed_share)
    database.run("drop table lines")


@dataclass
class _Faults:
    """The faults in a list: the number of lines of each kind, and the first few of them."""

    num: dict[str, int] = field(default_factory=lambda: {"malformed": 0, "outside": 0, "nobody": 0})
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, what: str) -> None:
        """Count a line."""
        self.num[kind] += 1
        if len(named := self.first.setdefault(kind, [])) < _MAX_NAMED:
            named.append(what)

    def refuse(self, url: str) -> None:
        """Raise UserError if there are lines that cannot be used."""
        shown = storage.redacted(url)
        if self.num["malformed"]:
            raise UserError(
                f'{shown}: {self.num["malformed"]} lines are not "photo-name identity", such as line '
                f"{', '.join(self.first['malformed'])}: mend them"
            )
        if self.num["outside"]:
            raise UserError(
                f"{shown}: {some(self.first['outside'], self.num['outside'])} leads out of the photo folder: only "
                "names below it are read"
            )


def _parsed(batch: Sequence[Line], dialect: Dialect, faults: _Faults) -> pa.Table:
    """Return the good lines as rows of `LISTED`."""
    numbers, names, stored_names, identities, others = [], [], [], [], []
    for number, line in batch:
        fields = dialect.fields(line)
        if fields is None:
            faults.add("malformed", str(number))
            continue
        name, text = fields
        if not safe_name(name):
            faults.add("outside", f"line {number} ({name})")
            continue
        stored = stored_name(name)
        identity = identity_or_nobody(stored_name(text))
        if identity is None:
            faults.add("nobody", text)
        is_text = _is_utf8(name)
        numbers.append(number)
        names.append(name if is_text else stored)
        stored_names.append(stored)
        identities.append(identity)
        others.append(not is_text or not _is_utf8(text))
    nothing = pa.nulls(len(numbers), pa.string())
    return pa.table(
        {
            "number": pa.array(numbers, pa.int64()),
            "name": pa.array(names, pa.string()),
            "stored": pa.array(stored_names, pa.string()),
            "identity": pa.array(identities, pa.string()),
            "is_bytes": pa.array(others, pa.bool_()),
            "photo": nothing,
        }
    )


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in text)


def _check_bytes(url: str, database: PhotoDatabase) -> None:
    """Raise UserError for bytes that are not UTF-8, unless the line names a photo that exists.

    Names on disk may have any bytes, and then a list of them has too.
    """
    number = database.value("select min(number) from lines where is_bytes and photo is null")
    if number is not None:
        raise UserError(f"{storage.redacted(url)} is not UTF-8 text (line {number}): save it as UTF-8")


def _check_doubled(url: str, database: PhotoDatabase) -> None:
    """Raise UserError if one photo has two identities."""
    doubled = """from lines join (
        select coalesce(photo, stored) as key, min(number) as first from lines group by key
        having count(distinct coalesce('=' || identity, '')) > 1) on coalesce(photo, stored) = key
        join (select number as of_first, identity as other from lines) on of_first = first
        where identity is distinct from other"""
    num = database.value(f"select count(*) {doubled}")
    if num:
        rows = database.rows(f"select number, name, other, identity {doubled} order by number limit {_MAX_NAMED}")
        named = [f"line {number} ({name}: {other} and {identity})" for number, name, other, identity in rows]
        raise UserError(f"{storage.redacted(url)}: {some(named, num)} has two identities: keep the right one")


def _tell(url: str, database: PhotoDatabase, faults: _Faults) -> None:
    if faults.num["nobody"]:
        logger.warning(
            "%s: %d photos have no identity (%r)",
            *(storage.redacted(url), faults.num["nobody"], faults.first["nobody"][0]),
        )
    alike = "from lines where photo is not null and photo not in (name, stored)"
    num, first = database.rows(f"select count(*), arg_min(name || ' for ' || photo, number) {alike}")[0]
    if num:
        logger.warning(
            "%d names of identities in %s are not quite those of the photos, such as %s: taken for the same",
            *(num, storage.redacted(url), first),
        )


def _check_share(url: str, photos_url: str, database: PhotoDatabase, min_listed_share: float) -> None:
    num = database.value("select count(*) from listed")
    num_found = database.value("select count(*) from listed semi join scanned using (photo)")
    absent = database.value("select arg_min(name, number) from lines where photo is null")
    if num_found < min_listed_share * num:
        unlisted = database.value("select min(photo) from scanned anti join listed using (photo)")
        there = f"there lies {unlisted}" if unlisted else "no photo lies there"
        accepted = ", or accept it with --min-listed-share 0" if min_listed_share > ANY_LISTED else ""
        raise UserError(
            f"{storage.redacted(url)} lists {num} photos, and {num_found} of them lie in "
            f"{storage.redacted(photos_url)}: it lists {absent}, {there}: make the names the same, or correct --photos "
            f"or --identities{accepted}"
        )
    if num_found < num:
        logger.warning(
            "%d of the %d photos of %s are missing, such as %s",
            *(num - num_found, num, storage.redacted(url), absent),
        )


def folder_identities(database: PhotoDatabase, name: str) -> str:
    """Return the SQL for the folder of each photo of the table `scanned`; null for a photo in no folder.

    `name` is the SQL for the photo's name. Folders such as train/ and val/ above the people's folders are no part of an
    identity, because one person may be in both.
    """
    folder = f"nullif(rtrim(left({name}, length({name}) - strpos(reverse({name}), '/') + 1), '/'), {name})"
    top = f"split_part({name}, '/', 1)"
    tops = ", ".join(f"'{each}'" for each in SPLIT_FOLDERS)
    deep = f"length({name}) - length(replace({name}, '/', '')) >= 2"
    asked = f"select distinct {top} from scanned where {deep} and lower({top}) in ({tops})"
    splits = {each for (each,) in database.rows(asked)}
    if not splits:
        return folder
    found = ", ".join("'" + each.replace("'", "''") + "'" for each in splits)
    if len(splits) == 1 and database.value(f"select count(*) from scanned where {top} not in ({found})"):
        return folder
    logger.warning(
        "%s above the people's folders are taken for splits of another tool: a person is the folder below them; the "
        "split is made anew by --split-seed",
        ", ".join(f"{each}/" for each in sorted(splits)),
    )
    return f"case when {top} in ({found}) and {deep} then substr({folder}, length({top}) + 2) else {folder} end"


def _found(database: PhotoDatabase, names: Sequence[str], folder: str) -> set[str]:
    """Return which of a few names are those of photos that exist."""
    database.run(f"create or replace table lines ({LISTED})")
    texts = [name if _is_utf8(name) else stored_name(name) for name in names]
    rows = {
        "number": pa.array(range(len(names)), pa.int64()),
        "name": pa.array(texts, pa.string()),
        "stored": pa.array(map(stored_name, names), pa.string()),
        "identity": pa.nulls(len(names), pa.string()),
        "is_bytes": pa.nulls(len(names), pa.bool_()),
        "photo": pa.nulls(len(names), pa.string()),
    }
    database.append("lines", pa.table(rows))
    find_photos(database, folder)
    found = {names[number] for (number,) in database.rows("select number from lines where photo is not null")}
    database.run("drop table lines")
    return found


def _numbered(url: str) -> Iterator[Line]:
    """Yield the lines that are not blank, with their numbers. Bytes that are not UTF-8 become surrogates."""
    if storage.is_local(url):
        refuse_special(url)
    with io.BufferedReader(RangedFile(url)) as file:
        # Not `splitlines`: names may contain the rarer line ends that it knows.
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=None)
        for number, line in enumerate(text, 1):
            if line.strip():
                yield number, line.strip("\n")


def _sample(url: str) -> tuple[str | None, list[str]]:
    """Return the first line, and a sample of lines spread evenly over the file."""
    first, sample, step = None, [], 1
    for place, (_, line) in enumerate(_numbered(url)):
        first = line if first is None else first
        if place % step == 0:
            sample.append(line)
        if len(sample) > 2 * _MAX_SAMPLED:
            sample, step = sample[::2], 2 * step
    return first, sample


def some(items: Sequence[str], num: int) -> str:
    """Return a text of the first items, and how many more of the `num` there are."""
    return ", ".join(items) + (f" and {num - len(items)} more" if num > len(items) else "")
