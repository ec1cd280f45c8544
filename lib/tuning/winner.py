"""The settings that won a sweep, as defaults of a longer training."""

import argparse
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lib import storage
from lib.config import absolute_url
from lib.errors import UserError
from lib.training.checkpoints import CONFIG_NAME
from lib.training.settings import FREE_SETTINGS, GROUP_OF, TrainConfig

SWEEP_NAME = "sweep.json"
"""In a sweep's folder: what its trials are."""
RESULTS_NAME = "results.json"
"""Beside it, once all are done: which of them won."""

BUDGET_SETTINGS = ("epochs", "triplets_per_epoch", "photos_limit", "stop_after")
"""What a sweep saves at, and who trains with the winner's settings does not."""


def train_defaults(flags: Sequence[str]) -> TrainConfig:
    """Return what holds in jobs/train.py where no flag says otherwise: the winner's settings after `--from-sweep`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--from-sweep", "--from_sweep", nargs="?", default="")
    url = parser.parse_known_args(list(flags))[0].from_sweep
    return TrainConfig.of(**winner_settings(url)) if url else TrainConfig()


def winner_settings(url: str) -> dict[str, Any]:
    """Return the settings of the trial that won a sweep, without its budget, and the weights that all began with.

    Raises:
        UserError: no sweep is there, or it is not finished.
    """
    url = absolute_url(url, "--from-sweep")
    results_url = storage.join(url, RESULTS_NAME)
    if not storage.exists(results_url):
        if storage.exists(storage.join(url, SWEEP_NAME)):
            raise UserError(f"--from-sweep {url} is not finished and has no winner yet: start the same sweep again")
        raise UserError(f"--from-sweep {url} holds no sweep: name the folder that jobs/sweep.py has made")
    results = storage.read_json(results_url, {"winner": str, "init": str})
    content = storage.read_json(storage.join(url, "runs", results["winner"], CONFIG_NAME))
    names = TrainConfig().flat().keys() - {*FREE_SETTINGS, *BUDGET_SETTINGS}
    settings = {name: content[name] for name in names & content.keys()}
    hints = get_type_hints(TrainConfig)
    for group in dict.fromkeys(GROUP_OF.values()):
        hints |= get_type_hints(hints[group])
    wrong = [f"{name}={value!r}" for name, value in sorted(settings.items()) if not _fits(value, hints[name])]
    if wrong:
        raise UserError(
            f"--from-sweep {url}: its winner has settings of no training: {', '.join(wrong)}: name another sweep"
        )
    return {**settings, "init": results["init"]}


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value from a JSON file is one of a setting's type."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint):
        return any(_fits(value, each) for each in get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)
