"""Crops that are aligned already, such as those of InsightFace's sets: rows of the faces table without detection.

A JPEG of the right size is copied byte for byte. Other pictures are decoded, resized, and encoded again.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lib.errors import UserError
from lib.faces import table
from lib.faces.alignment import ARCFACE, ARCFACE_52, EYES, Alignment
from lib.faces.extraction import JPEG_QUALITY, fingerprint_of
from lib.faces.images import BadPhotoError, Photo, to_jpeg
from lib.faces.jpeg_sides import jpeg_side, jpeg_sides
from lib.faces.photo_parts import photos_of
from lib.faces.sources.source import Source

UNKNOWN = "none"
TEMPLATES = (ARCFACE, EYES, UNKNOWN)

ARCFACE_SIDE = 112

COPIED_PARTS = 2
"""Parts that a worker has in hand at once: copying crops is mostly waiting for the storage."""


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


def aligned_tables(
    source: Source, item: Mapping[str, Any], how: AlignedCrops, max_megapixels: float
) -> dict[str, tuple[pa.Table, int]]:
    """Return the faces table of a part made by `part_item`, and the bytes of its photos, by split."""
    photos = photos_of(item).combine_chunks()
    crops = _crops(source, photos, how, max_megapixels)
    splits = pc.dictionary_encode(photos["split"].combine_chunks())
    # Sorted by split, each split is a slice, and no crop is copied once more.
    order_N = np.argsort(splits.indices.to_numpy(), kind="stable")
    made = _table(photos, crops, order_N, how)
    sizes_N = crops.size_N[order_N]
    tables, start = {}, 0
    for split, num in zip(splits.dictionary.to_pylist(), np.bincount(splits.indices.to_numpy()), strict=True):
        tables[split] = (made.slice(start, num), int(sizes_N[start : start + num].sum()))
        start += num
    return tables


@dataclass
class _Crops:
    """The crops of a part.

    Attributes:
        pool: binary array with all crops, and more.
        place_N: index of each photo's crop in it; -1 if there is none.
        size_N: bytes of each photo; 0 if it could not be read.
        statuses, reasons: of each photo, as in the faces table.
    """

    pool: pa.Array
    place_N: NDArray[np.int64]
    size_N: NDArray[np.int64]
    statuses: list[str]
    reasons: list[str | None]


def _crops(source: Source, photos: pa.Table, how: AlignedCrops, max_megapixels: float) -> _Crops:
    """Return the crops of photos: those that can be copied all at once, others one by one."""
    num = len(photos)
    statuses = photos["status"].to_pylist()
    crops = _Crops(pa.array([], pa.binary()), np.full(num, -1), np.zeros(num, np.int64), statuses, [None] * num)
    wanted_W = np.flatnonzero(photos["status"].is_null().to_numpy())
    copied_W = np.zeros(len(wanted_W), bool) if how.verify else _copy(source, photos, wanted_W, how, crops)
    single_M = wanted_W[~copied_W]
    found: list[bytes] = []
    entries = photos.take(pa.array(single_M)).to_pylist()
    with closing(source.read(entries, num_ahead=128)) as read:
        for place, (_, data) in zip(single_M.tolist(), read, strict=True):
            crop, status, reason = (None, data, None) if isinstance(data, str) else how.crop(data, max_megapixels)
            crops.statuses[place], crops.reasons[place] = status, reason
            crops.size_N[place] = 0 if isinstance(data, str) else len(data)
            if crop is not None:
                crops.place_N[place] = len(crops.pool) + len(found)
                found.append(crop)
    if found:
        crops.pool = pa.concat_arrays([crops.pool, pa.array(found, pa.binary())])
    return crops


def _copy(
    source: Source, photos: pa.Table, wanted_W: NDArray[np.int64], how: AlignedCrops, crops: _Crops
) -> NDArray[np.bool_]:
    """Take the crops that are copied byte for byte, without a step of Python for each. Return which they are."""
    rows = photos.take(pa.array(wanted_W))
    names = pc.unique(rows["source"]).to_pylist()
    run = source.read_run(names[0], rows) if len(names) == 1 and names[0] is not None else None
    if run is None:
        return np.zeros(len(rows), bool)
    is_copied_W = jpeg_sides(run.data_B, run.start_N, run.stop_N) == how.alignment.image_size
    start_C, stop_C = run.start_N[is_copied_W], run.stop_N[is_copied_W]
    places_C = wanted_W[is_copied_W]
    # What lies between the crops is a value of the array as well, because an array has no gaps.
    offsets = np.stack([start_C, stop_C], axis=1).ravel().astype(np.int32)
    if len(offsets):
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(run.data_B)]
        crops.pool = pa.Array.from_buffers(pa.binary(), len(offsets) - 1, buffers)
    crops.place_N[places_C] = 2 * np.arange(len(places_C))
    crops.size_N[places_C] = stop_C - start_C
    for place in places_C.tolist():
        crops.statuses[place] = table.ALIGNED
    return is_copied_W


def _table(photos: pa.Table, crops: _Crops, order_N: NDArray[np.int64], how: AlignedCrops) -> pa.Table:
    """Return the rows of photos in an order."""
    place_N = crops.place_N[order_N]
    is_none_N = place_N < 0
    order = pa.array(order_N)
    columns: dict[str, Any] = {name: photos[name].take(order) for name in ("photo", "identity", "made_of")}
    columns["status"] = pa.array(crops.statuses, pa.string()).take(order)
    columns["reason"] = pa.array(crops.reasons, pa.string()).take(order)
    columns["crop"] = crops.pool.take(pa.array(place_N, mask=is_none_N))
    side = how.alignment.image_size
    columns["box"] = _constant([0.0, 0.0, side, side], is_none_N)
    if how.template == ARCFACE:
        columns["landmarks"] = _constant((ARCFACE_52 * (side / ARCFACE_SIDE)).ravel(), is_none_N)
    arrays = [columns.get(each.name, pa.nulls(len(order_N), each.type)) for each in table.SCHEMA]
    metadata = {table.FINGERPRINT_KEY: json.dumps(how.fingerprint()).encode()}
    return pa.Table.from_arrays(arrays, schema=table.SCHEMA.with_metadata(metadata))


def _constant(values: Iterable[float], is_none_N: NDArray[np.bool_]) -> pa.Array:
    """Return the same list in each row, null where there is none."""
    one = np.asarray(list(values), np.float32)
    repeated = pa.array(np.tile(one, len(is_none_N)))
    return pa.FixedSizeListArray.from_arrays(repeated, len(one), mask=pa.array(is_none_N))


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
