"""Random access to crops: each node has one memory-mapped Arrow file, made by `cache_building`. Where its disk has no
room for that, the crops are read from the table (`table_crops`).

Shape suffixes: N photos (rows), H and W pixels.
"""

import logging
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lib.errors import UserError
from lib.training.cache_files import ROW_FIELD, ROWS_PER_BATCH

logger = logging.getLogger(__name__)

_READ_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
"""OpenCV has no names for reduced RGB. The bits for the scale alone are in the names for grey."""


def decode_jpeg(jpeg: npt.NDArray[np.uint8], reduction: int = 1) -> npt.NDArray[np.uint8] | None:
    """Return the RGB pixels at 1/`reduction` (1, 2, 4 or 8) of the size; None if they cannot be decoded."""
    return cv2.imdecode(jpeg, _READ_FLAGS[reduction]) if len(jpeg) else None


def plain(jpeg: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8] | None:
    """Return the crop as RGB of `size` x `size` pixels; None if it cannot be decoded.

    If the size differs from the crop's, each pixel is the mean of the area it covers, as in recognition.
    """
    pixels = decode_jpeg(jpeg)
    if pixels is None or pixels.shape[:2] == (size, size):
        return pixels
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)


class Crops(Protocol):
    """The encoded crops of a table, by row; several threads may read at once."""

    path: str
    """Of a cache file that other processes can open too; empty if there is none."""

    def names(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        """Return the photo and the identity of each row."""
        ...

    def crop_bytes(self, row: int) -> npt.NDArray[np.uint8]:
        """Return the encoded crop."""
        ...

    def at_hand(self, rows: npt.NDArray[np.integer], /) -> "Crops":
        """Return what has the crops of these rows ready."""
        ...


class EncodedCrops:
    """The encoded crops of a cache file; several threads may read at once."""

    def __init__(self, path: str) -> None:
        """Map the file; nothing is read."""
        self.path = path
        self._file = pa.ipc.open_file(pa.memory_map(path))
        self._batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]
        self._rows: list[npt.NDArray[np.int64]] = []
        if self._file.schema.names[-1] == ROW_FIELD.name:
            self._rows = [batch.column(3).to_numpy() for batch in self._batches if len(batch)]
            self._batches = [batch for batch in self._batches if len(batch)]
        self._first_rows = np.array([rows[0] for rows in self._rows], np.int64)

    @property
    def rows_of_batches(self) -> list[int]:
        """Number of rows of each batch of the file."""
        return [len(batch) for batch in self._batches]

    def names(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        """Return the photo and the identity of each row, in the memory of the mapped file."""
        photos, identities = ([batch[name] for batch in self._batches] for name in ("photo", "identity"))
        return pa.chunked_array(photos, pa.string()), pa.chunked_array(identities, pa.string())

    def crop_bytes(self, row: int) -> npt.NDArray[np.uint8]:
        """Return the encoded crop, a view into the mapped file."""
        if self._rows:
            batch = max(0, int(np.searchsorted(self._first_rows, row, side="right")) - 1)
            place = int(np.searchsorted(self._rows[batch], row))
            if place == len(self._rows[batch]) or self._rows[batch][place] != row:
                raise KeyError(row)
        else:
            batch, place = divmod(row, ROWS_PER_BATCH)
        return np.frombuffer(self._batches[batch].column(2)[place].as_buffer(), np.uint8)

    def at_hand(self, _: npt.NDArray[np.integer], /) -> "EncodedCrops":
        """Return the same: the system reads what is asked for."""
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """The rows whose crops this node holds now, where it does not hold all."""

    rows_N: npt.NDArray[np.bool_]
    people_I: npt.NDArray[np.bool_]
    """The same by identity."""
    on_any_node_N: npt.NDArray[np.bool_]
    worker: int
    """Number of this worker on its node."""
    num_workers: int
    """Of this node."""


class FaceCache:
    """The crops of a table and their identities, by row.

    Attributes:
        photos: names of the photos, in Arrow's memory.
        identities: names of the people, sorted.
        labels_N: int32, the index of each row's identity in `identities`.
        crop_size: side of a crop in pixels.
        failed_rows: rows that could not be decoded, so far.
        held: the rows that have crops now; None for all.
    """

    def __init__(self, source: str | Crops, crop_size: int = 0) -> None:
        """Map a cache file, or take other crops; only the names are read.

        A file that has the names alone comes with the size of the crops.
        """
        crops: Crops = EncodedCrops(source) if isinstance(source, str) else source
        self.hold(crops, None)
        self.photos, names = crops.names()
        sorted_names = names.unique().sort()
        self.identities: list[str] = sorted_names.to_pylist()
        self.labels_N: npt.NDArray[np.int32] = pc.index_in(names, sorted_names).to_numpy()
        self.failed_rows: set[int] = set()
        self.crop_size = crop_size or self._find_crop_size()

    def hold(self, crops: Crops, held: Held | None) -> None:
        """Read these crops from now on."""
        self.path, self.held = crops.path, held
        self.crop_bytes, self.at_hand = crops.crop_bytes, crops.at_hand

    def __len__(self) -> int:
        return len(self.labels_N)

    def decode(
        self, rows: npt.NDArray[np.integer], size: int | None = None
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Return the crops as RGB [N, H, W, 3], without augmentation, and which of them could not be decoded [N].

        A crop that could not be decoded is black, counted in `failed_rows` and named in the log.
        """
        side = size or self.crop_size
        images_NHWC = np.zeros((len(rows), side, side, 3), np.uint8)
        failed_N = np.zeros(len(rows), bool)
        crops = self.at_hand(rows)
        for place, row in enumerate(rows.tolist()):
            pixels = plain(crops.crop_bytes(row), side)
            if pixels is None:
                failed_N[place] = True
                self.note_failed(row)
            else:
                images_NHWC[place] = pixels
        return images_NHWC, failed_N

    def note_failed(self, row: int) -> None:
        """Count a crop that could not be decoded, and name it in the log once."""
        if row not in self.failed_rows:
            self.failed_rows.add(row)
            logger.warning("the crop of photo %r is corrupt and is skipped", self.photos[row].as_py())

    def _find_crop_size(self) -> int:
        for row in range(len(self)):
            pixels = decode_jpeg(self.crop_bytes(row))
            if pixels is not None:
                return pixels.shape[0]
        raise UserError("not one crop of the faces can be decoded: run jobs/preprocess.py --overwrite first")
