"""The part of the training crops that a node holds in an epoch, where its copy is bounded by `--cache-size`.

In each epoch the people are dealt out to the nodes anew, so every pair of people can meet. A node copies the crops of
its people, until the bound, and trains on them alone. The names of all photos are on every node, so a row has the same
number everywhere.

Shape suffixes: N photos (rows) of the whole table, I identities, K nodes.
"""

import hashlib
import json
import logging
import os
import socket
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.face_filter import FaceFilter
from lib.faces.table import crop_size
from lib.threads import mapped
from lib.training import collective
from lib.training.cache_building import COPY_THREADS, NoFacesError, Only, size_of_crops, within_limit
from lib.training.cache_files import (
    CACHE_SCHEMA,
    ROW_FIELD,
    ROWS_PER_BATCH,
    CacheFullError,
    made_once,
    write_batches,
)
from lib.training.face_cache import Crops, EncodedCrops, FaceCache, Held
from lib.training.face_names import part_urls, usable
from lib.training.meeting import Meeting
from lib.training.settings import TrainConfig
from lib.training.table_crops import TableCrops, cached_faces, tell_full

logger = logging.getLogger(__name__)

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.integer]

SHARE_SCHEMA = pa.schema([*CACHE_SCHEMA, ROW_FIELD])
BYTES_OF_NAMES = 100_000
"""Of a part, about."""
SMALLEST_SHARE = 2
"""People of a node: with one there is no negative."""
_DEALT = 5
"""With seed and epoch, the source of the order in which people are dealt out."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The training faces."""

    urls: Sequence[str]
    """Its parts."""
    only: Only | None
    taken: FaceFilter
    digest: str
    """Of the run and of all that decides which faces these are."""


@dataclass(frozen=True)
class Place:
    """Where a worker is."""

    node: int
    num_nodes: int
    worker: int
    """Number of this worker on its node."""
    num_workers: int
    """Of this node."""


def own_place() -> Place:
    """Return this worker's place. Nodes are in the order of their names, so a run that starts again has the same."""
    hosts = collective.from_all(socket.gethostname())
    mine, rank = hosts[collective.rank()], collective.rank()
    names = sorted(set(hosts))
    return Place(names.index(mine), len(names), hosts[:rank].count(mine), hosts.count(mine))


def dealt_people(labels_N: Ints, *, num_nodes: int, most_photos: int, seed: int, epoch: int) -> Bools:
    """Return which people each node holds in an epoch [K, I]: of a random order every Kth, up to so many photos."""
    counts_I = np.bincount(labels_N)
    order = np.random.default_rng((seed, epoch, _DEALT)).permutation(len(counts_I))
    held_KI = np.zeros((num_nodes, len(counts_I)), bool)
    for node in range(num_nodes):
        people = order[node::num_nodes]
        num = int(np.searchsorted(np.cumsum(counts_I[people]), most_photos, side="right"))
        held_KI[node, people[:num]] = True
    return held_KI


@dataclass(kw_only=True)
class NodeShare:
    """Gives the cache of a worker the crops of its node's people, anew in each epoch."""

    cache: FaceCache
    faces: Table
    folder: str
    most_photos: int
    """That a node may hold."""
    seed: int
    place: Place
    num_bytes: int
    """About what that needs."""
    epoch: int = 0
    """Whose people are held; 0 before the first."""
    _starts: Ints = field(init=False)
    _names: EncodedCrops = field(init=False)

    def __post_init__(self) -> None:
        self._names = EncodedCrops(self.cache.path)
        sizes = np.array(self._names.rows_of_batches)
        self._starts = np.cumsum(sizes) - sizes

    def hold(self, epoch: int, meeting: Meeting) -> int:
        """Copy the crops of this node's people of an epoch; those of the epoch before go. Every worker calls this.

        Return how many photos the nodes hold together. The workers meet when all have their crops.

        Raises:
            UserError: a node would hold fewer than two people.
        """
        labels_N, place = self.cache.labels_N, self.place
        dealt_KI = dealt_people(
            labels_N, num_nodes=place.num_nodes, most_photos=self.most_photos, seed=self.seed, epoch=epoch
        )
        fewest = int(dealt_KI.sum(axis=1).min())
        if fewest < SMALLEST_SHARE:
            raise UserError(f"--cache-size has room for {fewest} people on a node: raise it")
        held_I = dealt_KI[place.node]
        held = Held(
            rows_N=held_I[labels_N],
            people_I=held_I,
            on_any_node_N=np.logical_or.reduce(dealt_KI)[labels_N],
            worker=place.worker,
            num_workers=place.num_workers,
        )
        self.cache.hold(self._names, None)
        collective.wait_for_all()  # a file that is mapped still fills the disk
        self.cache.hold(self._crops(epoch, held.rows_N), held)
        meeting.wait()
        self.epoch = epoch
        return int(held.on_any_node_N.sum())

    def check_batch(self, num_anchors: int, wanted: int) -> None:
        """Raise UserError if the people of this node are too few for a batch."""
        if num_anchors < wanted:
            raise UserError(
                f"--cache-size has room for too few people on a node: their batches have {num_anchors} photos instead "
                f"of {wanted}, so raise it, or take a smaller --batch-size"
            )

    def _crops(self, epoch: int, held_N: Bools) -> Crops:
        name = f"faces-share-{self.faces.digest}"
        path = Path(self.folder) / f"{name}-{epoch}-{self.place.node}-of-{self.place.num_nodes}.arrow"

        def build() -> None:
            for old in path.parent.glob(f"{name}-*.arrow"):
                os.truncate(old, 0)  # where a process still has it mapped, its blocks would stay otherwise
                old.unlink()
                old.with_suffix(".lock").unlink(missing_ok=True)
            write_batches(path, self._batches(held_N), self.num_bytes, SHARE_SCHEMA)

        try:
            return EncodedCrops(made_once(path, self.folder, build))
        except CacheFullError as full:
            crops = TableCrops(self.faces.urls, self.faces.only, self.faces.taken, full)
            tell_full(full)
            return crops

    def _batches(self, held_N: Bools) -> Generator[pa.RecordBatch, None, None]:
        """Yield the crops of the held rows with their numbers, in order."""
        ends = [*self._starts[1:].tolist(), len(held_N)]
        parts = [
            (url, start, held_N[start:end])
            for url, start, end in zip(self.faces.urls, self._starts.tolist(), ends, strict=True)
            if held_N[start:end].any()
        ]
        with mapped(partial(_held_rows, self.faces), parts, num_threads=COPY_THREADS) as made:
            yield from chain.from_iterable(made)


def build_names(faces: Table, cache_dir: str) -> str:
    """Return the path of a cache file with the names of all faces and no crop; each part is a batch."""
    path = Path(cache_dir) / f"faces-names-{faces.digest}.arrow"

    def batches() -> Generator[pa.RecordBatch, None, None]:
        with mapped(partial(_names, faces), faces.urls, num_threads=COPY_THREADS) as made:
            yield from made

    def build() -> None:
        if not write_batches(path, batches(), BYTES_OF_NAMES * len(faces.urls)):
            raise NoFacesError(["train"], faces.taken)

    return made_once(path, cache_dir, build)


def _names(faces: Table, url: str) -> pa.RecordBatch:
    with storage.open_parquet(url, table.columns("photo", "identity", "status")) as file:
        faces.taken.check(file.schema_arrow, storage.redacted(url))
        rows = file.read(columns=["photo", "identity", "status", *faces.taken.columns])
    rows = _wanted(faces, rows)
    columns = [
        rows["photo"].combine_chunks(),
        rows["identity"].combine_chunks(),
        pa.array([b""] * len(rows), pa.binary()),
    ]
    return pa.record_batch(columns, schema=CACHE_SCHEMA)


def _wanted(faces: Table, rows: pa.Table) -> pa.Table:
    rows = rows.filter(usable(rows, faces.taken))
    return rows if faces.only is None else faces.only.kept(rows)


def _held_rows(faces: Table, part: tuple[str, int, Bools]) -> list[pa.RecordBatch]:
    url, start, held = part
    with storage.open_parquet(url, table.columns(*CACHE_SCHEMA.names, "status")) as file:
        rows = _wanted(faces, file.read(columns=[*CACHE_SCHEMA.names, "status", *faces.taken.columns]))
    rows = rows.select(CACHE_SCHEMA.names).append_column(ROW_FIELD, pa.array(np.arange(start, start + len(rows))))
    rows = rows.filter(pa.array(held))
    rows = rows.set_column(2, "crop", rows["crop"].fill_null(b"")).cast(SHARE_SCHEMA)
    return rows.combine_chunks().to_batches(max_chunksize=ROWS_PER_BATCH)


def open_train(config: TrainConfig, folder: str, run_id: str | None) -> tuple[FaceCache, NodeShare | None]:
    """Return the training faces: all in a cache of this node, or with a share of them where `--cache-size` is smaller.

    Raises:
        UserError: there is no face, or a part is damaged.
    """
    limit, taken = config.sampling.photos_limit, config.sampling.faces
    if config.run.cache_size:
        success = table.read_success(config.faces_url, run_id=run_id)
        urls = part_urls(config.faces_url, success, ["train"])
        num_bytes, num_rows = size_of_crops(urls)
        of_photo = max(1.0, num_bytes / max(num_rows, 1))
        room = config.run.cache_size * 1e9
        if of_photo * (min(limit, num_rows) if limit else num_rows) > room:
            content = json.dumps([config.run_url, success, limit, str(taken), config.run.seed], sort_keys=True)
            digest = hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:16]
            faces = Table(urls=urls, only=within_limit(urls, limit, None, taken), taken=taken, digest=digest)
            cache = FaceCache(build_names(faces, folder), crop_size(success))
            most_photos = int(room // of_photo)
            logger.info("a node holds the crops of at most %d of %d photos at once", most_photos, len(cache))
            share = NodeShare(
                cache=cache,
                faces=faces,
                folder=folder,
                most_photos=most_photos,
                num_bytes=int(room),
                seed=config.run.seed,
                place=own_place(),
            )
            return cache, share
    return cached_faces(config.faces_url, ["train"], folder, photos_limit=limit, run_id=run_id, taken=taken), None
