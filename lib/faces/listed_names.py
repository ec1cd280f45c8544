"""Finds the photo of a name in a list. Lists often spell names differently from the disk."""

import os
import unicodedata
from collections.abc import Iterable

import pyarrow as pa

from lib.faces.photo_database import PhotoDatabase

LISTED = "number bigint, name varchar, stored varchar, identity varchar, is_bytes boolean, photo varchar"
"""The columns of the table `lines`: the number of each line, the name as it is written and as in a table, the identity,
whether there are bytes that are not UTF-8, and the photo with this name, null if there is none."""


def find_photos(database: PhotoDatabase, folder: str) -> None:
    """Set the column `photo` of the table `lines` to the photo of the table `scanned` that each line names.

    A list may differ from the disk in `./` or the folder's own name in front, in backslashes, in the form of accents
    (NFC, NFD), and in the suffix. For photos in archives it may leave out the archive, and the folders in it that all
    of them share. A name that fits two photos is used for neither.
    """
    # A name that is not UTF-8 is written as on the disk, or as in a table.
    _match(database, "scanned m on m.photo = lines.stored")
    if database.value("select count(*) from lines where photo is null and name <> stored"):
        _match(database, "scanned m on m.photo = lines.name")
    if not _num_unmatched(database):
        return
    _make_keys(database)
    for above in ("", *_folders_of_archives(database)):
        if not _num_unmatched(database):
            break
        _make_wanted(database, folder, above)
        for wanted, of in (("key", "keys"), ("key_stem", "stems"), ("below", "keys"), ("below_stem", "stems")):
            if _num_unmatched(database):
                found = f"(select wanted.number, {of}.photo from wanted join {of} on {of}.key = wanted.{wanted})"
                _match(database, f"{found} m on m.number = lines.number")
        database.run("drop table wanted")
    for name in ("keys", "stems"):
        database.run(f"drop table {name}")


def _folders_of_archives(database: PhotoDatabase) -> list[str]:
    """Return the folders that all photos share, outermost first, if all of them are in archives."""
    num_files, first, last = database.rows(
        "select count(*) filter (where source is null), min(photo), max(photo) from scanned"
    )[0]
    if num_files or first is None:
        return []
    common = os.path.commonpath([name.rpartition("/")[0] for name in (first, last)])
    parts = common.split("/") if common else []
    return ["/".join([*parts[:num], ""]) for num in range(1, len(parts) + 1)]


def _num_unmatched(database: PhotoDatabase) -> int:
    return int(database.value("select count(*) from lines where photo is null"))


def _match(database: PhotoDatabase, joined: str) -> None:
    """Set null values of the column `photo` of the table `lines` to the photo of the joined table `m`.

    There is one join at a time, into a new table: several joins, or an update, would need too much memory.
    """
    database.run(
        f"""create table matched as select lines.number, lines.name, lines.stored, lines.identity, lines.is_bytes,
        coalesce(lines.photo, m.photo) as photo from lines left join {joined}"""
    )
    database.run("drop table lines")
    database.run("alter table matched rename to lines")


def _make_keys(database: PhotoDatabase) -> None:
    """Make the tables `keys` and `stems`: the photos that alone have a key, or a key without suffix."""
    database.run("create table of_photos (photo varchar, key varchar, stem varchar)")
    for batch in database.batches("select photo from scanned"):
        photos = batch.column(0).to_pylist()
        keys = [key_of(photo) for photo in photos]
        database.append("of_photos", _table(photo=photos, key=keys, stem=map(stem_of, keys)))
    for name, key in (("keys", "key"), ("stems", "stem")):
        database.run(
            f"""create table {name} as select {key} as key, any_value(photo) as photo from of_photos
            group by {key} having count(*) = 1"""
        )
    database.run("drop table of_photos")


def _make_wanted(database: PhotoDatabase, folder: str, above: str) -> None:
    """Make the table `wanted` of the keys of lines without a photo, with and without the folder's name.

    They begin with the folder `above`, if there is one.
    """
    database.run(
        "create table wanted (number bigint, key varchar, key_stem varchar, below varchar, below_stem varchar)"
    )
    for batch in database.batches("select number, name from lines where photo is null"):
        keys = [above + key_of(name) for name in batch.column(1).to_pylist()]
        below = [key.removeprefix(f"{folder}/") for key in keys]
        names = _table(key=keys, key_stem=map(stem_of, keys), below=below, below_stem=map(stem_of, below))
        database.append("wanted", names.add_column(0, "number", batch.column(0)))


def _table(**columns: Iterable[str]) -> pa.Table:
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def key_of(name: str) -> str:
    """Return the normal spelling of a name: composed accents, slashes, no `./` in front."""
    path = (name if name.isascii() else unicodedata.normalize("NFC", name)).replace("\\", "/")
    while path.startswith("./"):
        path = path[2:]
    return path


def stem_of(key: str) -> str:
    """Return a name without its suffix."""
    stem, dot, suffix = key.rpartition(".")
    return stem if dot and "/" not in suffix and stem and not stem.endswith("/") else key
