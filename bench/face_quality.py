"""Do the measures of a face agree with those of others on real photos? Ranks of sharpness and pose.

    python -m bench.face_quality --faces data/faces

Compares the ranks of our sharpness with those of the variance of OpenCV's Laplacian of the whole crop, for the photos
as they are and for blurred ones. Compares those of yaw and pitch with OpenCV's solvePnP (SQPNP, a perspective camera)
on the same landmarks. Prints Spearman's rank correlations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
import pyarrow as pa
import tyro
from scipy.stats import spearmanr

from lib import storage
from lib.faces import quality, table

SIGMAS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is measured."""

    faces: str
    """Faces table of real photos."""
    num: int = 300
    """Faces that are blurred."""


def main() -> None:
    """Print the figures."""
    flags = tyro.cli(Flags, description=__doc__)
    success = table.read_success(flags.faces)
    names = ("crop", "landmarks", "box", "yaw", "pitch", "roll", "sharpness", "status")
    urls = [storage.join(flags.faces, name) for name in table.part_names(success, table.SPLITS)]
    rows = pa.concat_tables([storage.read_parquet(url, table.columns(*names)) for url in urls]).to_pylist()
    rows = [row for row in rows if row["status"] == table.ALIGNED]
    chosen = [rows[n] for n in np.random.default_rng(0).permutation(len(rows))[: flags.num]]
    sharpness(rows, chosen)
    pose(rows)


def sharpness(rows: Sequence[dict], chosen: Sequence[dict]) -> None:
    """Compare sharpness with the Laplacian of the whole crop."""
    whole = [laplacian(luma_of(row)) for row in rows]
    print(f"{len(rows)} faces as they are: {rank([row['sharpness'] for row in rows], whole)}")
    ours, theirs, alone = [], [], []
    for row in chosen:
        blurred = [cv2.GaussianBlur(luma_of(row), (0, 0), sigma) for sigma in SIGMAS]
        mine = [quality.luma_measures(luma)["sharpness"] for luma in blurred]
        ours += mine
        theirs += [laplacian(luma) for luma in blurred]
        alone.append(all(one > other for one, other in pairwise(mine)))
    print(f"{len(chosen)} faces, {len(SIGMAS)} blurs each: {rank(ours, theirs)}; falls with each blur in {sum(alone)}")


def luma_of(row: dict) -> np.ndarray:
    """Return the luma of a crop."""
    luma = cv2.imdecode(np.frombuffer(row["crop"], np.uint8), cv2.IMREAD_GRAYSCALE)
    assert luma is not None
    return np.asarray(luma)


def laplacian(luma: np.ndarray) -> float:
    """Return the usual measure of focus: the variance of the Laplacian."""
    return float(cv2.Laplacian(luma, cv2.CV_64F).var())


def pose(rows: Sequence[dict]) -> None:
    """Compare yaw and pitch with a perspective camera's."""
    ours, theirs = [], []
    for row in rows:
        points_52 = np.array(row["landmarks"], np.float64).reshape(5, 2)
        centre = points_52.mean(axis=0)
        side = 4 * float(np.linalg.norm(points_52[1] - points_52[0]))
        camera = np.array([[side, 0, centre[0]], [0, side, centre[1]], [0, 0, 1.0]])
        found, turn, _ = cv2.solvePnP(quality._FACE_53, points_52, camera, None, flags=cv2.SOLVEPNP_SQPNP)
        if found:
            angles = cv2.RQDecomp3x3(cv2.Rodrigues(turn)[0])[0]
            ours.append((row["yaw"], row["pitch"]))
            theirs.append((angles[1], angles[0]))
    for n, name in enumerate(("yaw", "pitch")):
        mine, others = (np.array(each)[:, n] for each in (ours, theirs))
        others = np.mod(others + 90, 180) - 90  # the camera looks along +z, or along -z
        agreement = abs(float(spearmanr(mine, others).statistic))
        print(f"{name} of {len(ours)} faces against solvePnP: {agreement:.3f}")


def rank(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return Spearman's rank correlation in words."""
    return f"Spearman {float(spearmanr(ours, theirs).statistic):.3f}"


if __name__ == "__main__":
    main()
