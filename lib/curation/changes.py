"""The output of the curate job: proposals as a table, and the version of the faces table that they belong to."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from lib import storage
from lib.curation.proposals import NEW, NOBODY, SPLIT, Proposal

CURATION_NAME, ABOUT_NAME, PAGE_NAME = "curation.parquet", "curation.json", "curation.html"
IDENTITIES_DIGEST = "identities_digest"
"""Entry of `ABOUT_NAME`: `digest_of_list` of the list of identities beside the photos."""

SCHEMA = pa.schema(
    [
        pa.field("proposal", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("certainty", pa.float32(), nullable=False),
        pa.field("photos", pa.list_(pa.string()), nullable=False),
        pa.field("identity", pa.string()),
        pa.field("to_identity", pa.string()),
        pa.field("evidence", pa.list_(pa.string()), nullable=False),
        pa.field("distance", pa.float32()),
        pa.field("splits", pa.list_(pa.string()), nullable=False),
        pa.field("in_test_set", pa.bool_(), nullable=False),
    ]
)
"""One row per proposal: `photos` would change from `identity` to `to_identity`, where null is no identity. `evidence`
are photos to compare them with, of the test set where `in_test_set`. `splits` are those of photos and evidence."""


def changes_table(
    found: Sequence[Proposal],
    leaked: Sequence[Proposal],
    photos: Sequence[str],
    splits: Sequence[str],
    names: Sequence[str],
    test_photos: Sequence[str],
) -> pa.Table:
    """Return the proposals as rows of `SCHEMA`.

    Args:
        found: proposals among the faces.
        leaked: proposals whose evidence are rows of the test set.
        photos: name of each face.
        splits: split of each face.
        names: the identities, by number.
        test_photos: name of each row of the test set.
    """
    free_names = _NewNames(names)
    rows: list[dict[str, Any]] = []
    for proposal, in_test_set in [*((each, False) for each in found), *((each, True) for each in leaked)]:
        faces, evidence = proposal.faces.tolist(), proposal.evidence.tolist()
        identity = None if proposal.identity == NOBODY else names[proposal.identity]
        rows.append(
            {
                "proposal": len(rows),
                "kind": proposal.kind,
                "certainty": proposal.certainty,
                "photos": [photos[n] for n in faces],
                "identity": identity,
                "to_identity": _to_name(proposal, identity, names, free_names),
                "evidence": [(test_photos if in_test_set else photos)[n] for n in evidence],
                "distance": proposal.distance,
                "splits": sorted({splits[n] for n in (faces if in_test_set else faces + evidence)}),
                "in_test_set": in_test_set,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


class _NewNames:
    """Makes names that no identity has yet."""

    def __init__(self, names: Sequence[str]) -> None:
        self._taken = set(names)

    def next(self, stem: str, first: int) -> str:
        """Return the stem with the first number from `first` that is free."""
        number = first
        while f"{stem}{number}" in self._taken:
            number += 1
        self._taken.add(f"{stem}{number}")
        return f"{stem}{number}"


def _to_name(proposal: Proposal, identity: str | None, names: Sequence[str], free_names: _NewNames) -> str | None:
    if proposal.kind == SPLIT:
        return free_names.next(f"{identity}~", 2)
    if proposal.kind == NEW:
        return free_names.next("person-", int(proposal.faces[0]) + 1)
    return None if proposal.to in (None, NOBODY) else names[proposal.to]


def digest_of_table(success: Mapping[str, Any]) -> str:
    """Return a short hash of a faces table's `_SUCCESS`, which differs between versions."""
    return hashlib.sha256(json.dumps(success, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_list(content: bytes | None) -> str | None:
    """Return a short hash of a list of identities; None if there is none."""
    return None if content is None else hashlib.sha256(content).hexdigest()[:16]


def write_about(output: str, faces_url: str, faces_digest: str, **settings: Any) -> None:
    """Write the version of the faces that the proposals belong to."""
    about = {"faces": storage.redacted(faces_url), "faces_digest": faces_digest, **settings}
    storage.write_json(storage.join(output, ABOUT_NAME), about)
