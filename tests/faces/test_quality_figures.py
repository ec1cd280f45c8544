"""Histograms and examples of the columns of quality are the same whether parts are counted alone or together."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import pyarrow as pa

from lib.faces import quality
from lib.faces.images import to_jpeg
from lib.faces.quality_figures import BINS, EXAMPLES, merged, of_part, picture, quantiles


def columns(rng: np.random.Generator, num: int) -> pa.Table:
    """Return rows whose quality is null in a tenth of them."""
    values = rng.uniform(0, 1, num)
    nulls = rng.uniform(size=num) < 0.1
    return pa.table(
        {
            "quality": pa.array(values, pa.float32(), mask=nulls),
            "sharpness": pa.array(rng.lognormal(5, 3, num), pa.float32()),
        }
    )


def test_parts_add_up_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    parts = {f"part {n}": columns(rng, int(rng.integers(0, 400))) for n in range(40)}
    figures: dict = {}
    for name, rows in parts.items():
        merged(figures, of_part(name, rows))
    every = [(value, name, n) for name, rows in parts.items() for n, value in enumerate(rows["quality"].to_pylist())]
    known = sorted(each for each in every if each[0] is not None)
    counts, _ = np.histogram([value for value, _, _ in known], BINS["quality"])
    spread = figures["quality"]
    assert spread.counts.tolist() == counts.tolist()
    assert sorted(spread.lowest) == known[:EXAMPLES]
    assert sorted(spread.highest) == known[-EXAMPLES:]
    assert all(0.4 < value < 0.6 for value, _, _ in spread.middle())
    assert len(spread.sampled) <= 600
    assert figures["sharpness"].counts.sum() == len(every)  # those beyond the edges, too
    found = quantiles(figures)["quality"]
    assert found["faces"] == len(known)
    for name, share in (("p5", 0.05), ("p50", 0.5), ("p95", 0.95)):
        assert abs(found[name] - share) < 0.05


def test_columns_that_a_table_lacks_or_has_no_value_of_are_left_out() -> None:
    rows = pa.table({"yaw": pa.array([None, None], pa.float32()), "photo": ["a", "b"]})
    assert of_part("part", rows) == {}
    assert quantiles({}) == {}


def test_the_picture_shows_faces_of_low_middling_and_high_values() -> None:
    values = np.linspace(0, 1, 9, dtype=np.float32)
    rows = pa.table(dict.fromkeys(quality.NAMES, values))
    asked: list[tuple[str, list[int]]] = []

    def read_crops(name: str, wanted: Sequence[int]) -> Mapping[int, bytes]:
        asked.append((name, list(wanted)))
        return {n: to_jpeg(np.full((40, 40, 3), 20 + 25 * n, np.uint8), 95) for n in wanted}

    shown = cv2.imdecode(np.frombuffer(picture(of_part("part", rows), read_crops), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert asked == [("part", list(range(9)))]
    height, width = shown.shape
    assert height / width > 0.8
    row = shown[: height // len(quality.NAMES), width // 4 :]
    greys = [20 + 25 * n for n in range(9)]
    assert all((abs(row.astype(int) - grey) <= 3).sum() > 4000 for grey in greys)
