"""The images of a verification set, such as lfw.bin, as a cache file: one row for each image, named by its number."""

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lib.evaluation.verification_sets import read_verification_set
from lib.training.cache_files import CACHE_SCHEMA, ROWS_PER_BATCH, made_once, write_batches


@dataclass(frozen=True, kw_only=True)
class SetFaces:
    """The images of one state of a `.bin` file."""

    url: str
    num_bytes: int
    mark: str
    """The mark of `lib.storage.file_info`; it changes with the content."""


def build_set_cache(faces: SetFaces, cache_dir: str) -> str:
    """Return the path of the cache file of a set, and make the file if it does not exist.

    Raises:
        UserError: the file is gone or no set, or `cache_dir` cannot be written to; JobError: the disk is full.
    """
    digest = hashlib.sha256(f"{faces.url}\0{faces.num_bytes}\0{faces.mark}".encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"faces-set-{digest}.arrow"

    def build() -> None:
        write_batches(path, _batches(faces.url), faces.num_bytes)

    return made_once(path, cache_dir, build)


def _batches(url: str) -> Generator[pa.RecordBatch, None, None]:
    images = read_verification_set(url).images
    for start in range(0, len(images), ROWS_PER_BATCH):
        crops = images[start : start + ROWS_PER_BATCH]
        names = pa.array([str(number) for number in range(start, start + len(crops))])
        yield pa.record_batch([names, names, pa.array(crops, pa.binary())], schema=CACHE_SCHEMA)
