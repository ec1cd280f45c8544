"""The winning settings of a sweep, as defaults of a longer training."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lib import storage
from lib.config import absolute_url
from lib.errors import UserError
from lib.training.checkpoints import CONFIG_NAME
from lib.training.settings import FREE_SETTINGS, GROUP_OF, TrainConfig

SWEEP_NAME = "sweep.json"
"""File in a sweep's folder that lists its trials."""
RESULTS_NAME = "results.json"
"""File beside it that names the winner; written when all trials are done."""

BUDGET_SETTINGS = ("epochs", "triplets_per_epoch", "photos_limit", "stop_after")
"""Settings that a sweep keeps small to save time; a training with the winner's settings does not take them over."""


def train_defaults(flags: Sequence[str]) -> TrainConfig:
    """Return the defaults of jobs/train.py: after `--from-sweep`, the winner's settings."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--from-sweep", "--from_sweep", nargs="?", default="")
    url = parser.parse_known_args(list(flags))[0].from_sweep
    config = TrainConfig.of(**winner_settings(url)) if url else TrainConfig()
    return replace(config, given=given_names(flags))


def given_names(flags: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the settings that flags such as `--loss`, `--no-normalize` or `--train.model.head` set."""
    words = [flag.partition("=")[0].rpartition(".")[2].lstrip("-") for flag in flags if flag.startswith("--")]
    return tuple(sorted({word.replace("-", "_").removeprefix("no_") for word in words}))


def winner_settings(url: str) -> dict[str, Any]:
    """Return the winner's settings, without its budget, and the initial weights of all trials.

    Raises:
        UserError: there is no sweep, or it is not finished.
    """
    url = absolute_url(url, "--from-sweep")
    results_url = storage.join(url, RESULTS_NAME)
    if not storage.exists(results_url):
        if storage.exists(storage.join(url, SWEEP_NAME)):
            raise UserError(f"--from-sweep {url} is not finished and has no winner yet: run the same sweep again")
        raise UserError(f"--from-sweep {url} holds no sweep: name a folder that jobs/sweep.py made")
    results = storage.read_json(results_url, {"winner": str, "init": str})
    content = storage.read_json(storage.join(url, "runs", results["winner"], CONFIG_NAME))
    names = TrainConfig().flat().keys() - {*FREE_SETTINGS, *BUDGET_SETTINGS}
    settings = {name: _as_setting(content[name]) for name in names & content.keys()}
    hints = get_type_hints(TrainConfig)
    for group in dict.fromkeys(GROUP_OF.values()):
        hints |= get_type_hints(hints[group])
    wrong = [f"{name}={value!r}" for name, value in sorted(settings.items()) if not _fits(value, hints[name])]
    if wrong:
        raise UserError(f"--from-sweep {url}: the winner has invalid settings: {', '.join(wrong)}: name another sweep")
    return {**settings, "init": results["init"]}


def _as_setting(value: Any) -> Any:
    """Return a value of a JSON file as the flags would give it: a list is a tuple of words."""
    return tuple(str(each) for each in value) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value from a JSON file has the type of a setting."""
    if get_origin(hint) is tuple:
        return type(value) is tuple
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint):
        return any(_fits(value, each) for each in get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)
