"""Models that were trained on forgotten photos: finds them, and marks them."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from lib import storage
from lib.errors import UserError
from lib.forgetting.tables import TRAINED_ON
from lib.training.checkpoints import CONFIG_NAME

logger = logging.getLogger(__name__)

MARK_NAME = "FORGOTTEN.json"

TRAINED = "trained on them"
UNKNOWN = "its version of the faces table is gone: it may have been trained on them"
BEGAN_FROM = "began from"


def models_with(
    run_urls: Iterable[str],
    versions: Mapping[str, Mapping[str, int]],
    kept_runs: Iterable[str],
    named: Iterable[str],
) -> dict[str, str]:
    """Return the runs whose models saw forgotten photos, or may have, with the reason in words.

    Args:
        run_urls: folders of runs.
        versions: forgotten rows by split, of each version of a faces table with any, by its run_id.
        kept_runs: run_ids of all existing versions, whose rows are known.
        named: URLs of files that named a forgotten photo, such as usage and suspects of a run trained on it.
    """
    known, own_files = set(kept_runs), list(named)
    found: dict[str, str] = {}
    begun_from: dict[str, str] = {}
    for url in run_urls:
        config = _config(url)
        run_id = config.get("faces_run_id")
        begun_from[url] = str(config.get("init", "")).rstrip("/").removesuffix("/model")
        usage_url = storage.join(url, "usage.parquet")
        own = usage_url in own_files or storage.join(url, "suspects.parquet") in own_files
        if own or any(versions.get(str(run_id), {}).get(split) for split in TRAINED_ON):
            found[url] = TRAINED
        elif run_id is not None and run_id not in known and run_id not in versions and not storage.exists(usage_url):
            found[url] = UNKNOWN
    # A model that started from such a model has what that one learnt.
    shown = {storage.redacted(url): url for url in begun_from}
    while more := [url for url, first in begun_from.items() if url not in found and shown.get(first) in found]:
        found |= {url: f"{BEGAN_FROM} {begun_from[url]}" for url in more}
    return found


def checkpoints_and_exports(run_url: str) -> list[str]:
    """Return the files of a run that contain weights."""
    suffixes = (".safetensors", ".onnx", ".pth", ".pt")
    return [info.path for info in storage.list_files(run_url, suffix=suffixes)]


def mark(run_url: str, why: str, receipt: str, counts: Mapping[str, int]) -> None:
    """Write into a run and its model's card that it was trained on forgotten photos; once for each receipt."""
    url = storage.join(run_url, MARK_NAME)
    marks = storage.read_json(url, {"marks": list})["marks"] if storage.exists(url) else []
    if all(each.get("receipt") != receipt for each in marks):
        storage.write_json(url, {"marks": [*marks, {"receipt": receipt, "why": why, **counts}]})
    spec_url = storage.join(run_url, "model", "model.json")
    if storage.exists(spec_url):  # a card that is written again takes it from there
        spec = storage.read_json(spec_url, {"training": dict})
        if receipt not in str(told := spec["training"].get("forgotten later", "")):
            spec["training"]["forgotten later"] = ", ".join(filter(None, [told, receipt]))
            storage.write_json(spec_url, spec)
    card_url = storage.join(run_url, "model", "README.md")
    if storage.exists(card_url):
        card = storage.read_bytes(card_url).decode()
        line = f"**Forgotten ({receipt})**: {counts['photos']:,} photos were forgotten later. This model: {why}. "
        line += "Train again on the present faces to leave them out."
        if receipt not in card:
            storage.write_bytes(card_url, f"{card.rstrip()}\n\n{line}\n".encode())


def is_run(config_url: str) -> bool:
    """Return whether a `config.json` belongs to a run."""
    return "faces_run_id" in _read(config_url)


def _config(run_url: str) -> dict[str, Any]:
    return _read(storage.join(run_url, CONFIG_NAME))


def _read(url: str) -> dict[str, Any]:
    try:
        return storage.read_json(url)
    except UserError as error:
        logger.warning("%s", error)
        return {}
