"""Crops that are aligned already, such as those of InsightFace's sets: rows of the faces table without detection.

A JPEG of the right size is copied byte for byte. Other pictures are decoded, resized, and encoded again.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.errors import UserError
from lib.faces import table
from lib.faces.alignment import ARCFACE, ARCFACE_52, EYES, Alignment
from lib.faces.extraction import JPEG_QUALITY, fingerprint_of
from lib.faces.images import BadPhotoError, Photo, to_jpeg
from lib.faces.photo_parts import photos_of
from lib.faces.sources.source import Row, Source

UNKNOWN = "none"
TEMPLATES = (ARCFACE, EYES, UNKNOWN)

ARCFACE_SIDE = 112

_START, _END = b"\xff\xd8\xff", b"\xff\xd9"
_FRAMES = {0xC0, 0xC1, 0xC2}
_EXIF = 0xE1
_LARGEST = 2**20
"""Largest crop that is copied, in bytes, so that the crops of a part fit into one Arrow array."""


@dataclass(frozen=True, kw_only=True)
class AlignedCrops:
    """How crops that are aligned already become rows.

    Attributes:
        template: positions of the landmarks in the crops; `none` if unknown.
        alignment: size of the crops, and for `eyes` the positions of the eyes.
        verify: decode every crop, to find damaged ones.
    """

    template: str
    alignment: Alignment
    verify: bool = False

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise UserError(f"--aligned is {self.template!r}: allowed are {', '.join(TEMPLATES)}")

    def fingerprint(self) -> dict[str, Any]:
        """Return what the crops depend on, as `extraction.fingerprint` does."""
        return fingerprint_of(self.alignment, {"aligned": self.template, "faces_policy": "prominent"})

    def crop(self, data: bytes, max_megapixels: float) -> tuple[bytes | None, str, str | None]:
        """Return the crop of a picture, its status, and the reason if there is no crop."""
        side = self.alignment.image_size
        try:
            if not self.verify and jpeg_side(data) == side:
                return data, table.ALIGNED, None
            pixels = Photo(data, max_pixels=int(max_megapixels * 1e6)).pixels(1)
            if self.verify and jpeg_side(data) == side:
                return data, table.ALIGNED, None
        except BadPhotoError as bad:
            return None, bad.status, str(bad)
        height, width = pixels.shape[:2]
        if height != width and self.template != UNKNOWN:
            return None, table.IMPLAUSIBLE, f"{width}x{height} pixels: an aligned crop is square"
        return to_jpeg(_fitted(pixels, side), JPEG_QUALITY), table.ALIGNED, None


@dataclass
class _Rows:
    photos: list[str] = field(default_factory=list)
    identities: list[str | None] = field(default_factory=list)
    crops: list[bytes | None] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    made_of: list[int] = field(default_factory=list)
    num_bytes: int = 0


def aligned_tables(
    source: Source, item: Mapping[str, Any], how: AlignedCrops, max_megapixels: float
) -> dict[str, tuple[pa.Table, int]]:
    """Return the faces table of a part made by `part_item`, and the bytes of its photos, by split."""
    entries = photos_of(item).to_pylist()
    splits = {entry["split"]: _Rows() for entry in entries}
    wanted = (entry for entry in entries if entry["status"] is None)
    with closing(source.read(wanted, num_ahead=128)) as read:
        for entry in entries:
            data = entry["status"] or next(read)[1]
            _add(splits[entry["split"]], entry, data, how, max_megapixels)
    metadata = {table.FINGERPRINT_KEY: json.dumps(how.fingerprint()).encode()}
    return {
        split: (_table(rows, how).replace_schema_metadata(metadata), rows.num_bytes) for split, rows in splits.items()
    }


def _add(rows: _Rows, entry: Row, data: bytes | str, how: AlignedCrops, max_megapixels: float) -> None:
    crop, status, reason = (None, data, None) if isinstance(data, str) else how.crop(data, max_megapixels)
    rows.photos.append(entry["photo"])
    rows.identities.append(entry["identity"])
    rows.crops.append(crop)
    rows.statuses.append(status)
    rows.reasons.append(reason)
    rows.made_of.append(entry["made_of"])
    rows.num_bytes += 0 if isinstance(data, str) else len(data)


def _table(rows: _Rows, how: AlignedCrops) -> pa.Table:
    num = len(rows.photos)
    is_aligned = pa.array([crop is not None for crop in rows.crops])
    columns: dict[str, Any] = {
        "photo": pa.array(rows.photos, pa.string()),
        "identity": pa.array(rows.identities, pa.string()),
        "status": pa.array(rows.statuses, pa.string()),
        "crop": pa.array(rows.crops, pa.binary()),
        "reason": pa.array(rows.reasons, pa.string()),
        "made_of": pa.array(rows.made_of, pa.int64()),
    }
    side = how.alignment.image_size
    columns["box"] = _constant([0.0, 0.0, side, side], is_aligned)
    if how.template == ARCFACE:
        columns["landmarks"] = _constant((ARCFACE_52 * (side / ARCFACE_SIDE)).ravel(), is_aligned)
    arrays = [columns.get(each.name, pa.nulls(num, each.type)) for each in table.SCHEMA]
    return pa.Table.from_arrays(arrays, schema=table.SCHEMA)


def _constant(values: Iterable[float], is_aligned: pa.Array) -> pa.Array:
    """Return the same list in each aligned row, null in others."""
    one = np.asarray(list(values), np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.tile(one, len(is_aligned))), len(one))
    return pc.if_else(is_aligned, lists, pa.scalar(None, lists.type))


def _fitted(pixels_HWC: np.ndarray, side: int) -> np.ndarray:
    """Return a picture resized into a square of this side, with black borders if it is not square."""
    height, width = pixels_HWC.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled = cv2.resize(pixels_HWC, size, interpolation=kind) if scale != 1 else pixels_HWC
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square = np.zeros((side, side, 3), np.uint8)
    square[top : top + size[1], left : left + size[0]] = scaled
    return square


def jpeg_side(data: bytes) -> int | None:
    """Return the side of a complete, upright, square colour JPEG; None for anything else."""
    if not data.startswith(_START) or not data.endswith(_END) or len(data) > _LARGEST:
        return None
    position = 2
    while position + 9 < len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in _FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            return int(width) if bits == 8 and height == width and components == 3 else None
        if marker == _EXIF or not 0xC4 <= marker <= 0xFE or length < 2:
            return None
        position += 2 + length
    return None
