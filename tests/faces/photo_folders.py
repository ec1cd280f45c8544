"""Folders of photos and their manifests, for tests of what is listed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lib.faces.manifest import Manifest, read_manifest
from lib.faces.sources.opening import open_source
from lib.faces.sources.source import PhotoColumns

PHOTO = b"never opened here"
STRANGE_NAMES = [
    "two words.jpg",
    'it\'s "quoted".jpg',
    "Zoë 名前 🙂.JPEG",
    "percent%20 #1 [x] {y} $HOME *.png",
    "-leading.webp",
    "many.dots.in.it.bmp",
]
IMAGES = pa.array([b"1", b"2", b"3"], pa.binary())


def place(root: Path, *names: str) -> None:
    for name in names:
        path = root / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PHOTO)


def manifest_of(
    root: Path,
    identities: str | bytes | None = None,
    *,
    photos: str = "photos",
    seed: int = 0,
    required: bool = True,
    min_listed_share: float = 0.5,
    **columns: str,
) -> Manifest:
    if identities is not None:
        content = identities.encode() if isinstance(identities, str) else identities
        (root / "identities.txt").write_bytes(content)
    has_list = (root / "identities.txt").exists()
    named = PhotoColumns(**columns)
    source = open_source(
        str(root / photos),
        columns=replace(named, identity=None) if has_list else named,
        identities_required=required,
    )
    return read_manifest(
        source,
        str(root / "identities.txt"),
        split_seed=seed,
        identities_required=required,
        min_listed_share=min_listed_share,
    )


def rows_of(manifest: Manifest) -> dict[str, tuple[str | None, str | None]]:
    rows = manifest.photos.to_pylist()
    assert len({row["photo"] for row in rows}) == len(rows) == len(manifest)
    return {row["photo"]: (row["identity"], row["status"]) for row in rows}


def write(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
