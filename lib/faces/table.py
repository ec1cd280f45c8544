"""The faces table: one row for each input photo, in Parquet files under `split=<train|val|test>/`."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from lib import parts
from lib.errors import UserError
from lib.faces import quality
from lib.parts import SUCCESS_NAME as SUCCESS_NAME

SPLITS = ("train", "val", "test")

ALIGNED = "aligned"
NO_FACE = "no_face"
LOW_SCORE = "low_score"
TOO_SMALL = "too_small"
IMPLAUSIBLE = "implausible"
CORRUPT = "corrupt"
TOO_LARGE = "too_large"
CHANGED = "changed"
MISSING = "missing"
NO_IDENTITY = "no_identity"
STATUSES = (ALIGNED, NO_FACE, LOW_SCORE, TOO_SMALL, IMPLAUSIBLE, CORRUPT, TOO_LARGE, CHANGED, MISSING, NO_IDENTITY)

BYTES_KEY = b"conv-facenet.photo-bytes"
"""Key in a part's Parquet metadata: bytes of the photos that the part was made from."""

MADE_ON_KEY = b"conv-facenet.made-on"
"""Key there: the devices of the detector and their arithmetic, such as `cuda float16`, separated by commas."""

FINGERPRINT_KEY = b"conv-facenet.fingerprint"
"""Key in the Parquet schema's metadata under which the fingerprint stands as JSON."""

SCHEMA = pa.schema(
    [
        pa.field("photo", pa.string(), nullable=False),
        pa.field("identity", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("num_faces", pa.int16()),
        pa.field("score", pa.float32()),
        pa.field("box", pa.list_(pa.float32(), 4)),
        pa.field("landmarks", pa.list_(pa.float32(), 10)),
        pa.field("crop", pa.binary()),
        pa.field("reason", pa.string()),
        *quality.COLUMNS,
        pa.field("made_of", pa.int64()),
    ]
)
"""Boxes are x0 y0 x1 y1 and landmarks x y of left eye, right eye, nose, mouth left, mouth right (as seen when the face
is upright), in pixels of the upright photo. `crop` is a square RGB JPEG, null unless the status is `aligned`. `reason`
says in words why a photo could not be read, or why a face is implausible. `lib.faces.quality` describes the columns
after it. `made_of` is a hash of the photo's name, size and mark, and of the settings: rows of the same hash need not be
made again. Older tables lack `reason` and those after it."""

WRITING: dict[str, Any] = {"compression": "none", "write_batch_size": 64}
"""Options of Parquet for crops. JPEG does not shrink, and the other columns are small beside it. The length of a page
is looked at after each batch: after the usual 1,024 rows a page has all crops of a part, which takes twice as long."""

REQUIRED = [column for column in SCHEMA if column.name not in ("reason", "made_of", *quality.NAMES)]
"""The columns that every faces table has, of any version."""


def columns(*names: str) -> list[pa.Field]:
    """Return the columns of these names, as readers of a faces table want them."""
    return [SCHEMA.field(name) for name in names]


def faces_table(rows: list[dict[str, Any]], fingerprint_json: str) -> pa.Table:
    """Return the rows (keys as in `SCHEMA`, absent ones null) as a table whose metadata carries the fingerprint.

    The measures of quality are added.
    """
    schema = SCHEMA.with_metadata({FINGERPRINT_KEY: fingerprint_json.encode()})
    return pa.Table.from_pylist([quality.with_quality(row) for row in rows], schema=schema)


def read_success(faces_url: str, *, run_id: str | None = None) -> dict[str, Any]:
    """Return what a finished faces table says of itself: run_id, fingerprint, counts, parts.

    With `run_id`, it is the version of that id, where it is still kept, and else the present one.

    Raises:
        UserError: there is none, it is not finished, or parts of it are gone.
    """
    return parts.read_success(faces_url, what="faces", job="jobs/preprocess.py", run_id=run_id)


def part_names(success: Mapping[str, Any], splits: Sequence[str]) -> list[str]:
    """Return the files of these splits that a finished table consists of, sorted."""
    return sorted(name for name in success["parts"] if parts.split_in(name) in splits)


def crop_size(success: dict[str, Any]) -> int:
    """Return the side of the crops in pixels.

    Raises:
        UserError: the table does not say it.
    """
    size = success["fingerprint"].get("image_size")
    if not isinstance(size, int):
        raise UserError(
            f"the faces table has no image_size in the fingerprint of its {SUCCESS_NAME}: run jobs/preprocess.py again "
            "with --overwrite"
        )
    return size
