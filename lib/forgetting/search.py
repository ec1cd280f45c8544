"""Searches the data URL and other given places for everything that names the targets. It changes nothing."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lib import parts, storage
from lib.errors import UserError
from lib.faces import card
from lib.faces.export_faces import PLAN_NAME as EXPORT_PLAN_NAME
from lib.faces.tombstones import FOLDER
from lib.forgetting.kinds import MANY, Kind, kind_of, listed
from lib.forgetting.leftovers import is_half_written, listing_in
from lib.forgetting.models import is_run
from lib.forgetting.tables import TableHits, look_for, named_in
from lib.forgetting.targets import IDENTITY, PHOTO, Targets, of_names
from lib.threads import mapped

logger = logging.getLogger(__name__)

_READERS = 8

PHOTOS_FOLDER = "photos"

TEXT_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".html", ".log", ".yaml", ".yml")
MAX_TEXT_BYTES = 64_000_000
"""Texts that no job has made are searched up to this size, to tell the user where the photos are named."""


@dataclass
class Places:
    """The places to search.

    Attributes:
        tables: folders of tables of faces and of embeddings.
        files: URL and kind of each file that can contain a name or a face.
        runs: folders of runs.
        texts: URLs of texts that no job has made.
        exports: folders of faces that were exported for other projects.
        listings: folders with lists of photos that killed jobs have left.
        half_written: files with temporary names.
        origins: folders of photos that were embedded or identified, by the folder of the output, whose names are
            relative to them.
    """

    tables: list[str] = field(default_factory=list)
    files: list[tuple[str, Kind]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    exports: list[str] = field(default_factory=list)
    listings: list[str] = field(default_factory=list)
    half_written: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)

    def targets_in(self, url: str, targets: Targets) -> Targets:
        """Return the targets with the names that they have in a table or file."""
        more: set[str] = set()
        for folder, origin in self.origins.items():
            if f"{url}/".startswith(f"{folder}/"):
                more |= _below_origin(origin, targets.photos)
        return of_names(targets.photos | more, targets.identities) if more else targets


@dataclass
class FileHits:
    """A file that names the targets, or a page beside one that does."""

    url: str
    kind: Kind
    num: int
    sha256: str


def places(data_url: str, others: Sequence[str]) -> Places:
    """Return the places to search: the data URL without the photos, and the other folders or files.

    Raises:
        UserError: another place does not exist, or the storage refuses.
    """
    found = Places()
    files, folders = storage.children(data_url)
    for name in files:
        _add(found, data_url, [name], [0])
    for name in folders:
        if name not in (PHOTOS_FOLDER, FOLDER):
            _add_folder(found, storage.join(data_url, name))
    for url in others:
        if not storage.exists(url):
            raise UserError(f"--also {storage.redacted(url)} is not there: correct the path, or leave it out")
        if any(storage.children(url)) and storage.children(url) != ([url.rpartition("/")[2]], []):
            _add_folder(found, url)
        else:
            _add(found, url.rpartition("/")[0], [url.rpartition("/")[2]], [0])
    found.tables, found.listings = sorted(set(found.tables)), sorted(set(found.listings))
    found.origins = _origins(found)
    return found


def _below_origin(origin: str, photos: Iterable[str]) -> set[str]:
    """Return the photos in a folder, with names relative to it. Only its end is compared: the data may have moved."""
    folders = origin.rstrip("/").split("/")
    ends = [f"{'/'.join(folders[place:])}/" for place in range(len(folders))]
    return {name.removeprefix(end) for name in photos for end in ends if name.startswith(end)}


def _origins(found: Places) -> dict[str, str]:
    """Return for each output of a folder of photos that folder."""
    origins = {}
    outputs = {url.rpartition("/")[0] for url, kind in found.files if kind.what in ("matches", "figures")}
    for url in found.tables:
        success_url = storage.join(url, parts.SUCCESS_NAME)
        origin = storage.read_json(success_url).get("photos") if storage.exists(success_url) else None
        if isinstance(origin, str):
            # identify and evaluate keep their embeddings below their output.
            above = url.rpartition("/embeddings")[0]
            origins[above if above in outputs else url] = origin
    return origins


def _add_folder(found: Places, url: str) -> None:
    listing = list(storage.list_files(url, skip_prefixes=()))
    _add(found, url, [info.path for info in listing], [info.num_bytes for info in listing])


def _add(found: Places, root: str, paths: Sequence[str], sizes: Sequence[int]) -> None:
    markers = (parts.SUCCESS_NAME, parts.PLAN_NAME)
    tables = {path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] in markers}
    found.tables += [storage.join(root, path) if path else root for path in tables]
    for path, num_bytes in zip(paths, sizes, strict=True):
        folder, _, name = path.rpartition("/")
        if (listing := listing_in(path)) is not None:
            found.listings.append(storage.join(root, listing))
            continue
        if is_half_written(path):
            found.half_written.append(storage.join(root, path))
            continue
        in_table = folder in tables and (name in card.NAMES or name in markers)
        url = storage.join(root, path)
        if in_table or parts.PART_PREFIX in path or folder.endswith((parts.VERSIONS_FOLDER, parts.MANIFEST_FOLDER)):
            continue
        if name == EXPORT_PLAN_NAME:
            found.exports.append(url.rpartition("/")[0])
        elif name == "config.json":
            if is_run(url):
                found.runs.append(url.rpartition("/")[0])
        elif (kind := kind_of(path)) is not None:
            found.files.append((url, kind))
        elif name.lower().endswith(TEXT_SUFFIXES) and num_bytes <= MAX_TEXT_BYTES:
            found.texts.append(url)


def resolved(where: Places, given: Targets) -> tuple[Targets, Targets]:
    """Return the targets with all photos of their identities, and the given names that are found anywhere.

    Searches tables and lists of identities.
    """
    rows: set[tuple[str, str | None]] = set()
    for url in where.tables:
        rows |= named_in(url, given)
    for url, kind in where.files:
        if kind.what == "list of identities":
            for _, photo, identity in listed(storage.read_bytes(url), given):
                if given.holds(PHOTO, photo) or given.holds(IDENTITY, identity):
                    rows.add((photo, identity))
    photos = {photo for photo, identity in rows if given.holds(IDENTITY, identity)}
    there = {photo for photo, _ in rows}
    people = given.identities & {identity for _, identity in rows if identity is not None}
    return of_names(given.photos | photos, given.identities), of_names(given.photos & there, people)


def tables_with(where: Places, targets: Targets) -> list[TableHits]:
    """Return the tables that name the targets."""
    hits = [look_for(url, where.targets_in(url, targets)) for url in where.tables]
    return [each for each in hits if each.rows]


def files_with(where: Places, targets: Targets, tables: Sequence[TableHits]) -> list[FileHits]:
    """Return the files that name the targets, and pages and pictures beside or above them."""
    looked = list(_looked_at(where, targets))
    named = [each.url for each in looked if each.num and not each.kind.is_removed] + [each.url for each in tables]
    return [each for each in looked if each.num or (each.kind.is_removed and _is_beside(each.url, named))]


def _is_beside(page_url: str, named: Sequence[str]) -> bool:
    folder = page_url.rpartition("/")[0]
    return any(url.startswith(f"{folder}/") for url in named)


def _looked_at(where: Places, targets: Targets) -> Iterator[FileHits]:
    def look(file: tuple[str, Kind]) -> FileHits | None:
        url, kind = file
        data = _content(url)
        if data is None:
            return None
        num = _counted(kind.without, url, data, where.targets_in(url, targets))
        return FileHits(url, kind, num, hashlib.sha256(data).hexdigest())

    with mapped(look, where.files, num_threads=_READERS) as found:
        yield from (hits for hits in found if hits)


def _content(url: str) -> bytes | None:
    try:
        return storage.read_bytes(url)
    except FileNotFoundError:  # removed meanwhile
        return None


def _counted(without: Callable[[bytes, Targets], tuple[bytes, int]], url: str, data: bytes, targets: Targets) -> int:
    try:
        return without(data, targets)[1]
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(
            f"{storage.redacted(url)} cannot be searched ({error}): mend or remove it, and run this again"
        ) from error


def texts_with(where: Places, targets: Targets) -> list[str]:
    """Return the texts that name a photo and that no job has made. They belong to the user, who is told of them.

    Looks for the first `MANY` photos.
    """
    names = [name.encode("utf-8", "surrogateescape") for name in sorted(targets.photos)[:MANY]]

    def holds(url: str) -> bool:
        data = _content(url)
        return data is not None and any(name in data for name in names)

    with mapped(holds, where.texts, num_threads=_READERS) as named:
        return [url for url, is_named in zip(where.texts, named, strict=True) if is_named]
