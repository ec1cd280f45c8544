"""The compare job: reads run folders, finished or not; writes one page and one history of all epochs."""

import dataclasses
import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from lib import storage
from lib.config import absolute_url, default_data_url
from lib.errors import UserError
from lib.layout import Layout
from lib.recognition.model import EmbeddingModel, ModelSpec
from lib.training import checkpoints
from lib.training.checkpoints import CONFIG_NAME, SPEC_NAME
from lib.training.early_end import read_outcome
from lib.training.history import Row, read_rows, write_history
from lib.training.record import figure_of
from lib.tuning.compared_runs import ComparedRun, State, setting_text, varied_settings, winner_of
from lib.tuning.comparison_report import STATE_TEXT, page
from lib.tuning.winner import SWEEP_NAME

logger = logging.getLogger(__name__)

REPORT_NAME = "report.html"

JUDGED_ON = ("faces_run_id", "seed", "val_photos", "val_pairs", "val_faces")
"""Settings that decide the validation people and their pairs."""

FIGURES = ("accuracy", "accuracy_std", "auc", "val_loss_random")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare runs, or the trials of sweeps. They may still be running."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Folders of runs or sweeps, or their names below --data. Default: every run in runs/ below --data."""
    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    output: str | None = None
    """Folder for the page and the histories. Default: comparison/ below --data."""
    dry_run: bool = False
    """List the runs, then stop."""


def compare(config: CompareConfig) -> dict[str, Any]:
    """Write the page that compares the runs, and the history of all their epochs."""
    started = time.monotonic()
    layout = Layout(config.data)
    output = layout.output("comparison", config.output)
    urls = (
        [url for given in config.runs for url in _run_urls(layout, given)] if config.runs else _runs_in(layout.runs())
    )
    if not urls:
        raise UserError(f"no run lies in {layout.runs()}: name runs, or train some with jobs/train.py")
    urls = list(dict.fromkeys(urls))
    if config.dry_run:
        logger.info("%d runs would be compared into %s", len(urls), output)
        return {"job": "compare", "dry_run": True, "runs": urls, "output": output}
    storage.check_writable(output)
    logger.info("comparing %d run%s", len(urls), "" if len(urls) == 1 else "s")
    runs = _distinct([read_run(url) for url in urls])
    result = write_comparison(output, " and ".join(config.runs) or layout.url, runs)
    return {"job": "compare", **result, "seconds": round(time.monotonic() - started, 1)}


def _run_urls(layout: Layout, given: str) -> list[str]:
    """Return the runs that a word of the command line names.

    Raises:
        UserError: it names no run and no sweep.
    """
    places = [absolute_url(given, "RUN"), *(storage.join(folder, given) for folder in (layout.runs(), layout.sweeps()))]
    for url in places:
        if storage.exists(storage.join(url, SWEEP_NAME)):
            return trial_urls(url)
        if storage.exists(storage.join(url, CONFIG_NAME)):
            return [url]
    raise UserError(
        f"{given!r} is neither a run nor a sweep, nor the name of one below {layout.url}: name folders that hold "
        f"{CONFIG_NAME} or {SWEEP_NAME}, such as {storage.join(layout.runs(), 'default')}"
    )


def trial_urls(sweep_url: str) -> list[str]:
    """Return the runs of a sweep in order, including those that have not begun."""
    names = storage.read_json(storage.join(sweep_url, SWEEP_NAME), {"runs": list})["runs"]
    return [storage.join(sweep_url, "runs", str(name)) for name in names]


def _runs_in(runs: str) -> list[str]:
    found = (info.path for info in storage.list_files(runs, suffix=f"/{CONFIG_NAME}"))
    return [storage.join(runs, path.removesuffix(f"/{CONFIG_NAME}")) for path in found if path.count("/") == 1]


def read_run(url: str) -> ComparedRun:
    """Return the run in a folder; one that has not begun has no settings and no rows."""
    config_url = storage.join(url, CONFIG_NAME)
    settings = storage.read_json(config_url, {"fingerprint": dict}) if storage.exists(config_url) else {}
    if settings:
        settings["fingerprint"] = settings["fingerprint"].get("id")
    rows = read_rows(url)
    outcome = read_outcome(url)
    progress = checkpoints.newest_progress(url)
    state: State = "finished" if progress is not None and progress.finished else "unfinished"
    if outcome is not None and state != "finished":
        state = outcome.ending
    values = [figure_of(row, str(settings.get("best_by", "accuracy"))) for row in rows]
    judged = [(value, row) for value, row in zip(values, rows, strict=True) if value is not None]
    value, best = max(judged, key=lambda each: each[0], default=(None, None))
    return ComparedRun(
        name=url.rstrip("/").rpartition("/")[2],
        url=url,
        state=state,
        reason=outcome.reason if outcome is not None and state == outcome.ending else "",
        settings=settings,
        rows=rows,
        best=best,
        value=value,
        num_parameters=_num_parameters(url),
    )


def _num_parameters(url: str) -> int | None:
    spec_url = storage.join(url, checkpoints.FOLDER, SPEC_NAME)
    if not storage.exists(spec_url):
        return None
    spec = ModelSpec.from_json(storage.read_json(spec_url), spec_url)
    try:
        return _count(spec.backbone, spec.image_size, spec.layer_widths)
    except UserError as error:
        logger.warning("cannot count the parameters of %s: %s", url, error)
        return None


@functools.cache
def _count(backbone: str, image_size: int, layer_widths: tuple[int, ...]) -> int:
    spec = ModelSpec(backbone=backbone, image_size=image_size, head=layer_widths, embedding_dim=layer_widths[-1])
    return sum(parameter.numel() for parameter in EmbeddingModel(spec).parameters())


def _distinct(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Add parent folders to the names of runs that share a name, such as trials of two sweeps."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else dataclasses.replace(run, name="/".join(run.url.split("/")[-3:]))
        for run in runs
    ]


def write_comparison(output: str, title: str, runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Write the page and the histories into a folder; return counts, the winner and its metrics."""
    notes = [f"{run.name} failed: {run.reason}" for run in runs if run.state == "failed"]
    judged = {tuple(setting_text(run.settings.get(name)) for name in JUDGED_ON) for run in runs if run.rows}
    if len(judged) > 1:
        notes.append(
            "these runs were not judged on the same pairs of photos (other faces, seed or number of pairs): "
            "small differences of accuracy mean nothing"
        )
    for note in notes:
        logger.warning("%s", note)
    write_history(output, history_of(runs))
    storage.write_bytes(storage.join(output, REPORT_NAME), page(title, runs, notes))
    winner = winner_of(runs)
    figures = {name: (winner.best or {}).get(name) for name in FIGURES} if winner else {}
    return {
        "report": storage.join(output, REPORT_NAME),
        "runs": len(runs),
        **{state: sum(run.state == state for run in runs) for state in STATE_TEXT},
        "winner": winner and winner.name,
        "winner_url": winner and winner.url,
        "winner_settings": {name: winner.settings.get(name) for name in varied_settings(runs)} if winner else {},
        **figures,
    }


def history_of(runs: Sequence[ComparedRun]) -> list[Row]:
    """Return all epochs of all runs; the notes begin with the settings in which the runs differ.

    The last row of a run that ended early says so. A run without epochs gets one row.
    """
    varied = varied_settings(runs)
    rows: list[Row] = []
    for run in runs:
        about = ", ".join(f"{name}={setting_text(run.settings.get(name))}" for name in varied)
        ending = f"{STATE_TEXT[run.state]}: {run.reason}" if run.reason else ""
        for place, row in enumerate(run.rows or [{"epoch": None}], start=1):
            is_last = place == max(len(run.rows), 1)
            told = [about, row.get("notes"), ending if is_last else ""]
            notes = "; ".join(str(note) for note in told if note)
            rows.append({"run": run.name, **row, "Notes": notes or None})
    return rows
