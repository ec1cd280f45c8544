"""The faces to embed: the parts of a faces table, or the parts that preprocess would make of photos."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.aligned import UNKNOWN, AlignedCrops
from lib.faces.alignment import EYES
from lib.faces.extraction import ExtractionSettings, fingerprint, settings_from_fingerprint
from lib.faces.identities import ANY_LISTED
from lib.faces.manifest import Manifest, read_manifest
from lib.faces.part_plan import content_of, plan_parts
from lib.faces.photo_flags import PhotoFlags
from lib.faces.photo_parts import part_item
from lib.faces.plan_files import PartPlan, copy_shard
from lib.faces.sources.source import Source as PhotoFiles
from lib.faces.tombstones import Tombstones, without_forgotten
from lib.parts import (
    MANIFEST_FOLDER,
    digest_of,
    part_key,
    part_name,
    split_in,
)
from lib.recognition.embedder import Embedder, check_fingerprint

_READERS = 16


@dataclass(frozen=True, kw_only=True)
class FacesSource:
    """A faces table to embed.

    Attributes:
        run_id: of the version of the table.
        file_names: of the parts below `url`.
        num_rows: of each of them.
        rows: rows to embed of each file, in rising order. None for all rows of all files.
    """

    url: str
    run_id: str
    fingerprint: dict[str, Any]
    file_names: list[str]
    num_rows: list[int]
    rows: list[list[int]] | None = None

    def only(self, rows: Mapping[str, Sequence[int]]) -> "FacesSource":
        """Return a source of only these rows of these files."""
        names = [name for name in self.file_names if rows.get(name)]
        taken = [[int(row) for row in rows[name]] for name in names]
        return replace(self, file_names=names, num_rows=[len(each) for each in taken], rows=taken)

    def origin(self) -> dict[str, Any]:
        """Return what embeddings say of where they are from."""
        return {"faces_run": self.run_id}

    def old_plan(self) -> dict[str, Any]:
        """Return what embeddings without versions say of their faces."""
        splits = sorted({split_in(name) for name in self.file_names})
        return {"faces_run": self.run_id, "files": len(self.file_names), "splits": splits}

    def items(self, model: str) -> list[tuple[dict[str, Any], list[str], int]]:
        """Return for each part the item for a worker, its files by a model of this digest, and its number of rows."""
        items = []
        for n, (name, num_rows) in enumerate(zip(self.file_names, self.num_rows, strict=True)):
            made_of = name if part_key(name) else f"{self.run_id}/{name}"
            rows = None if self.rows is None else json.dumps(self.rows[n])
            output = _output_name(name, made_of if rows is None else f"{made_of} {rows}", model)
            item = {"faces": storage.join(self.url, name), "name": output, "rows": rows}
            items.append((item, [output], num_rows))
        return items


@dataclass(frozen=True, kw_only=True)
class PhotosSource:
    """Raw photos to embed; faces are detected on the way, unless they are aligned crops already."""

    files: PhotoFiles
    manifest: Manifest
    settings: ExtractionSettings
    aligned: AlignedCrops | None = None

    @property
    def url(self) -> str:
        """URL of the photos."""
        return self.files.url

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the faces."""
        return self.aligned.fingerprint() if self.aligned else fingerprint(self.settings)

    def origin(self) -> dict[str, Any]:
        """Return what embeddings say of where they are from."""
        return {"photos": storage.redacted(self.url)}

    def old_plan(self) -> dict[str, Any]:
        """Return what embeddings without versions say of their photos."""
        return {
            "photos": len(self.manifest),
            "photo_bytes": self.manifest.num_bytes,
            "manifest": self.manifest.old_digest(),
        }

    def parts(self) -> PartPlan:
        """Return the parts, which are those of a faces table of these photos."""
        content = content_of(
            self.fingerprint,
            self.settings.max_megapixels,
            self.files.columns.image,
            is_verified=self.aligned is not None and self.aligned.verify,
        )
        return plan_parts(self.manifest, content)

    def how(self) -> tuple[PhotoFiles, ExtractionSettings, AlignedCrops | None]:
        """Return the photos and how to make their faces, the arguments of `PhotoFaces`."""
        return self.files, self.settings, self.aligned

    def items(self, model: str) -> list[tuple[dict[str, Any], list[str], int]]:
        """Return for each part the item for a worker, its files by a model of this digest, and its number of photos."""
        plan = self.parts()
        plan = plan.renamed({name: _output_name(name, name, model) for name in plan.file_names()})
        return [(part_item(plan, part), part.file_names(), len(part)) for part in plan.parts]


Source = FacesSource | PhotosSource


def shared_items(items: Sequence[dict[str, Any]], output: str) -> list[dict[str, Any]]:
    """Return items whose planned photos, if they have any, every worker can read: copied below the output."""
    folder = storage.join(output, MANIFEST_FOLDER)
    copied: set[int] = set()
    for item in items:
        if "manifest" in item and item["shard"] not in copied:
            copy_shard(item["manifest"], folder, item["shard"])
            copied.add(item["shard"])
    return [{**item, "manifest": folder} if "manifest" in item else item for item in items]


def _output_name(name: str, made_of: str, model: str) -> str:
    """Return the file of a part's embeddings by a model with this digest."""
    key = part_key(name) or name.rpartition("/part-")[2].removesuffix(".parquet")
    return part_name(split_in(name), key, digest_of([made_of, model]))


def faces_source(faces_url: str, splits: Sequence[str]) -> FacesSource:
    """Return the parts of these splits of a faces table.

    Raises:
        UserError: the table does not exist or is not finished, or has no photo in these splits.
    """
    success = table.read_success(faces_url)
    names = table.part_names(success, splits)
    if not names:
        raise UserError(f"{faces_url} has no photo in split {', '.join(splits)}: name others by --splits")

    def num_rows_of(name: str) -> int:
        with storage.open_parquet(storage.join(faces_url, name), table.REQUIRED) as file:
            return int(file.metadata.num_rows)

    with ThreadPoolExecutor(_READERS) as pool:
        num_rows = list(pool.map(num_rows_of, names))
    return FacesSource(
        url=faces_url,
        run_id=success["run_id"],
        fingerprint=success["fingerprint"],
        file_names=names,
        num_rows=num_rows,
    )


def photos_source(
    photos_url: str,
    identities_url: str | None,
    settings: ExtractionSettings,
    *,
    split_seed: int = 0,
    splits: Sequence[str] = table.SPLITS,
    with_identities: bool = True,
    unnamed_too: bool = False,
    tombstones: Tombstones | None = None,
    reading: PhotoFlags | None = None,
) -> PhotosSource:
    """Return the photos of these splits, with identities from a file (identities.txt beside them), else their folders.

    Forgotten photos are left out. With `unnamed_too`, the file gives identities but does not choose photos: photos that
    it does not list are used, too, and photos that it lists but do not exist are left out.

    Raises:
        UserError: as `read_manifest` does; or no photo is in these splits.
    """
    if identities_url is not None and not storage.exists(identities_url):
        raise UserError(f"--identities {identities_url} does not exist: correct the path, or leave the flag out")
    beside = storage.join(photos_url.rstrip("/").rpartition("/")[0], "identities.txt")
    listed = (identities_url or beside) if with_identities else None
    reading = reading or PhotoFlags()
    has_list = listed is not None and storage.exists(listed)
    files = reading.source(photos_url, with_identities=not has_list, identities_required=False)
    manifest = read_manifest(
        files,
        listed,
        split_seed=split_seed,
        identities_required=False,
        min_listed_share=ANY_LISTED,  # the list may cover more photos than these
    )
    if unnamed_too:
        manifest = manifest.with_unnamed()
    manifest, _ = without_forgotten(manifest, tombstones)
    kept = manifest.only(" or ".join(f"split = '{split}'" for split in splits))
    if not len(kept):
        raise UserError(f"{photos_url} has no photo in split {', '.join(splits)}: name others by --splits")
    return PhotosSource(files=files, manifest=kept, settings=settings, aligned=reading.crops(settings.alignment))


def check_source(source: Source, embedder: Embedder, *, strict: bool) -> list[str]:
    """Return how the faces of a source differ from the model's training faces, see `check_fingerprint`.

    Raises:
        UserError: the model needs another alignment and the faces have no landmarks; or as `check_fingerprint`.
    """
    made = settings_from_fingerprint(source.fingerprint).alignment.template
    aligned = source.fingerprint.get("aligned")
    if aligned in (EYES, UNKNOWN) and made != embedder.template:
        raise UserError(
            f"the model {storage.redacted(embedder.url)} wants faces aligned as {embedder.template}, and faces made "
            f"with --aligned {aligned} have no landmarks to align them by: "
            f"{'give' if isinstance(source, PhotosSource) else 'run jobs/preprocess.py with'} --aligned "
            f"{embedder.template} if the crops are so aligned, else no --aligned and the photos themselves"
        )
    next_step = "run jobs/preprocess.py with the model's settings (in its README.md), or give --photos"
    return check_fingerprint(source.fingerprint, embedder, strict=strict, next_step=next_step)
