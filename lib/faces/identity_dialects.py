"""The dialects of identities files: the delimiter of a line, and which fields are photo and identity."""

import csv
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Dialect:
    """The delimiter of a line, and the places of photo and identity among its fields."""

    delimiter: str | None
    photo: int
    identity: int
    has_header: bool = False

    def fields(self, line: str) -> tuple[str, str] | None:
        """Return photo and identity; None if the line is not of this dialect."""
        if self.delimiter is None:
            # The name may contain spaces, the identity none.
            found = line.strip().rsplit(maxsplit=1) if self.photo < self.identity else line.strip().split(maxsplit=1)
        else:
            found = _cut(line, self.delimiter)
        enough = len(found) > max(self.photo, self.identity) if self.has_header else len(found) == 2
        return (found[self.photo], found[self.identity]) if enough and found[self.photo] else None


def dialect_of(first_line: str, sample: Sequence[str], found: Callable[[Sequence[str]], set[str]]) -> Dialect:
    """Return the dialect in which most lines of a sample name a photo that exists, or else look like a photo's name.

    `found` returns which of some names exist.
    """
    dialects = list(_dialects(first_line))
    fields = [[read for line in sample[dialect.has_header :] if (read := dialect.fields(line))] for dialect in dialects]
    there = found(sorted({name for each in fields for name, _ in each}))

    def score(place: int) -> tuple[int, int]:
        suffixed = sum(bool(re.search(r"\.\w{2,5}$", name)) and identity != "" for name, identity in fields[place])
        return sum(name in there for name, _ in fields[place]), suffixed

    return dialects[max(range(len(dialects)), key=score)]  # the first of equals


def _dialects(first_line: str) -> Iterator[Dialect]:
    for delimiter in _DELIMITERS:
        words = first_line.split() if delimiter is None else _cut(first_line, delimiter)
        words = [word.lower() for word in words]
        photo = next((words.index(word) for word in _PHOTO_WORDS if word in words), None)
        identity = next((words.index(word) for word in _IDENTITY_WORDS if word in words), None)
        is_header = photo is not None and identity is not None and photo != identity
        if is_header and (delimiter is not None or len(words) == 2):
            assert photo is not None
            assert identity is not None
            yield Dialect(delimiter, photo, identity, has_header=True)
    for delimiter, (photo, identity) in itertools.product(_DELIMITERS, [(0, 1), (1, 0)]):
        yield Dialect(delimiter, photo, identity)


def _cut(line: str, delimiter: str) -> list[str]:
    if '"' not in line:
        return [field.strip() for field in line.split(delimiter)]
    return [field.strip() for field in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])]
