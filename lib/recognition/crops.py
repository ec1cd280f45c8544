"""The aligned faces of some photos of a source, for people to look at."""

from collections.abc import Iterable, Iterator
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
    return dict(crops_of(source, names))


def crops_of(source: Source, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and aligned face, JPEG, of these photos that have one, with those of one part in memory."""
    if isinstance(source, PhotosSource):
        wanted = set(names)
        # A row `photo#n` is face n of the photo; a photo's own name may end so too.
        of_files = pa.array(sorted({form for name in wanted for form in (name, name.rpartition("#")[0])}), pa.string())
        photos = source.manifest.photos.filter(pc.is_in(source.manifest.photos["photo"], of_files))
        faces = PhotoFaces(*source.how())
        plan = replace(source, manifest=Manifest.of(photos)).parts()
        for part in plan.parts:
            for _, rows, _ in faces.tables(part_item(plan, part)):
                yield from _with_crop(rows)
        return
    yield from crops_in_table(source.url, source.file_names, names)


def crops_in_table(faces_url: str, file_names: Iterable[str], names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and aligned face of these photos that these files of a faces table hold."""
    wanted = pa.array(sorted(set(names)), pa.string())
    for file_name in file_names:
        url = storage.join(faces_url, file_name)
        in_file = storage.read_parquet(url, table.columns("photo"))
        if pc.any(pc.is_in(in_file["photo"], wanted)).as_py():
            rows = storage.read_parquet(url, table.columns("photo", "crop"))
            yield from _with_crop(rows.filter(pc.is_in(rows["photo"], wanted)))


def _with_crop(rows: pa.Table) -> Iterator[tuple[str, bytes]]:
    return ((row["photo"], row["crop"]) for row in rows.to_pylist() if row["crop"])
