"""The targets: people and photos to forget, and the rows and texts that name them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lib.faces.listed_names import key_of, stem_of
from lib.faces.photo_names import stored_name

PHOTO, IDENTITY = "photo", "identity"

FACE_OF = re.compile(r"#\d+$")
"""Suffix of a photo's name in the row of one of its faces, if a table has all faces of a photo."""


def role_of(column: str) -> str | None:
    """Return whether a column has names of photos or of identities, by its own name; None if neither."""
    if PHOTO in column or column == "evidence":
        return PHOTO
    return IDENTITY if IDENTITY in column or column == "decision" else None


def named_columns(schema: pa.Schema) -> list[str]:
    """Return the columns with texts, or lists of texts, that name photos or identities."""
    return [column.name for column in schema if role_of(column.name) and _is_text(column.type)]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or (pa.types.is_list(kind) and pa.types.is_string(kind.value_type))


@dataclass(frozen=True)
class Targets:
    """Names of photos and of identities to forget.

    A photo `a.jpg` includes its faces `a.jpg#0`, `a.jpg#1`.
    """

    photos: frozenset[str]
    identities: frozenset[str]

    @cached_property
    def _values(self) -> dict[str, pa.Array]:
        both = ((PHOTO, self.photos), (IDENTITY, self.identities))
        return {role: pa.array(sorted(names), pa.string()) for role, names in both}

    @cached_property
    def _by_key(self) -> dict[str, str]:
        """The photos by the spellings of their names in lists, see `lib.faces.listed_names`."""
        stems = {stem_of(key_of(name)): name for name in self.photos}
        return stems | {key_of(name): name for name in self.photos}

    def listed(self, name: str) -> str | None:
        """Return the photo to forget with this name in a list; None if there is none."""
        if stored_name(name) in self.photos:
            return stored_name(name)
        key = key_of(name)
        for candidate in (key, key.removeprefix("photos/")):
            if found := self._by_key.get(candidate) or self._by_key.get(stem_of(candidate)):
                return found
        return None

    @cached_property
    def _in_text(self) -> re.Pattern[str]:
        names = sorted(map(re.escape, self.photos), key=len, reverse=True)
        # Not within a longer name.
        return re.compile(rf"(?<![\w/.-])(?:{'|'.join(names)})(?:#\d+)?(?![\w/-])") if names else re.compile(r"(?!)")

    def holds(self, role: str | None, name: str | None) -> bool:
        """Return whether a text with this role names one of them."""
        if name is None or role is None:
            return False
        if role == IDENTITY:
            return name in self.identities
        return name in self.photos or FACE_OF.sub("", name) in self.photos

    def rows(self, table: pa.Table) -> pa.Array:
        """Return which rows name one of them in any column, as booleans."""
        found = pa.repeat(pa.scalar(False), len(table))
        for column in named_columns(table.schema):
            values = table[column].combine_chunks()
            is_list = pa.types.is_list(values.type)
            texts = pc.list_flatten(values) if is_list else values
            named = self._named(role_of(column), texts)
            if is_list:
                rows = pc.unique(pc.list_parent_indices(values).filter(named))
                named = pc.is_in(pa.array(range(len(table)), pa.int64()), value_set=rows.cast(pa.int64()))
            found = pc.or_(found, named)
        return found

    def _named(self, role: str | None, texts: pa.Array) -> pa.Array:
        values = self._values[role or PHOTO]
        named = pc.is_in(texts, value_set=values)
        if role == PHOTO:
            faces = pc.replace_substring_regex(texts, pattern=FACE_OF.pattern, replacement="")
            named = pc.or_(named, pc.is_in(faces, value_set=values))
        return pc.and_(named, pc.is_valid(texts))

    def without_names(self, text: str) -> str:
        """Return a text with "(forgotten)" in place of each photo."""
        return self._in_text.sub("(forgotten)", text)

    def to_json(self) -> dict[str, Any]:
        """Return the names for a file."""
        return {"photos": sorted(self.photos), "identities": sorted(self.identities)}


def of_names(photos: Iterable[str], identities: Iterable[str]) -> Targets:
    """Return the targets of these names."""
    return Targets(frozenset(photos), frozenset(identities))
