"""The aligned faces of some photos of a source, for people to look at."""

from collections.abc import Iterable
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.faces import table
from lib.faces.manifest import Manifest
from lib.faces.photo_parts import part_item
from lib.recognition.face_source import PhotosSource, Source
from lib.recognition.photo_faces import PhotoFaces


def read_crops(source: Source, names: Iterable[str]) -> dict[str, bytes]:
    """Return the aligned faces, JPEG, of these photos (`photo`, or `photo#n`) that have one."""
    wanted = pa.array(sorted(set(names)), pa.string())
    crops: dict[str, bytes] = {}
    if isinstance(source, PhotosSource):
        # A row `photo#n` is face n of the photo; a photo's own name may end so too.
        of_files = pa.array(
            sorted({form for name in set(names) for form in (name, name.rpartition("#")[0])}), pa.string()
        )
        photos = source.manifest.photos.filter(pc.is_in(source.manifest.photos["photo"], of_files))
        faces = PhotoFaces(*source.how())
        plan = replace(source, manifest=Manifest.of(photos)).parts()
        for part in plan.parts:
            for _, rows, _ in faces.tables(part_item(plan, part)):
                crops |= {row["photo"]: row["crop"] for row in rows.to_pylist() if row["crop"]}
        return crops
    for file_name in source.file_names:
        url = storage.join(source.url, file_name)
        in_file = storage.read_parquet(url, table.columns("photo"))
        if pc.any(pc.is_in(in_file["photo"], wanted)).as_py():
            rows = storage.read_parquet(url, table.columns("photo", "crop"))
            rows = rows.filter(pc.is_in(rows["photo"], wanted))
            crops |= {row["photo"]: row["crop"] for row in rows.to_pylist() if row["crop"]}
    return crops
