"""The distribution of the columns of quality: histograms, and faces with low, middling and high values.

Each part is counted alone, and the counts are added. So the memory does not depend on the number of rows: it is that
of the histograms and of a few examples.
"""

import heapq
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import pyarrow as pa

from lib.faces import quality

BINS: Mapping[str, np.ndarray] = {
    "eye_distance": np.geomspace(4, 1024, 33),
    "sharpness": np.geomspace(1, 10_000, 33),
    "brightness": np.linspace(0, 255, 35),
    "contrast": np.linspace(0, 120, 31),
    "yaw": np.linspace(-90, 90, 37),
    "pitch": np.linspace(-90, 90, 37),
    "roll": np.linspace(-90, 90, 37),
    "quality": np.linspace(0, 1, 41),
}
"""Edges of the bins. Values outside count in the outermost bins."""

UNITS = {"eye_distance": "pixels", "yaw": "degrees", "pitch": "degrees", "roll": "degrees"}

LOGARITHMIC = ("eye_distance", "sharpness")

_DPI, _TILE = 100, 96
_TILE_IN, _HISTOGRAM_IN, _TEXT_IN, _GAP_IN = 0.96, 2.6, 0.34, 0.15

EXAMPLES = 3
"""Number of faces shown for each column: lowest, middle and highest values."""
_SAMPLED = 600
"""Rows of a column that are kept to find the middle ones."""

Example = tuple[float, str, int]
"""A value, with the file and the row of its face."""


@dataclass
class Spread:
    """Counts and examples of one column."""

    counts: np.ndarray
    lowest: list[Example] = field(default_factory=list)
    highest: list[Example] = field(default_factory=list)
    sampled: list[Example] = field(default_factory=list)
    num_parts: int = 0

    def merge(self, other: "Spread") -> None:
        """Add the counts and examples of another part."""
        self.counts = self.counts + other.counts
        self.lowest = heapq.nsmallest(EXAMPLES, [*self.lowest, *other.lowest])
        self.highest = heapq.nlargest(EXAMPLES, [*self.highest, *other.highest])
        self.num_parts += other.num_parts
        self.sampled += other.sampled
        if len(self.sampled) > _SAMPLED:  # evenly spread over their values, so that the middle stays
            self.sampled = sorted(self.sampled)[::2]

    def middle(self) -> list[Example]:
        """Return examples near the median, among those near the medians of the parts."""
        ordered = sorted(self.sampled)
        first = max(0, (len(ordered) - EXAMPLES) // 2)
        return ordered[first : first + EXAMPLES]


Figures = dict[str, Spread]
"""By column, without columns that the table lacks."""


def of_part(name: str, rows: pa.Table) -> Figures:
    """Return the figures of a part's file, from its rows with the columns of quality; null values do not count."""
    figures: Figures = {}
    for column, edges in BINS.items():
        if column not in rows.column_names:
            continue
        values_N = rows[column].to_numpy()
        places = np.flatnonzero(np.isfinite(values_N))
        if not len(places):
            continue
        counts, _ = np.histogram(values_N[places].clip(edges[0], edges[-1]), edges)
        order = places[np.argsort(values_N[places], kind="stable")]
        middle = max(0, len(order) // 2 - 1)
        lowest, highest, sampled = (
            [(float(values_N[n]), name, int(n)) for n in chosen]
            for chosen in (order[:EXAMPLES], order[-EXAMPLES:], order[middle : middle + EXAMPLES])
        )
        figures[column] = Spread(counts, lowest, highest, sampled, num_parts=1)
    return figures


def merged(figures: Figures, more: Figures) -> None:
    """Add the figures of another part to those of some."""
    for column, spread in more.items():
        if column in figures:
            figures[column].merge(spread)
        else:
            figures[column] = spread


def quantiles(figures: Figures) -> dict[str, dict[str, float]]:
    """Return about the 5th, 50th and 95th percentile of each column, to the width of a bin, and the counts."""
    found = {}
    for column, spread in figures.items():
        cumulated = np.cumsum(spread.counts) / spread.counts.sum()
        edges = BINS[column]
        places = [int(np.searchsorted(cumulated, share)) for share in (0.05, 0.5, 0.95)]
        p5, p50, p95 = (round(float((edges[n] + edges[min(n + 1, len(edges) - 1)]) / 2), 3) for n in places)
        found[column] = {"faces": int(spread.counts.sum()), "p5": p5, "p50": p50, "p95": p95}
    return found


def picture(figures: Figures, read_crops: Callable[[str, Sequence[int]], Mapping[int, bytes]]) -> bytes:
    """Return a JPEG with a row for each column: its histogram, then faces of low, middling and high values.

    Args:
        read_crops: returns the crops of these rows of a part's file.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed at the end of preprocess

    columns = [name for name in quality.NAMES if name in figures]
    shown = {column: _examples(figures[column]) for column in columns}
    crops = _crops(shown, read_crops)
    # In inches: a histogram is as high as a face, and text stands above both.
    height = _TILE_IN + _TEXT_IN
    width_in, height_in = _HISTOGRAM_IN + 3 * EXAMPLES * _TILE_IN + 3 * _GAP_IN, height * len(columns) + _TEXT_IN
    figure = Figure(figsize=(width_in, height_in), dpi=_DPI)
    for row, column in enumerate(columns):
        bottom = height_in - (row + 1) * height
        box = (_GAP_IN, bottom, _HISTOGRAM_IN, _TILE_IN)
        axes = figure.add_axes(_shares(box, width_in, height_in))
        edges = BINS[column]
        axes.stairs(figures[column].counts, edges, fill=True, color="#0072b2")
        axes.set_title(f"{column} ({UNITS[column]})" if column in UNITS else column, fontsize=8, pad=2)
        axes.tick_params(labelsize=6, pad=1)
        axes.set_yticks([])
        if column in LOGARITHMIC:
            axes.set_xscale("log")
        strip = np.full((_TILE, 3 * EXAMPLES * _TILE, 3), 255, np.uint8)
        box = (_HISTOGRAM_IN + 2 * _GAP_IN, bottom, 3 * EXAMPLES * _TILE_IN, _TILE_IN)
        tiles = figure.add_axes(_shares(box, width_in, height_in))
        tiles.set_axis_off()
        for place, (value, name, n) in enumerate(shown[column]):
            pixels = cv2.imdecode(np.frombuffer(crops.get((name, n), b""), np.uint8), cv2.IMREAD_COLOR_RGB)
            if pixels is not None:
                small = cv2.resize(pixels, (_TILE - 2, _TILE - 2), interpolation=cv2.INTER_AREA)
                strip[1:-1, place * _TILE + 1 : (place + 1) * _TILE - 1] = small
            tiles.text((place + 0.5) * _TILE, -4, f"{value:.3g}", fontsize=7, ha="center", va="bottom")
        tiles.imshow(strip)
    sink = io.BytesIO()
    figure.savefig(sink, format="jpeg", pil_kwargs={"quality": 88})
    return sink.getvalue()


def _shares(box: tuple[float, float, float, float], width: float, height: float) -> tuple[float, float, float, float]:
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def _examples(spread: Spread) -> list[Example]:
    return [*sorted(spread.lowest), *spread.middle(), *sorted(spread.highest)]


def _crops(
    shown: Mapping[str, Sequence[Example]], read_crops: Callable[[str, Sequence[int]], Mapping[int, bytes]]
) -> dict[tuple[str, int], bytes]:
    rows: dict[str, set[int]] = {}
    for _, name, n in (each for examples in shown.values() for each in examples):
        rows.setdefault(name, set()).add(n)
    return {(name, n): crop for name, ns in rows.items() for n, crop in read_crops(name, sorted(ns)).items()}
