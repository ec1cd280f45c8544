"""What a finished faces table says of itself: counts that reconcile, dataset card, contact sheet, `_SUCCESS`."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.faces import quality, quality_figures, table
from lib.faces.images import to_jpeg
from lib.faces.part_plan import BUCKETS, SIZE
from lib.faces.photo_database import BATCH_ROWS, PhotoDatabase
from lib.faces.plan_files import PartPlan
from lib.parts import KEEP_VERSIONS, check_ours, finish_version, split_in

logger = logging.getLogger(__name__)

CARD_NAME, README_NAME, SHEET_NAME, QUALITY_NAME = "card.json", "README.md", "contact_sheet.jpg", "quality.jpg"
NAMES = (CARD_NAME, README_NAME, SHEET_NAME, QUALITY_NAME)

_SHEET_COLUMNS, _SHEET_ROWS, _TILE = 12, 6, 120
_MAX_REFUSED_NAMED = 200


class _People:
    """Counts the people of each split on disk, for there may be millions."""

    def __init__(self) -> None:
        self._database = PhotoDatabase()
        self._database.run("create table people (split varchar, identity varchar)")
        self._waiting: list[pa.Table] = []

    def add(self, split: str, identities: list[str]) -> None:
        """Count the identities of aligned faces."""
        splits = pa.repeat(pa.scalar(split), len(identities))
        self._waiting.append(pa.table({"split": splits, "identity": pa.array(identities, pa.string())}))
        if sum(map(len, self._waiting)) >= BATCH_ROWS:
            self._write()

    def by_split(self) -> dict[str, int]:
        """Return the number of identities of each split."""
        self._write()
        counts = dict(self._database.rows("select split, count(distinct identity) from people group by split"))
        return {split: counts.get(split, 0) for split in table.SPLITS}

    def _write(self) -> None:
        if self._waiting:
            self._database.append("people", pa.concat_tables(self._waiting))
            self._waiting = []


@dataclass
class _Totals:
    statuses: dict[str, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in table.SPLITS})
    people: _People = field(default_factory=_People)
    num_known: Counter[str] = field(default_factory=Counter)
    refused: list[dict[str, str]] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    made_on: set[str] = field(default_factory=set)
    quality: quality_figures.Figures = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(counts.total() for counts in self.statuses.values())


def finish(
    faces_url: str,
    plan: PartPlan,
    *,
    begun: Mapping[str, Any],
    photos_per_s: float | None,
    keep_versions: int = KEEP_VERSIONS,
) -> dict[str, Any]:
    """Count every row, write card and contact sheet, then `_SUCCESS`; return the counts.

    The parts are read without their crops, a few at a time. `begun` is the plan of the version.

    Raises:
        JobError: another job began another version of this table meanwhile.
    """
    check_ours(faces_url, begun)
    fingerprint, file_names = begun["fingerprint"], plan.file_names()
    totals = _count(faces_url, file_names)
    assert fingerprint["faces_policy"] == "all" or totals.num_rows == plan.num_photos, "each photo has exactly one row"
    more = {
        "passed_over": dict(plan.num_passed_over),
        "forgotten": plan.num_forgotten,
        "photos_per_s": photos_per_s and round(photos_per_s, 1),
    }
    card = _write(faces_url, file_names, begun, totals, plan.num_photos, more)
    counts: dict[str, Any] = card["counts"]
    about = {"fingerprint": fingerprint, "counts": counts, SIZE: begun[SIZE], BUCKETS: begun[BUCKETS]}
    finish_version(faces_url, begun, file_names, about, keep_versions=keep_versions)
    for line in _split_lines(card):
        logger.info(line)
    return counts


def remake(
    faces_url: str, file_names: list[str], begun: Mapping[str, Any], earlier: Mapping[str, Any], *, num_forgotten: int
) -> dict[str, Any]:
    """Write card and contact sheet of a table that lost `num_forgotten` photos; return the counts.

    `earlier` is the counts in `_SUCCESS` of the version before. What only the making of the table knew stays as it is.
    """
    card_url = storage.join(faces_url, CARD_NAME)
    before = storage.read_json(card_url) if storage.exists(card_url) else {}
    more = {
        "passed_over": before.get("passed_over", {}),
        # Once, however often this is done again after a kill.
        "forgotten": before.get("forgotten", 0) + (num_forgotten if before.get("run_id") != begun["run_id"] else 0),
        "photos_per_s": before.get("photos_per_s"),
    }
    num_photos = int(earlier.get("photos", 0)) - num_forgotten
    card = _write(faces_url, file_names, begun, _count(faces_url, file_names), num_photos, more)
    counts: dict[str, Any] = card["counts"]
    return counts


def _count(faces_url: str, file_names: list[str]) -> _Totals:
    logger.info("counting %d parts", len(file_names))
    totals = _Totals()
    with ThreadPoolExecutor(8) as pool:
        for name, part in zip(file_names, pool.map(lambda name: _read_part(faces_url, name), file_names), strict=True):
            _add(totals, split_in(name), *part)
    return totals


def _write(
    faces_url: str,
    file_names: list[str],
    begun: Mapping[str, Any],
    totals: _Totals,
    num_photos: int,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Write card and contact sheet, and return the card; `more` is what the rows do not tell."""
    people = totals.people.by_split()
    card = {
        "run_id": begun["run_id"],
        "version": begun.get("version", 0),
        "fingerprint": begun["fingerprint"],
        "counts": _counts(totals, num_photos, sum(people.values())),
        "splits": {split: _split_figures(totals, split, people[split]) for split in table.SPLITS},
        "refused": totals.refused,
        "bytes_before": totals.bytes_before,
        "bytes_after": totals.bytes_after,
        "made_on": sorted(totals.made_on),
        "quality": quality_figures.quantiles(totals.quality),
        **more,
    }
    storage.write_json(storage.join(faces_url, CARD_NAME), card)
    storage.write_bytes(storage.join(faces_url, README_NAME), _readme(card).encode())
    storage.write_bytes(storage.join(faces_url, SHEET_NAME), _contact_sheet(faces_url, file_names))
    quality_url = storage.join(faces_url, QUALITY_NAME)
    if totals.quality:
        storage.write_bytes(
            quality_url, quality_figures.picture(totals.quality, lambda name, rows: _crops(faces_url, name, rows))
        )
    else:
        storage.remove(quality_url)
    return card


def _crops(faces_url: str, name: str, rows: Sequence[int]) -> dict[int, bytes]:
    crops = storage.read_parquet(storage.join(faces_url, name), table.columns("crop"))["crop"]
    return {n: crops[n].as_py() for n in rows}


def _read_part(
    faces_url: str, name: str
) -> tuple[list[str], list[str | None], list[str], list[str | None], int, int, str, quality_figures.Figures]:
    with storage.open_parquet(storage.join(faces_url, name), table.columns("photo", "identity", "status")) as file:
        columns = ["photo", "identity", "status", "reason", *quality.NAMES]
        rows = file.read(columns=[name for name in columns if name in file.schema_arrow.names])
        metadata = file.schema_arrow.metadata or {}
        footer = file.metadata
        num_bytes = sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
    names, identities, statuses = (rows[column].to_pylist() for column in ("photo", "identity", "status"))
    reasons = rows["reason"].to_pylist() if "reason" in rows.column_names else [None] * len(names)
    made_on = metadata.get(table.MADE_ON_KEY, b"").decode()
    spread = quality_figures.of_part(name, rows)
    return names, identities, statuses, reasons, int(metadata.get(table.BYTES_KEY, b"0")), num_bytes, made_on, spread


def _add(
    totals: _Totals,
    split: str,
    names: list[str],
    identities: list[str | None],
    statuses: list[str],
    reasons: list[str | None],
    bytes_before: int,
    bytes_after: int,
    made_on: str,
    spread: quality_figures.Figures,
) -> None:
    quality_figures.merged(totals.quality, spread)
    totals.made_on |= set(made_on.split(", ")) - {""}
    totals.statuses[split].update(statuses)
    totals.bytes_before += bytes_before
    totals.bytes_after += bytes_after
    known = [
        identity
        for identity, status in zip(identities, statuses, strict=True)
        if status == table.ALIGNED and identity is not None
    ]
    totals.people.add(split, known)
    totals.num_known[split] += len(known)
    for name, status, reason in zip(names, statuses, reasons, strict=True):
        if status != table.ALIGNED and len(totals.refused) < _MAX_REFUSED_NAMED:
            totals.refused.append({"photo": name, "status": status, **({"reason": reason} if reason else {})})


def _counts(totals: _Totals, num_photos: int, num_people: int) -> dict[str, Any]:
    statuses: Counter[str] = sum(totals.statuses.values(), Counter())
    return {
        "photos": num_photos,
        "rows": totals.num_rows,
        **{status: statuses[status] for status in table.STATUSES},
        "identities": num_people,
    }


def _split_figures(totals: _Totals, split: str, num_people: int) -> dict[str, Any]:
    return {
        "identities": num_people,
        "photos": totals.statuses[split][table.ALIGNED],
        "mean_photos_per_identity": round(totals.num_known[split] / num_people, 2) if num_people else 0.0,
        "statuses": dict(totals.statuses[split]),
    }


def _split_lines(card: dict[str, Any]) -> list[str]:
    return [
        f"no of {split} identities={figures['identities']} no of {split} photos={figures['photos']} "
        f"mean of photo count for each identity={figures['mean_photos_per_identity']}"
        for split, figures in card["splits"].items()
    ]


def _readme(card: dict[str, Any]) -> str:
    counts, fingerprint = card["counts"], card["fingerprint"]
    ratio = card["bytes_after"] / card["bytes_before"] if card["bytes_before"] else 0.0
    speed = f", {card['photos_per_s']} photos/s in the last run" if card["photos_per_s"] else ""
    status_rows = "\n".join(f"| {status} | {counts[status]:,} |" for status in table.STATUSES)
    refused = "\n".join(
        f"- `{entry['photo']!r}`: {entry['status']}" + (f" ({entry['reason']})" if "reason" in entry else "")
        for entry in card["refused"][:50]
    )
    passed_over = ", ".join(f"{number} {suffix}" for suffix, number in card["passed_over"].items()) or "none"
    quality_part = f"![measures of the faces]({QUALITY_NAME})\n\n" if card["quality"] else ""
    forgotten = f" Photos left out because they were forgotten: {card['forgotten']:,}." if card["forgotten"] else ""
    settings = "\n".join(f"| {name} | {value} |" for name, value in fingerprint.items())
    split_lines = "\n".join(_split_lines(card))
    return f"""# Aligned faces

{counts["photos"]:,} photos gave {counts["aligned"]:,} aligned faces of {counts["identities"]:,} identities.
{card["bytes_before"]:,} bytes before, {card["bytes_after"]:,} after (ratio {ratio:.3f}){speed}.

```
{split_lines}
```

![contact sheet]({SHEET_NAME})

{quality_part}## What became of each photo

| status | photos |
| --- | --- |
{status_rows}

Files that are no photos by their names, passed over: {passed_over}.{forgotten}

{"The first refused ones:" if refused else "None was refused."}

{refused}

## Made with

| setting | value |
| --- | --- |
{settings}

Faces are biometric data: keep them no longer, and show them to no more people, than the consent and the licence of the
photos allow.
"""


def _contact_sheet(faces_url: str, file_names: list[str]) -> bytes:
    """Return a JPEG of faces taken evenly from the parts."""
    num_tiles = _SHEET_COLUMNS * _SHEET_ROWS
    places = np.unique(np.linspace(0, len(file_names) - 1, min(num_tiles, len(file_names))).astype(int))
    each = -(-num_tiles // max(1, len(places)))
    crops: list[bytes] = []
    for place in places:
        rows = storage.read_parquet(storage.join(faces_url, file_names[place]), table.columns("status", "crop"))
        aligned = rows["crop"].filter(pc.equal(rows["status"], table.ALIGNED))
        chosen = np.unique(np.linspace(0, len(aligned) - 1, min(each, len(aligned))).astype(int))
        crops.extend(aligned[int(i)].as_py() for i in chosen)
    sheet = np.full((_SHEET_ROWS * _TILE, _SHEET_COLUMNS * _TILE, 3), 255, np.uint8)
    for tile, crop in enumerate(crops[:num_tiles]):
        y, x = (_TILE * place for place in divmod(tile, _SHEET_COLUMNS))
        picture = cv2.imdecode(np.frombuffer(crop, np.uint8), cv2.IMREAD_COLOR)
        if picture is None:  # crops that came aligned are not decoded before
            continue
        sheet[y : y + _TILE, x : x + _TILE] = cv2.resize(picture, (_TILE, _TILE), interpolation=cv2.INTER_AREA)
    used_rows = max(1, -(-min(len(crops), num_tiles) // _SHEET_COLUMNS))
    return to_jpeg(sheet[: used_rows * _TILE], quality=90)
