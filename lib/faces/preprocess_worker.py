"""The worker of preprocess: turns a part of the manifest into a part of the faces table."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lib import storage
from lib.faces import table
from lib.faces.aligned import aligned_tables
from lib.faces.extraction import FaceExtractor
from lib.faces.photo_parts import PhotoReader, SplitRows
from lib.faces.preprocess_config import PreprocessConfig
from lib.faces.sources.source import Source
from lib.part_workers import summary

if TYPE_CHECKING:
    from lib.faces.batch_extraction import BatchExtractor


def _gpu_extractor(config: PreprocessConfig, num_cpus: int) -> "BatchExtractor":
    from lib.device import worker_device
    from lib.faces.batch_extraction import BatchExtractor

    return BatchExtractor(config.settings(), worker_device(use_gpu=True), num_threads=num_cpus)


class PartWorker:
    """Ray Data's worker: turns a part of the manifest into Parquet files and returns one row about it."""

    def __init__(
        self, config: PreprocessConfig, source: Source, fingerprint: dict[str, Any], num_cpus: int, use_gpu: bool
    ) -> None:
        self._config, self._source = config, source
        self._fingerprint_json = json.dumps(fingerprint)
        self._crops = config.aligned_crops()
        if self._crops is None:
            extractor = _gpu_extractor(config, num_cpus) if use_gpu else FaceExtractor(config.settings())
            self._reader = PhotoReader(source, extractor)

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """Process one part, an item of `part_item`, and return its summary."""
        return summary(self._process, part)

    def _process(self, part: dict[str, Any]) -> tuple[int, int]:
        num_photos, num_copied = 0, 0
        names = json.loads(part["names"])
        for split, faces_table, made in self._tables(part):
            made_on = ", ".join(sorted(made.made_on)).encode()
            about = {table.BYTES_KEY: str(made.num_bytes).encode(), table.MADE_ON_KEY: made_on}
            metadata = {**faces_table.schema.metadata, **about}
            url = storage.join(self._config.faces_url, names[split])
            storage.write_parquet(url, faces_table.replace_schema_metadata(metadata), **table.WRITING)
            num_photos += made.num_photos
            num_copied += made.num_copied
        return num_photos, num_copied

    def _tables(self, part: dict[str, Any]) -> Iterator[tuple[str, pa.Table, SplitRows]]:
        """Yield split, faces table, and the number and size of its photos."""
        if self._crops is not None:
            aligned = aligned_tables(self._source, part, self._crops, self._config.max_megapixels)
            for split, (faces_table, num_bytes) in aligned.items():
                yield (
                    split,
                    faces_table,
                    SplitRows(num_photos=len(faces_table), num_bytes=num_bytes, made_on={"copied"}),
                )
            return
        for split, made in self._reader.rows(part, self._config.faces_url, self._config.retry).items():
            yield split, table.faces_table(made.rows, self._fingerprint_json), made
