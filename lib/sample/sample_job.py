"""The sample job: draws photos of people who do not exist, with their identities and landmarks.

Each photo depends only on the settings, the identity and its index, so any number of processes draws the same files.
"""

import json
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from lib.config import default_data_url
from lib.errors import UserError
from lib.layout import Layout
from lib.progress import ProgressLine
from lib.sample.people import Moment, Person
from lib.sample.scenery import ENCODINGS, photo_size, take_photo
from lib.storage import exists, join, list_files, parquet_schema, redacted, remove, write_bytes, write_parquet

logger = logging.getLogger(__name__)

VERSION = 1
"""Increase it when the same settings give other files."""

KINDS = ("one", "two", "none", "broken")
"""The number of people in a photo, or `broken`: its file is broken on purpose."""

IDENTITIES_NAME = "identities.txt"
LANDMARKS_NAME = "landmarks.parquet"
MARKER_KEY = b"conv-facenet.sample"
"""Metadata key in landmarks.parquet for the settings as JSON, and whether the set is complete."""

SCHEMA = pa.schema(
    [
        pa.field("photo", pa.string(), nullable=False),
        pa.field("identity", pa.int64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("face_index", pa.int16()),
        pa.field("landmarks", pa.list_(pa.float32(), 10)),
        pa.field("kind", pa.string(), nullable=False),
    ]
)
"""One row per face. Face 0 is the person of identities.txt, the others are strangers without an identity. Photos of the
kinds `none` and `broken` have one row without a face. Landmarks are x y of left eye, right eye, nose, left and right
corner of the mouth, as seen in the upright photo, in its pixels."""

# Special photos, by their place in a cycle of a hundred.
_SPECIAL = {
    **dict.fromkeys((0, 1, 2), ("two", "jpeg")),
    **dict.fromkeys((3, 4), ("none", "jpeg")),
    5: ("broken", "truncated"),
    6: ("broken", "text"),
    7: ("broken", "nothing"),
    8: ("one", "png"),
    9: ("one", "webp"),
    **dict.fromkeys((10, 11), ("one", "progressive")),
    **dict.fromkeys((12, 13), ("one", "greyscale")),
    **dict.fromkeys((14, 15), ("one", "exif")),
}
_CYCLE = 100
_CYCLE_STRIDE = 37
"""Has no common divisor with the cycle: special photos are scattered, and a hundred in a row hold each exactly once."""

_SUFFIXES = {"png": ".png", "webp": ".webp"}
_PHOTOS_A_PROCESS = 500
"""Below this, starting another process costs more than it saves."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw photos of people who do not exist."""

    data: str = field(default_factory=default_data_url)
    """Folder or URL for photos/, identities.txt and landmarks.parquet. Default: $DATA_URL, else ./data."""
    identities: int = 40
    """Number of people."""
    photos_per_identity: int = 12
    """Photos of each person."""
    seed: int = 0
    """Seed of people and photos. The same seed gives the same bytes."""
    overwrite: bool = False
    """Replace a sample that has other settings. Files of your own are never touched."""
    dry_run: bool = False
    """Check the folder and print the plan, then stop."""
    if_empty: bool = False
    """Do nothing if the folder already holds photos of your own. Without it they are an error."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", Layout(self.data).url)
        for flag, value in (("identities", self.identities), ("photos-per-identity", self.photos_per_identity)):
            if not 1 <= value <= 10**6:
                raise UserError(f"--{flag} is {value}: allowed are 1 to 1000000")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: allowed is 0 or more")

    @property
    def photos_url(self) -> str:
        """Where the photos go."""
        return Layout(self.data).photos()

    @property
    def plan(self) -> "SamplePlan":
        """What is drawn, independent of where it goes."""
        return SamplePlan(identities=self.identities, photos_per_identity=self.photos_per_identity, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """Everything that decides the files."""

    identities: int
    photos_per_identity: int
    seed: int
    version: int = VERSION

    def __len__(self) -> int:
        return self.identities * self.photos_per_identity

    def identity(self, photo: int) -> int:
        """Return the identity, counted from 1, of the photo, counted from 0."""
        return photo // self.photos_per_identity + 1

    def special(self, photo: int) -> tuple[str, str]:
        """Return the kind and the encoding of a photo."""
        return _SPECIAL.get((photo * _CYCLE_STRIDE + self.seed) % _CYCLE, ("one", "jpeg"))

    def name(self, photo: int) -> str:
        """Return the file name of a photo."""
        suffix = _SUFFIXES.get(self.special(photo)[1], ".jpg")
        return f"{self.identity(photo):05d}_{photo % self.photos_per_identity:03d}{suffix}"

    def names(self) -> set[str]:
        """Return the file names of all photos."""
        return {self.name(photo) for photo in range(len(self))}


def draw_photo(plan: SamplePlan, photo: int) -> tuple[bytes, list[dict[str, Any]]]:
    """Return the file of one photo and its rows of `SCHEMA`."""
    identity, (kind, encoding) = plan.identity(photo), plan.special(photo)
    rng = np.random.default_rng([plan.seed, identity, photo % plan.photos_per_identity, 1])
    people = []
    if kind != "none":
        people.append((Person.random(np.random.default_rng([plan.seed, identity])), Moment.random(rng)))
    if kind == "two":
        people.append((Person.random(rng), Moment.random(rng)))
    width, height = photo_size(rng)
    pixels_HW3, landmarks_F52 = take_photo(people, width, height, rng)
    data = ENCODINGS[encoding](pixels_HW3, rng)
    row = {"photo": plan.name(photo), "identity": identity, "kind": kind}
    if kind == "broken":
        return data, [row]
    row |= {"width": width, "height": height}
    faces = [
        row | {"face_index": index, "identity": None if index else identity, "landmarks": landmarks_52.ravel()}
        for index, landmarks_52 in enumerate(landmarks_F52)
    ]
    return data, faces or [row]


def make_sample(config: SampleConfig) -> dict[str, Any]:
    """Draw the data set and return its counts.

    A complete set of the same plan stays as it is; an interrupted one is drawn again.

    Raises:
        UserError: the folder has files that this plan did not make.
    """
    start, plan = time.monotonic(), config.plan
    if config.if_empty and any(list_files(config.photos_url)):
        marker = _read_marker(config.data)
        if marker is None or marker[0] != plan:
            logger.info("%s holds other photos: nothing to do", config.data)
            return {"data": config.data, "drawn": 0}
    is_complete, outdated = _check_destination(config)
    kinds = Counter(plan.special(photo)[0] for photo in range(len(plan)))
    counts: dict[str, Any] = {"data": config.data, "photos": len(plan), "identities": plan.identities}
    counts |= {kind: kinds[kind] for kind in KINDS}
    if config.dry_run:
        return {**counts, "to_draw": 0 if is_complete else len(plan), "to_delete": len(outdated)}
    if is_complete:
        logger.info("%s already holds this sample: nothing to do", config.data)
    else:
        _draw_all(config, outdated)
    seconds, drawn = time.monotonic() - start, 0 if is_complete else len(plan)
    return {**counts, "drawn": drawn, "seconds": round(seconds, 2), "photos_per_s": round(drawn / seconds, 1)}


def _check_destination(config: SampleConfig) -> tuple[bool, list[str]]:
    """Return whether the sample is there and complete, and the photos of an older one that must go."""
    photos_url = config.photos_url
    present = {info.path for info in list_files(photos_url)}
    marker = _read_marker(config.data)
    if marker is None:
        others = sorted(present)[:1] or [
            name for name in (IDENTITIES_NAME, LANDMARKS_NAME) if exists(join(config.data, name))
        ]
        if others:
            raise UserError(
                f"{config.data} holds photos of your own, such as {others[0]!r}: nothing was touched; "
                "choose an empty place with --data (or DATA_URL)"
            )
        return False, []
    there, was_complete = marker
    strange = sorted(present - there.names() - config.plan.names())
    if strange:
        raise UserError(
            f"{photos_url} holds {len(strange)} files of your own, such as {strange[0]!r}: nothing was "
            "touched; move them away, or choose another place with --data"
        )
    if there != config.plan and not config.overwrite:
        ours, theirs = asdict(config.plan), asdict(there)
        differences = ", ".join(
            f"{name} {theirs[name]} there, {ours[name]} asked for" for name in ours if ours[name] != theirs[name]
        )
        raise UserError(
            f"{config.data} holds a sample of other settings ({differences}): replace it with --overwrite, or choose "
            "another place with --data"
        )
    is_complete = there == config.plan and was_complete and present >= there.names()
    return is_complete, sorted(present - config.plan.names())


def _read_marker(data_url: str) -> tuple[SamplePlan, bool] | None:
    url = join(data_url, LANDMARKS_NAME)
    if not exists(url):
        return None
    metadata = parquet_schema(url).metadata or {}
    if MARKER_KEY not in metadata:
        return None
    try:
        marker = json.loads(metadata[MARKER_KEY])
        return SamplePlan(**marker["plan"]), bool(marker["complete"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{redacted(url)} is damaged ({error}): remove it, or choose another place") from error


def _draw_all(config: SampleConfig, outdated: list[str]) -> None:
    plan = config.plan
    # The marker is written first, so that after an interruption these photos are known to be drawn.
    _write_landmarks(config, [], complete=False)
    for name in outdated:
        remove(join(config.photos_url, name))
    lines = "".join(f"{plan.name(photo)} {plan.identity(photo)}\n" for photo in range(len(plan)))
    write_bytes(join(config.data, IDENTITIES_NAME), lines.encode())
    logger.info("drawing %d photos of %d people", len(plan), plan.identities)
    rows = []
    with (
        ProgressLine("drawing", unit="photo", total=len(plan)) as progress,
        _map(partial(_draw_one, config), range(len(plan))) as done,
    ):
        for of_photo in done:
            rows += of_photo
            progress.add(1)
    _write_landmarks(config, rows, complete=True)


def _draw_one(config: SampleConfig, photo: int) -> list[dict[str, Any]]:
    data, rows = draw_photo(config.plan, photo)
    write_bytes(join(config.photos_url, config.plan.name(photo)), data)
    return rows


def _write_landmarks(config: SampleConfig, rows: list[dict[str, Any]], *, complete: bool) -> None:
    marker = json.dumps({"plan": asdict(config.plan), "complete": complete})
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({MARKER_KEY: marker.encode()}))
    write_parquet(join(config.data, LANDMARKS_NAME), table)


@contextmanager
def _map(draw: partial[list[dict[str, Any]]], photos: range) -> Iterator[Iterable[list[dict[str, Any]]]]:
    """Yield the results of all photos in order, from as many processes as are worth starting."""
    num_processes = min(len(os.sched_getaffinity(0)), len(photos) // _PHOTOS_A_PROCESS)
    if num_processes < 2:
        yield map(draw, photos)
        return
    # Spawned: an object store's client does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield pool.map(draw, photos, chunksize=16)
