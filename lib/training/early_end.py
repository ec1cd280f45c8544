"""Why a run ended before its last epoch: a file in the run's folder."""

from dataclasses import dataclass
from typing import Literal, get_args

from lib import storage
from lib.errors import UserError

OUTCOME_NAME = "outcome.json"

Ending = Literal["stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How and why a run ended early."""

    ending: Ending
    reason: str


def read_outcome(run_url: str) -> Outcome | None:
    """Return why a run ended early; None if it did not, or was resumed since."""
    url = storage.join(run_url, OUTCOME_NAME)
    if not storage.exists(url):
        return None
    content = storage.read_json(url, {"ending": str, "reason": str})
    if content["ending"] not in get_args(Ending):
        raise UserError(f"{storage.redacted(url)} names no end of a run: {content['ending']!r}: remove it")
    return Outcome(ending=content["ending"], reason=content["reason"])


def write_outcome(run_url: str, ending: Ending, reason: str) -> None:
    """Write down why a run ended early."""
    storage.write_json(storage.join(run_url, OUTCOME_NAME), {"ending": ending, "reason": reason})
