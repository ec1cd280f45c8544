"""Caches of crops that training keeps on this node. One with a target, or with anybody else forgotten, is removed."""

import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from lib.faces.tombstones import Tombstones
from lib.forgetting.targets import FACE_OF, IDENTITY, PHOTO, Targets
from lib.training.cache_files import CACHE_SCHEMA, default_folder

logger = logging.getLogger(__name__)

_FIELDS = [CACHE_SCHEMA.get_field_index(name) for name in (PHOTO, IDENTITY)]


def caches_with(targets: Targets, cache_dir: str | None, tombstones: Tombstones | None = None) -> dict[str, int]:
    """Return the caches of this node that name the targets, and how many rows of each do.

    They are in the user's own folder and in `cache_dir`. One that is unfinished or cannot be read counts as one row,
    because nobody knows whom it shows.

    Args:
        tombstones: of earlier forgettings, whose photos count too: when the tables were changed from another node, no
            table tells any more which photos a person had.
    """
    found: dict[str, int] = {}
    for folder in dict.fromkeys(filter(None, [default_folder(), cache_dir])):
        for path in Path(folder).glob("faces-*.arrow"):
            if num := _rows_in(path, targets, tombstones):
                found[str(path)] = num
        found |= {str(path): 1 for path in _abandoned(Path(folder))}
    return found


def remove_cache(path: str) -> None:
    """Remove a cache. A training that has it open can still read it."""
    Path(path).unlink(missing_ok=True)


def _rows_in(path: Path, targets: Targets, tombstones: Tombstones | None) -> int:
    try:
        with pa.memory_map(str(path)) as source:
            file = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=_FIELDS))
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
            return sum(_rows_of(pa.Table.from_batches([batch]), targets, tombstones) for batch in batches)
    except FileNotFoundError:  # removed by a training meanwhile
        return 0
    except (pa.ArrowException, OSError):
        logger.warning("%s cannot be read: it is removed", path)
        return 1


def _rows_of(rows: pa.Table, targets: Targets, tombstones: Tombstones | None) -> int:
    named = targets.rows(rows)
    if tombstones is None:
        return int(named.true_count)
    others = rows.filter(pc.invert(named))[PHOTO].to_pylist()
    photos = ({name, FACE_OF.sub("", name)} for name in others)  # a row may be a face of a photo
    return int(named.true_count) + sum(any(map(tombstones.holds_photo, names)) for names in photos)


def _abandoned(folder: Path) -> Iterator[Path]:
    """Yield the unfinished caches that no process is making."""
    for path in folder.glob("faces-*.unfinished"):
        try:
            with path.with_suffix(".lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass
        except BlockingIOError:
            logger.warning("a training is making %s: run this command again afterwards", path.with_suffix(".arrow"))
            continue
        yield path
