"""Columns of tables, and the features of Hugging Face's datasets: images, and the names of classes."""

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.errors import UserError
from lib.faces.sources.source import PhotoColumns

_DEFAULTS = PhotoColumns()


def chosen_columns(url: str, schema: pa.Schema, columns: PhotoColumns, *, identities_required: bool) -> PhotoColumns:
    """Return the columns of a table. If it lacks a default column, the table's features decide.

    A photo column that does not exist stays as it is.

    Raises:
        UserError: a column does not exist, or the type of the images cannot hold any.
    """
    features = features_of(schema)
    images = [name for name, about in features.items() if about.get("_type") == "Image"]
    classes = [name for name, about in features.items() if about.get("_type") == "ClassLabel"]
    if columns.image == _DEFAULTS.image and columns.image not in schema.names and len(images) == 1:
        columns = replace(columns, image=images[0])
    if columns.identity == _DEFAULTS.identity and columns.identity not in schema.names:
        named = classes if len(classes) == 1 else [name for name in ("label",) if name in schema.names and features]
        columns = replace(columns, identity=named[0]) if named else columns
    _check(url, schema, columns, identities_required=identities_required)
    if columns.identity not in schema.names:
        columns = replace(columns, identity=None)
    return columns


def features_of(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return the features in the metadata of a table; none if they cannot be read."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: about for name, about in features.items() if isinstance(about, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def texts_of(url: str, content: pa.Table, column: str | None, schema: pa.Schema) -> list[str | None]:
    """Return the values of a column as text, classes by their names; an empty list without the column.

    Raises:
        UserError: they cannot be text.
    """
    if column is None or column not in content.schema.names:
        return []
    try:
        texts: list[str | None] = pc.cast(content[column], pa.string()).to_pylist()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise UserError(
            f"column {column!r} of {storage.redacted(url)} holds no names but {content[column].type}: "
            "name the columns by --identity-column and --photo-column"
        ) from error
    names = features_of(schema).get(column, {}).get("names")
    if isinstance(names, list):
        # datasets write -1 for no class.
        return [
            None if text is None or text == "-1" else str(names[int(text)]) if _is_index(text, names) else text
            for text in texts
        ]
    return texts


def _is_index(text: str, names: list[Any]) -> bool:
    return text.isdigit() and int(text) < len(names)


def _check(url: str, schema: pa.Schema, columns: PhotoColumns, *, identities_required: bool) -> None:
    wanted = [("--image-column", columns.image)]
    if identities_required and columns.identity is not None:
        wanted.append(("--identity-column", columns.identity))
    for flag, column in wanted:
        if column not in schema.names:
            raise UserError(
                f"{storage.redacted(url)} has no column {column!r}: name it by {flag}; "
                f"there are {', '.join(schema.names)}"
            )
    kind = schema.field(columns.image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if kind not in (pa.binary(), pa.large_binary(), pa.binary_view()):
        raise UserError(
            f"column {columns.image!r} of {storage.redacted(url)} is of type {kind}: name by --image-column the one of "
            "the encoded photos, binary or a struct with `bytes`"
        )
