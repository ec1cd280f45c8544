"""Are copies of photos found by `jobs/curate.py`? Altered copies are planted, and looked for with any embeddings.

    python -m bench.planted_copies --faces data/faces --photos data/photos --into copies      # writes copies/photos
    jobs/preprocess.py --data copies --split-shares 100 0 0                                   # and embed both tables
    python -m bench.planted_copies --faces data/faces --embeddings E --copied-faces copies/faces --copied-embeddings F

A copy is saved again, or halved in size and saved at quality 50, or cut by 4 % at each side and saved at quality 70, in
turns. Each limit of the distance that the job could use is tried. Prints a line for each, and the pairs that were found
and not planted.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tyro

from lib import storage
from lib.curation.duplicates import NEAR_SHARE, duplicates
from lib.curation.neighbour_graph import near_faces
from lib.curation.proposals import NOBODY
from lib.faces import table
from lib.recognition.crops import read_crops
from lib.recognition.embeddings_table import read_embeddings
from lib.recognition.face_source import faces_source

COPY = "copy of "


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Where the photos are, and what is measured."""

    faces: str
    """Faces table of the photos."""
    photos: Path = Path("photos")
    into: Path | None = None
    """Folder to write copies into."""
    share: float = 0.02
    seed: int = 0
    embeddings: str = ""
    copied_faces: str = ""
    copied_embeddings: str = ""
    threshold: float = 0.6
    """The model's; dlib's documentation gives 0.6."""


def plant(flags: Flags, into: Path) -> None:
    """Write altered copies of some photos, under their names."""
    source = faces_source(flags.faces, table.SPLITS)
    names = sorted(read_crops(source, photo_names(flags.faces)))
    chosen = np.random.default_rng(flags.seed).permutation(names)[: round(len(names) * flags.share)].tolist()
    for number, name in enumerate(chosen):
        pixels, quality = cv2.imread(str(flags.photos / name)), 90
        assert pixels is not None, f"{name} was aligned, and is gone"
        if number % 3 == 1:
            pixels, quality = cv2.resize(pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), 50
        if number % 3 == 2:
            y, x = (round(0.04 * side) for side in pixels.shape[:2])
            pixels, quality = pixels[y:-y, x:-x], 70
        path = into / "photos" / Path(name).with_suffix(".jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    print(f"{len(chosen)} copies of {len(names)} photos are in {into / 'photos'}")


def photo_names(faces_url: str) -> list[str]:
    """Return the photos of a faces table."""
    success = table.read_success(faces_url)
    urls = [f"{faces_url}/{name}" for name in table.part_names(success, table.SPLITS)]
    return [name for url in urls for name in storage.read_parquet(url, table.columns("photo"))["photo"].to_pylist()]


def measure(flags: Flags) -> None:
    """Print precision and recall of the proposals among photos and copies."""
    made = [read_embeddings(url) for url in (flags.embeddings, flags.copied_embeddings)]
    photos = [*made[0].photos, *(COPY + name for name in made[1].photos)]
    vectors_ND = np.concatenate([each.embeddings_ND for each in made])
    crops = read_crops(faces_source(flags.faces, table.SPLITS), made[0].photos)
    copied = read_crops(faces_source(flags.copied_faces, table.SPLITS), made[1].photos)
    crops |= {COPY + name: crop for name, crop in copied.items()}
    stems = {Path(name).with_suffix("").as_posix() for name in made[1].photos}
    for share in (0.4, 0.5, NEAR_SHARE, 0.7, 0.8):
        pairs_P2, distances_P = near_faces(vectors_ND, share * flags.threshold).within(share * flags.threshold)
        asked = {photos[n] for n in np.unique(pairs_P2)}
        people = np.full(len(photos), NOBODY)
        found = duplicates(pairs_P2, distances_P, photos, people, ((name, crops[name]) for name in sorted(asked)))
        found.sort(key=lambda each: -each.certainty)
        named = [(photos[each.evidence[0]], photos[each.faces[0]]) for each in found]
        right = np.array([is_planted(*pair) for pair in named], bool)
        precision, recall = np.cumsum(right) / np.arange(1, len(right) + 1), np.cumsum(right) / len(stems)
        sure = np.flatnonzero(precision >= 0.95)
        at = f"recall {recall[sure[-1]]:.3f} at precision {precision[sure[-1]]:.3f}" if len(sure) else "never 0.95"
        print(f"limit {share:.1f}: {len(pairs_P2)} pairs, {at}; all {recall[-1]:.3f} at {precision[-1]:.3f}")
        if share == NEAR_SHARE:
            others = [(each, *pair) for each, pair, yes in zip(found, named, right, strict=True) if not yes]
            for each, one, other in others:
                print(f"    not planted: {one} and {other}, certainty {each.certainty:.2f}")


def is_planted(one: str, other: str) -> bool:
    """Return whether one is the copy of the other."""
    stems = [Path(name.removeprefix(COPY)).with_suffix("") for name in (one, other)]
    return stems[0] == stems[1] and one.startswith(COPY) != other.startswith(COPY)


if __name__ == "__main__":
    given = tyro.cli(Flags, description=__doc__)
    if given.into is None:
        measure(given)
    else:
        plant(given, given.into)
