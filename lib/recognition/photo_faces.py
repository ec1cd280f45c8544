"""Makes faces of photos on the way, part by part: detected and aligned, or aligned already."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from lib.faces import table
from lib.faces.aligned import AlignedCrops, aligned_tables
from lib.faces.extraction import ExtractionSettings, FaceExtractor
from lib.faces.photo_parts import PhotoReader
from lib.faces.sources.source import Source


class PhotoFaces:
    """Turns parts of photos into rows of the faces table, as preprocess does."""

    def __init__(self, files: Source, settings: ExtractionSettings, aligned: AlignedCrops | None) -> None:
        self._files, self._settings, self._aligned = files, settings, aligned
        self._reader = None if aligned else PhotoReader(files, FaceExtractor(settings))

    def tables(self, item: dict[str, Any]) -> Iterator[tuple[str, pa.Table, int]]:
        """Yield each split of a part made by `part_item`, its rows (`table.REQUIRED`), and its number of photos."""
        schema = pa.schema(table.REQUIRED)
        if self._reader is not None:
            for split, made in self._reader.rows(item).items():
                yield split, pa.Table.from_pylist(made.rows, schema=schema), made.num_photos
            return
        assert self._aligned is not None
        for split, (rows, _) in aligned_tables(self._files, item, self._aligned, self._settings.max_megapixels).items():
            yield split, rows.select(schema.names).replace_schema_metadata(None), len(rows)
