"""Plans: the settings that an output was begun with, kept in its folder, and how they differ from the present ones."""

import logging
from collections.abc import Mapping
from typing import Any

from lib import storage
from lib.errors import UserError

logger = logging.getLogger(__name__)

Plan = Mapping[str, Any]

FORMAT, TABLE_FORMAT = "format", 1
"""Entry of a table's plan and `_SUCCESS`, and the one format that this code reads. Older tables lack the entry."""


def check_format(content: Plan, url: str) -> None:
    """Raise UserError if a table, by its plan or `_SUCCESS` at `url`, has another format than this code reads."""
    if (made := content.get(FORMAT, TABLE_FORMAT)) != TABLE_FORMAT:
        raise UserError(
            f"{storage.redacted(url)} is of a table of format {made!r}, made by another version of these jobs; this "
            f"one reads format {TABLE_FORMAT}: use that version, or choose another folder"
        )


def earlier_plan(
    url: str, plan_name: str, plan: Plan, *, defaults: Plan | None = None, begun: str | None = None
) -> tuple[Plan | None, str]:
    """Return the plan of the output in a folder, None if none was begun, and the reason why ours cannot continue there.

    `defaults` are for `differences`. Files in the folder `begun` may exist before the plan does.

    Raises:
        UserError: it has another format.
    """
    plan_url = storage.join(url, plan_name)
    if storage.exists(plan_url):
        earlier = storage.read_json(plan_url, {"fingerprint": dict})
        check_format(earlier, plan_url)
        different = "; ".join(differences(plan, earlier, defaults))
        return earlier, f"was made with other settings ({different})" if different else ""
    first = next(iter(storage.list_files(url)), None)
    if first is None or (begun is not None and first.path.startswith(f"{begun}/")):
        return None, ""
    return None, f"holds files but no {plan_name}, such as {first.path}"


def differences(ours: Plan, theirs: Plan, defaults: Plan | None = None) -> list[str]:
    """Return the settings in which two plans or their fingerprints differ, with both values.

    A setting that `theirs` lacks is newer. It is taken to have had its default, or without `defaults` its present
    value.
    """
    newer = [name for name in ours if name not in theirs]
    if newer:
        theirs = {**theirs, **{name: (ours if defaults is None else defaults).get(name) for name in newer}}
        told = ", ".join(f"{name} {theirs[name]}" for name in newer)
        logger.info("the output is older than some settings, which are taken to have been: %s", told)
    flat_ours = {**ours, **ours["fingerprint"], "fingerprint": None, "id": None}
    flat_theirs = {**theirs, **theirs.get("fingerprint", {}), "fingerprint": None, "id": None, "run_id": None}
    names = sorted(name for name in flat_ours if flat_ours[name] != flat_theirs.get(name))
    return [f"{name}: {flat_theirs.get(name)} there, {flat_ours[name]} now" for name in names]
