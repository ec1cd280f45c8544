"""Who is in which photo: identities.txt in any of the usual dialects, or the folders of the photos."""

import csv
import itertools
import logging
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lib import storage
from lib.errors import UserError
from lib.faces.photo_names import safe_name, stored_name

logger = logging.getLogger(__name__)

NOBODY = ("nan", "NaN", "None", "null", "NULL", "<NA>", "N/A", "n/a", "#N/A", "NaT")
"""How pandas, Spark and spreadsheets write that there is no value. Blank text says the same."""

SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval")

ANY_LISTED = 1e-9
"""The share of which one listed photo is enough."""

_PHOTO_WORDS = (
    "photo",
    "image",
    "img",
    "file",
    "filename",
    "file_name",
    "path",
    "filepath",
    "name",
    "image_id",
    "image_name",
)
_IDENTITY_WORDS = (
    "identity",
    "id",
    "label",
    "person",
    "person_id",
    "subject",
    "subject_id",
    "class",
    "identity_id",
    "name",
)
_DELIMITERS = (None, "\t", ",", ";")
_MAX_NAMED = 5
_MAX_SAMPLED = 500

Lines = Sequence[tuple[int, str]]


@dataclass(frozen=True)
class _Dialect:
    """How a line is cut, and which of its fields are photo and identity."""

    delimiter: str | None
    photo: int
    identity: int
    has_header: bool = False

    def fields(self, line: str) -> tuple[str, str] | None:
        """Return photo and identity, None where the line is not of this dialect."""
        if self.delimiter is None:
            # The name may hold spaces, the identity none.
            found = line.strip().rsplit(maxsplit=1) if self.photo < self.identity else line.strip().split(maxsplit=1)
        else:
            found = _cut(line, self.delimiter)
        enough = len(found) > max(self.photo, self.identity) if self.has_header else len(found) == 2
        return (found[self.photo], found[self.identity]) if enough and found[self.photo] else None


class Present:
    """The photos that are there, found by their names as lists write them.

    A list may differ from the disk in `./` or the folder's own name in front, in backslashes, in the form of accents
    (NFC, NFD), and in the suffix. A name that two photos would answer to is taken for neither.
    """

    def __init__(self, names: Collection[str], folder: str) -> None:
        self._exact = set(names)
        self._folder = f"{folder}/"
        self._loose: dict[str, str | None] = {}
        self._stems: dict[str, str | None] = {}

    def find(self, name: str) -> str | None:
        """Return the photo that a list means, None where it is not there."""
        # A list has a name of any bytes as the disk has it, or as a table has it.
        for candidate in (stored_name(name), name):
            if candidate in self._exact:
                return candidate
        if not self._loose:
            for photo in self._exact:
                key = self._key(photo)
                self._loose[key] = photo if key not in self._loose else None
                stem = _stem(key)
                self._stems[stem] = photo if stem not in self._stems else None
        key = self._key(name)
        for candidate in (key, key.removeprefix(self._folder)):
            if found := self._loose.get(candidate) or self._stems.get(_stem(candidate)):
                return found
        return None

    @staticmethod
    def _key(name: str) -> str:
        path = unicodedata.normalize("NFC", name).replace("\\", "/")
        while path.startswith("./"):
            path = path[2:]
        return path


def identity_or_nobody(identity: str | None) -> str | None:
    """Return the identity without blanks around it, None where it stands for no value."""
    stripped = identity and identity.strip()
    return None if not stripped or stripped in NOBODY else stripped


def read_identities(
    url: str, names: Collection[str], *, photos_url: str, min_listed_share: float
) -> dict[str, str | None]:
    """Return photo -> identity for the listed photos, by their names on disk where they are there.

    Lines are "photo-name identity", or the columns of CSV with commas, semicolons or tabs, with or without a header, in
    either order: what names the most photos is taken.

    Raises:
        UserError: the file cannot be read so, or under `min_listed_share` of the photos it lists are there.
    """
    present = Present(names, photos_url.rstrip("/").rpartition("/")[2])
    lines = _lines(url, present)
    if not lines:
        return {}
    dialect = _dialect(lines, present)
    listed: dict[str, str | None] = {}
    malformed, outside, doubled, nobodies = [], [], [], []
    num_found, absent, alike = 0, "", []
    for number, line in lines[1 if dialect.has_header else 0 :]:
        fields = dialect.fields(line)
        if fields is None:
            malformed.append(number)
            continue
        name, text = fields
        if not safe_name(name):
            outside.append(f"line {number} ({name})")
            continue
        identity = identity_or_nobody(stored_name(text))
        if identity is None:
            nobodies.append(text)
        found = present.find(name)
        if found is None:
            absent = absent or name
        photo = found or stored_name(name)
        if photo in listed and listed[photo] != identity:
            doubled.append(f"line {number} ({name}: {listed[photo]} and {identity})")
        elif photo not in listed:
            listed[photo] = identity
            num_found += found is not None
            if found and found not in (name, stored_name(name)):
                alike.append(f"{name} for {found}")
    _refuse(url, malformed, outside, doubled)
    _tell(url, nobodies, alike)
    _check_share(url, photos_url, names, listed, num_found, absent, min_listed_share)
    return listed


def _tell(url: str, nobodies: list[str], alike: list[str]) -> None:
    if nobodies:
        logger.warning("%s: %d photos have no identity (%r)", storage.redacted(url), len(nobodies), nobodies[0])
    if alike:
        logger.warning(
            "%d names of identities in %s are not quite those of the photos, such as %s: taken for the same",
            *(len(alike), storage.redacted(url), alike[0]),
        )


def _check_share(
    url: str,
    photos_url: str,
    names: Collection[str],
    listed: Mapping[str, str | None],
    num_found: int,
    absent: str,
    min_listed_share: float,
) -> None:
    if num_found < min_listed_share * len(listed):
        unlisted = next((name for name in sorted(names) if name not in listed), None)
        there = f"there lies {unlisted}" if unlisted else "no photo lies there"
        accepted = ", or accept it with --min-listed-share 0" if min_listed_share > ANY_LISTED else ""
        raise UserError(
            f"{storage.redacted(url)} lists {len(listed)} photos, and {num_found} of them lie in "
            f"{storage.redacted(photos_url)}: it lists {absent}, {there}: make the names the same, or correct --photos "
            f"or --identities{accepted}"
        )
    if num_found < len(listed):
        logger.warning(
            "%d of the %d photos of %s are missing, such as %s",
            *(len(listed) - num_found, len(listed), storage.redacted(url), absent),
        )


def folder_identities(names: Sequence[str]) -> list[str | None]:
    """Return the folder that each photo lies in, None for those in no folder.

    Folders such as train/ and val/ above the people's own are no part of an identity: one person may lie in both.
    """
    folders = [name.rpartition("/")[0] or None for name in names]
    tops = {name.partition("/")[0] for name in names if name.count("/") >= 2}
    splits = {top for top in tops if top.lower() in SPLIT_FOLDERS}
    everything = all(name.partition("/")[0] in splits for name in names)
    if not splits or (len(splits) == 1 and not everything):
        return folders
    logger.warning(
        "%s above the people's folders are taken for splits of another tool: a person is the folder below them; the "
        "split is made anew by --split-seed",
        ", ".join(f"{top}/" for top in sorted(splits)),
    )
    return [_below(folder, splits) for folder in folders]


def _below(folder: str | None, splits: set[str]) -> str | None:
    top, _, rest = (folder or "").partition("/")
    return rest if top in splits and rest else folder


def _stem(key: str) -> str:
    stem, dot, suffix = key.rpartition(".")
    return stem if dot and "/" not in suffix and stem and not stem.endswith("/") else key


def _cut(line: str, delimiter: str) -> list[str]:
    return [field.strip() for field in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])]


def _lines(url: str, present: Present) -> Lines:
    """Return the numbered lines that are not blank."""
    data = storage.read_bytes(url)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", "surrogateescape")
        # Names on disk may be of any bytes. Then a list of them is.
        for number, line in _numbered(text):
            if any("\udc80" <= letter <= "\udcff" for letter in line) and not _names_a_photo(line, present):
                raise UserError(
                    f"{storage.redacted(url)} is not UTF-8 text (line {number}: {error}): save it as UTF-8"
                ) from error
    return list(_numbered(text))


def _names_a_photo(line: str, present: Present) -> bool:
    fields = line.strip().rsplit(maxsplit=1)
    return len(fields) == 2 and present.find(fields[0]) is not None


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    # Not `splitlines`: names may hold its rarer ends of lines.
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if line.strip():
            yield number, line


def _dialect(lines: Lines, present: Present) -> _Dialect:
    """Return the dialect under which the most of a sample of lines name a photo that is there, else look like it."""
    step = max(1, len(lines) // _MAX_SAMPLED)
    sample = [line for _, line in lines[::step]]

    def score(dialect: _Dialect) -> tuple[int, int]:
        fields = [found for line in sample[dialect.has_header :] if (found := dialect.fields(line))]
        suffixed = sum(bool(re.search(r"\.\w{2,5}$", name)) and identity != "" for name, identity in fields)
        return sum(present.find(name) is not None for name, _ in fields), suffixed

    return max(_dialects(lines[0][1]), key=score)  # the first of equals


def _dialects(first_line: str) -> Iterator[_Dialect]:
    for delimiter in _DELIMITERS:
        words = first_line.split() if delimiter is None else _cut(first_line, delimiter)
        words = [word.lower() for word in words]
        photo = next((words.index(word) for word in _PHOTO_WORDS if word in words), None)
        identity = next((words.index(word) for word in _IDENTITY_WORDS if word in words), None)
        is_header = photo is not None and identity is not None and photo != identity
        if is_header and (delimiter is not None or len(words) == 2):
            assert photo is not None
            assert identity is not None
            yield _Dialect(delimiter, photo, identity, has_header=True)
    for delimiter, (photo, identity) in itertools.product(_DELIMITERS, [(0, 1), (1, 0)]):
        yield _Dialect(delimiter, photo, identity)


def _refuse(url: str, malformed: list[int], outside: list[str], doubled: list[str]) -> None:
    shown = storage.redacted(url)
    if malformed:
        numbers = ", ".join(map(str, malformed[:_MAX_NAMED]))
        raise UserError(
            f'{shown}: {len(malformed)} lines are not "photo-name identity", such as line {numbers}: mend them'
        )
    if outside:
        raise UserError(f"{shown}: {_some(outside)} leads out of the photo folder: only names below it are read")
    if doubled:
        raise UserError(f"{shown}: {_some(doubled)} has two identities: keep the right one")


def _some(items: list[str]) -> str:
    more = len(items) - _MAX_NAMED
    return ", ".join(items[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
