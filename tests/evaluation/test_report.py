"""The report as a reader gets it: complete in one file, safe whatever photos are called, and looked at in a browser."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from lib.evaluation.curves import roc_curve
from lib.evaluation.metrics import verification_report
from lib.evaluation.pairs import made_pairs
from lib.evaluation.plots import det_plot, histogram_plot, history_plot, roc_plot
from lib.evaluation.report import PairSection, Plot, Report, ShownPair, ShownPhoto, Table, html
from tests.browser import screenshot

MAGENTA, BLUE = (255, 0, 255), (0x1F, 0x77, 0xB4)
HOSTILE = "<script>alert(1)</script>'\"&\udcff"


@pytest.fixture(scope="module")
def report() -> Report:
    """Return a report of two models on drawn vectors, with a pair of plain magenta pictures."""
    rng = np.random.default_rng(0)
    people_N = np.repeat(np.arange(60), 6)
    pairs = made_pairs([f"{n}" for n in range(360)], [str(n) for n in people_N], num_pairs=2000, seed=0)
    models, curves, plots = [], {}, []
    for name, noise in (("first", 0.8), (HOSTILE, 1.5)):
        vectors_ND = rng.standard_normal((60, 16))[people_N] + noise * rng.standard_normal((360, 16))
        distances_P = np.linalg.norm(vectors_ND[pairs.a_P] - vectors_ND[pairs.b_P], axis=1)
        figures = verification_report(vectors_ND, people_N, pairs, num_resamples=20)
        models.append({"name": name, "model_threshold": None, **figures})
        label = name.encode("utf-8", "replace").decode()
        curves[label] = roc_curve(distances_P, pairs.same_P)
        plots.append(Plot(name=name, content=histogram_plot(label, distances_P, pairs.same_P, 1.0)))
    plots += [Plot(name="ROC", content=roc_plot(curves)), Plot(name="DET", content=det_plot(curves))]
    plots.append(Plot(name="loss", content=history_plot("loss", "Loss", [1, 2, 3], {"train_loss": [1.0, None, 0.5]})))
    crop = cv2.imencode(".jpg", np.full((240, 240, 3), MAGENTA, np.uint8))[1].tobytes()
    shown = ShownPhoto(name=HOSTILE, identity="somebody", crop=crop)
    pair = ShownPair(a=shown, b=ShownPhoto(name="no face.jpg", identity="other", crop=None), distance=0.25)
    return Report(
        title="first and second",
        models=models,
        about=Table(title="What was measured", text="", header=["", "a", "b"], rows=[["Model", HOSTILE, "/m/b"]]),
        notes=[f"note {HOSTILE}"],
        difference="+1.00 ± 0.10",
        plots=plots,
        tables=[Table(title="By attribute", text="x", header=["attribute"], rows=[[HOSTILE]])],
        pair_sections=[
            PairSection(title="Worst", text="the nearest first", pairs=[pair] * 3),
            PairSection(title="None", text="", pairs=[]),
        ],
    )


def test_the_page_holds_its_pictures_and_asks_for_nothing(report: Report) -> None:
    page = html(report).decode()
    sources = re.findall(r'src="([^"]{1,30})', page)
    assert len(sources) == 5 + 3
    assert all(source.startswith("data:image/") for source in sources)
    links = re.findall(r'href="([^"]*)', page)
    assert {link.removeprefix("#") for link in links} == set(re.findall(r'id="([^"]*)', page))
    assert len(links) == len(set(links)) > 3
    assert "url(" not in page
    assert "default-src 'none'" in page
    assert len(page) < 2_000_000


def test_no_name_becomes_markup(report: Report) -> None:
    page = html(report).decode()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_figures_stand_in_the_page(report: Report) -> None:
    page = html(report).decode()
    for model in report.models:
        assert f"{100 * model['accuracy']:.2f} %" in page
        assert f"{100 * model['tar_at_far']['0.1']:.2f} %" in page
    assert "TAR at FAR 0.0001</td><td>–</td>" in page  # 1,000 different pairs do not support it
    assert "1.00 ± 0.10</b> percentage" in page
    assert "<td>/m/b</td>" in page


def test_a_browser_shows_plots_and_pictures(report: Report, tmp_path: Path) -> None:
    pixels = screenshot(html(report), tmp_path, height=3600)
    assert pixels.shape == (3600, 1150, 3)
    num_magenta = int((np.abs(pixels - MAGENTA).max(axis=2) < 25).sum())
    assert num_magenta == pytest.approx(3 * 120 * 120, rel=0.02)  # three pictures of one size
    assert (np.abs(pixels - BLUE).max(axis=2) < 25).sum() > 300  # the first model's curves
    assert (pixels.min(axis=2) < 100).sum() > 5000  # text
