"""The manifest: every input photo with its identity and split, in an order that depends on the names alone."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.identities import ANY_LISTED, folder_identities, read_identities
from lib.faces.photo_database import PhotoDatabase, columns_of, quoted
from lib.faces.scanning import check_scanned, scan
from lib.faces.sources.folder import FolderSource
from lib.faces.sources.source import ContainerSource, Source
from lib.faces.splits import Splits, names_in

logger = logging.getLogger(__name__)

MIN_LISTED_SHARE = 0.5
"""Share of the photos in a list that must exist, unless a flag says otherwise."""

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("photo", pa.string(), nullable=False),
        pa.field("identity", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("status", pa.string()),  # missing or no_identity if there is nothing to detect, else null
        pa.field("source", pa.string()),  # these five as in `SCAN_SCHEMA`
        pa.field("group", pa.int64()),
        pa.field("row", pa.int64()),
        pa.field("num_bytes", pa.int64()),
        pa.field("mark", pa.string()),
    ]
)

_NOTHING = "null::varchar, null::bigint, null::bigint, 0, ''"
"""The five columns of `SCAN_SCHEMA` for a photo that does not exist."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All input photos.

    Attributes:
        database: has them in the table `photos`: the columns of `MANIFEST_SCHEMA`, and `place`, the position in the
        order
            of the files that contain them.
        in_files: one file contains many photos. Otherwise each photo is a file.
        num_bytes: size of the photos, or of their Parquet columns. It shows that photos changed but kept their names.
        num_passed_over: number of files that are no photos: by suffix, as `hidden`, or by their junk folder.
    """

    database: PhotoDatabase
    num: int
    in_files: bool
    num_bytes: int = 0
    num_passed_over: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.num

    @classmethod
    def of(cls, photos: pa.Table, num_bytes: int = 0, num_passed_over: Mapping[str, int] | None = None) -> "Manifest":
        """Return a manifest of rows as in `MANIFEST_SCHEMA`."""
        database = PhotoDatabase()
        database.run(f"create table photos ({columns_of(MANIFEST_SCHEMA)}, place bigint)")
        database.append("photos", photos.append_column("place", pa.array(range(len(photos)), pa.int64())))
        in_files = photos["row"].null_count < len(photos)
        return cls(
            database=database,
            num=len(photos),
            in_files=in_files,
            num_bytes=num_bytes,
            num_passed_over=num_passed_over or {},
        )

    @property
    def photos(self) -> pa.Table:
        """All rows, in memory; sorted by split and name, or in the order of the files that contain them."""
        return self.database.table(self._ordered(MANIFEST_SCHEMA.names), MANIFEST_SCHEMA)

    def only(self, condition: str) -> "Manifest":
        """Keep only the photos that match a condition in SQL, and return their manifest."""
        self.database.run(f"create table kept as select * from photos where {condition}")
        self.database.run("drop table photos")
        self.database.run("alter table kept rename to photos")
        return replace(self, num=self.database.value("select count(*) from photos"))

    def with_unnamed(self) -> "Manifest":
        """Look at the photos that a list does not name, too; drop those that it names and that are not there."""
        present = self.only(f"status is distinct from '{table.MISSING}'")
        self.database.run(f"update photos set status = null where status = '{table.NO_IDENTITY}'")
        return present

    def old_digest(self) -> str:
        """Return the hash of names, identities and splits by which tables without versions know their input."""
        digest = hashlib.sha256()
        for name in ("photo", "identity", "split", "status", "source", "group", "row"):
            if name == "group" and not self.database.value('select count("group") from photos'):
                continue  # such digests are older than this column
            for batch in self.database.batches(self._ordered([name])):
                digest.update("".join(f"{value!r}\n" for value in batch.column(0).to_pylist()).encode())
        return digest.hexdigest()[:16]

    def _ordered(self, names: Sequence[str]) -> str:
        return f"select {quoted(names)} from photos order by {'place' if self.in_files else 'split, photo'}"


def read_manifest(
    source: Source,
    identities_url: str | None,
    *,
    split_seed: int = 0,
    splits: Splits | None = None,
    identities_required: bool,
    min_listed_share: float = MIN_LISTED_SHARE,
    exclude: Sequence[str] = (),
    kept_url: str | None = None,
) -> Manifest:
    """List the photos of a source, with the identity and split of each.

    `identities_url` may be None, or name a file that does not exist. Then the identities come from the source, or from
    the photos' folders. A photo may have none if `identities_required` is False. Below `kept_url` the listing of a
    large folder is kept, for a job that goes on.

    Raises:
        UserError: there are no photos, or the identities file cannot be trusted.
    """
    database = PhotoDatabase()
    has_list = identities_url is not None and storage.exists(identities_url)
    num, num_bytes = scan(source, database, kept_url)
    check_scanned(source, database, num, has_list=has_list)
    if has_list:
        share = min_listed_share if source.list_url is None else ANY_LISTED  # a list of photos may name a few of them
        read_identities(identities_url or "", database, photos_url=source.url, min_listed_share=share)
        _join(database, source, required=identities_required)
    else:
        _take_identities(source, database, identities_url, required=identities_required)
    chosen = splits or Splits(seed=split_seed)
    _assign_splits(database, _without(chosen, exclude, database) if exclude else chosen)
    return Manifest(
        database=database,
        num=database.value("select count(*) from photos"),
        in_files=not isinstance(source, FolderSource),
        num_bytes=num_bytes,
        num_passed_over=dict(source.passed_over),
    )


def _join(database: PhotoDatabase, source: Source, *, required: bool) -> None:
    """Make the table `known` of photos with the identities of the table `listed`.

    In a folder, listed photos that do not exist become rows too, and a photo without a line has no identity. A list of
    photos is complete by itself.
    """
    in_folder = isinstance(source, FolderSource)
    nobody = f"case when l.identity is null then '{table.NO_IDENTITY}' end" if in_folder or required else "null"
    database.run(
        f"""create table known as
        select s.photo, l.identity, {nobody} as status, s.source, s."group", s."row", s.num_bytes, s.mark,
            s.place
        from scanned s left join listed l using (photo)"""
    )
    if in_folder and source.list_url is None:
        database.run(
            f"""insert into known select photo, identity, '{table.MISSING}', {_NOTHING}, null
            from listed anti join scanned using (photo)"""
        )


def _take_identities(source: Source, database: PhotoDatabase, identities_url: str | None, *, required: bool) -> None:
    """Make the table `known` of photos with the identities of the source, or else with their folders as identities."""
    if isinstance(source, FolderSource):
        by_folder, name = True, "photo"
    else:
        has_none = not database.value("select count(identity) from scanned")
        by_folder = isinstance(source, ContainerSource) and source.has_folders and has_none
        name = _inner_name(source, database) if by_folder else "photo"
    identity = folder_identities(database, name) if by_folder else "identity"
    nobody = f"case when identity is null then '{table.NO_IDENTITY}' end" if required else "null::varchar"
    database.run(
        f"""create table known as
        select photo, identity, {nobody} as status, source, "group", "row", num_bytes, mark, place
        from (select * replace ({identity} as identity) from scanned)"""
    )
    if required and isinstance(source, FolderSource) and not database.value("select count(identity) from known"):
        raise UserError(
            f"{storage.redacted(identities_url or 'identities.txt')} is not there, and {storage.redacted(source.url)} "
            'has no folder per identity: write lines of "photo-name identity" into that file, name another by '
            "--identities, or take every face of photos without identities with --faces-policy all"
        )


def _inner_name(source: Source, database: PhotoDatabase) -> str:
    """Return the SQL for the names of photos in archives, without the names of the archives.

    If there are several archives, a photo that is in no folder gets the stem of its archive as folder.
    """
    assert isinstance(source, ContainerSource)
    files = [file for (file,) in database.rows("select distinct source from scanned")]
    database.run("create table stems (source varchar, stem varchar)")
    stems = [source.stem(file) for file in files]
    database.append("stems", pa.table({"source": pa.array(files, pa.string()), "stem": pa.array(stems, pa.string())}))
    stem = "(select any_value(stem) from stems where stems.source is not distinct from scanned.source)"
    below = f"substr(photo, length({stem}) + 2)"
    if len(files) == 1:
        return below
    return f"case when contains({below}, '/') then {below} else split_part({stem}, '.', 1) || '/' || {below} end"


def _without(splits: Splits, exclude: Sequence[str], database: PhotoDatabase) -> Splits:
    """Return the splits without the people in the lists `exclude` among the training people."""
    excluded: set[str] = set()
    num_people = database.value("select count(distinct identity) from known")
    database.run("create table named (name varchar)")
    for url in exclude:
        database.run("delete from named")
        database.append("named", pa.table({"name": pa.array(sorted(names_in(url)), pa.string())}))
        found = {
            identity
            for (identity,) in database.rows(
                """select distinct identity from known where identity in (select name from named)
                or (identity is not null and photo in (select name from named))"""
            )
        }
        (logger.info if found else logger.warning)(
            "%s names %d of the %d people here: they are left out of training",
            *(storage.redacted(url), len(found), num_people),
        )
        excluded |= found
    return replace(splits, excluded=frozenset(excluded))


def _assign_splits(database: PhotoDatabase, splits: Splits) -> None:
    """Make the table `photos` from the table `known` and the split of each photo; drop the other tables."""
    database.run("create table split_of (photo varchar, identity varchar, split varchar)")
    if splits.by_identity:
        asked = """select null::varchar as photo, identity from (select distinct identity from known)
            where identity is not null union all select photo, null from known where identity is null"""
    else:
        asked = "select photo, identity from known"
    for batch in database.batches(asked):
        photos, identities = (column.cast(pa.string()) for column in batch.columns)
        chosen = map(splits.of, photos.to_pylist(), identities.to_pylist())
        columns = {"photo": photos, "identity": identities, "split": pa.array(chosen, pa.string())}
        database.append("split_of", pa.table(columns))
    database.run(
        """create table photos as
        select k.photo, k.identity, coalesce(p.split, i.split) as split, k.status, k.source, k."group", k."row",
            k.num_bytes, k.mark, k.place
        from known k
        left join (from split_of where photo is not null) p on p.photo = k.photo
        left join (from split_of where photo is null) i on i.identity = k.identity"""
    )
    for name in ("split_of", "known", "scanned"):
        database.run(f"drop table {name}")
