"""Writes accepted proposals into a new list of identities. The old list is kept, so a change can be undone."""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib import storage
from lib.curation.changes import (
    ABOUT_NAME,
    CURATION_NAME,
    IDENTITIES_DIGEST,
    SCHEMA,
    digest_of_list,
    digest_of_table,
)
from lib.curation.proposals import DUPLICATE, KINDS
from lib.errors import UserError
from lib.faces import table

logger = logging.getLogger(__name__)

EARLIER_NAME = "identities-before.csv"
HEADER = ("photo", "identity")


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What was changed."""

    identities_url: str
    earlier_url: str
    num_changes: int
    num_photos: int
    dry_run: bool


def apply_decisions(
    output: str, faces_url: str, identities_url: str, decisions_url: str | None, *, over: float | None, dry_run: bool
) -> Applied:
    """Write the identities after the accepted proposals. The list before is kept beside the proposals.

    Args:
        output: folder of the proposals.
        identities_url: the list of identities to write.
        decisions_url: CSV file with the numbers of the accepted proposals in its column `proposal`.
        over: instead of decisions, accept all proposals of at least this certainty.

    Raises:
        UserError: there are no proposals, the faces table or the identities changed since, or the file is not a list
            of proposals.
    """
    about = _about(output)
    success = table.read_success(faces_url)
    if about["faces_digest"] != digest_of_table(success):
        raise UserError(
            f"the faces in {storage.redacted(faces_url)} changed since the proposals were made: run jobs/curate.py "
            "again without --apply"
        )
    if success["fingerprint"].get("faces_policy") == "all":
        raise UserError(
            "the table holds every face of a photo, and a list of identities names photos: make the table with "
            "--faces-policy prominent to apply changes"
        )
    changes = storage.read_parquet(storage.join(output, CURATION_NAME), list(SCHEMA)).to_pylist()
    accepted = _accepted(changes, decisions_url, over)
    before = _identities(faces_url, success)
    after = changed(before, accepted)
    num_photos = sum(after[photo] != identity for photo, identity in before.items())
    earlier_url, content = storage.join(output, EARLIER_NAME), identities_csv(after)
    replaced = list_at(identities_url)
    _check_same_list(about, identities_url, replaced, content)
    if not dry_run and replaced != content:  # equal after a kill between the two: the first file is right already
        storage.write_bytes(earlier_url, identities_csv(before) if replaced is None else replaced)
        storage.write_bytes(identities_url, content)
        logger.info(
            "%s has the new identities; to take them back, copy %s over it",
            *(storage.redacted(identities_url), storage.redacted(earlier_url)),
        )
    return Applied(
        identities_url=identities_url,
        earlier_url=earlier_url,
        num_changes=len(accepted),
        num_photos=num_photos,
        dry_run=dry_run,
    )


def _about(output: str) -> dict[str, Any]:
    about_url = storage.join(output, ABOUT_NAME)
    if not storage.exists(about_url):
        raise UserError(f"no proposals in {storage.redacted(output)}: run jobs/curate.py without --apply first")
    return storage.read_json(about_url, {"faces_digest": str})


def _check_same_list(about: Mapping[str, Any], identities_url: str, found: bytes | None, content: bytes) -> None:
    """Raise UserError if the list of identities is neither the one of the proposals nor the one to write."""
    if IDENTITIES_DIGEST in about and found != content and about[IDENTITIES_DIGEST] != digest_of_list(found):
        raise UserError(
            f"{storage.redacted(identities_url)} changed since the proposals were made, and would be lost: run "
            "jobs/preprocess.py and jobs/curate.py again"
        )


def changed(before: Mapping[str, str | None], accepted: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Return the identity of each photo after the accepted proposals.

    A photo that a proposal moves to an identity which itself becomes another one goes there too. A duplicate loses its
    identity, whatever else was proposed for it.
    """
    renamed = {each["identity"]: each["to_identity"] for each in accepted if each["kind"] == "merge"}
    after = dict(before)
    for each in sorted(accepted, key=lambda each: KINDS.index(each["kind"])):
        to, seen = each["to_identity"], {each["identity"]}
        while to in renamed and to not in seen:
            seen.add(to)
            to = renamed[to]
        for photo in each["photos"]:
            if each["kind"] == DUPLICATE or after.get(photo) == each["identity"]:
                after[photo] = to
    return after


def list_at(url: str) -> bytes | None:
    """Return a list of identities as it is; None if there is none."""
    return storage.read_bytes(url) if storage.exists(url) else None


def identities_csv(identities: Mapping[str, str | None]) -> bytes:
    """Return the list as CSV with a header, as preprocess reads it. Photos without an identity have an empty field."""
    sink = io.StringIO(newline="")
    writer = csv.writer(sink)
    writer.writerow(HEADER)
    writer.writerows((photo, identities[photo] or "") for photo in sorted(identities))
    return sink.getvalue().encode()


def _accepted(
    changes: Sequence[Mapping[str, Any]], decisions_url: str | None, over: float | None
) -> list[Mapping[str, Any]]:
    if decisions_url is None:
        return [each for each in changes if each["certainty"] >= (over or 0.0)]
    shown = storage.redacted(decisions_url)
    try:
        text = storage.read_bytes(decisions_url).decode("utf-8-sig")
        numbers = {int(row["proposal"]) for row in csv.DictReader(io.StringIO(text))}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--apply {shown} is no list of proposals: name the CSV file that the page saves, with a column `proposal`"
        ) from error
    unknown = sorted(numbers - {each["proposal"] for each in changes})
    if unknown:
        raise UserError(f"--apply {shown} names proposal {unknown[0]}, and there is none: use the page of this run")
    return [each for each in changes if each["proposal"] in numbers]


def _identities(faces_url: str, success: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the identity of each photo of the table, without photos that do not exist."""
    found: dict[str, str | None] = {}
    for name in table.part_names(success, table.SPLITS):
        rows = storage.read_parquet(storage.join(faces_url, name), table.columns("photo", "identity", "status"))
        for row in rows.to_pylist():
            if row["status"] != table.MISSING:
                found[row["photo"]] = row["identity"]
    if not found:
        raise UserError(f"{storage.redacted(faces_url)} holds no photos")
    return found
