"""The card of a finished faces table, with its contact sheet and pictures of quality, and then `_SUCCESS`."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow.compute as pc

from lib import storage
from lib.faces import quality_figures, table
from lib.faces.images import to_jpeg
from lib.faces.part_plan import BUCKETS, SIZE
from lib.faces.plan_files import PartPlan
from lib.faces.row_counts import Totals, count_rows
from lib.parts import KEEP_VERSIONS, check_ours, finish_version

logger = logging.getLogger(__name__)

CARD_NAME, README_NAME, SHEET_NAME, QUALITY_NAME = "card.json", "README.md", "contact_sheet.jpg", "quality.jpg"
NAMES = (CARD_NAME, README_NAME, SHEET_NAME, QUALITY_NAME)

_SHEET_COLUMNS, _SHEET_ROWS, _TILE = 12, 6, 120


def finish(
    faces_url: str,
    plan: PartPlan,
    *,
    begun: Mapping[str, Any],
    photos_per_s: float | None,
    keep_versions: int = KEEP_VERSIONS,
) -> dict[str, Any]:
    """Count all rows, write card and contact sheet, then `_SUCCESS`; return the counts.

    `begun` is the plan of the version.

    Raises:
        JobError: another job began another version of this table meanwhile.
    """
    check_ours(faces_url, begun)
    fingerprint, file_names = begun["fingerprint"], plan.file_names()
    totals = count_rows(faces_url, file_names)
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

    `earlier` are the counts in `_SUCCESS` of the version before. Figures that only preprocess knew stay as they are.
    """
    card_url = storage.join(faces_url, CARD_NAME)
    before = storage.read_json(card_url) if storage.exists(card_url) else {}
    more = {
        "passed_over": before.get("passed_over", {}),
        # Added once, even if this is repeated after a kill.
        "forgotten": before.get("forgotten", 0) + (num_forgotten if before.get("run_id") != begun["run_id"] else 0),
        "photos_per_s": before.get("photos_per_s"),
    }
    num_photos = int(earlier.get("photos", 0)) - num_forgotten
    card = _write(faces_url, file_names, begun, count_rows(faces_url, file_names), num_photos, more)
    counts: dict[str, Any] = card["counts"]
    return counts


def _write(
    faces_url: str,
    file_names: list[str],
    begun: Mapping[str, Any],
    totals: Totals,
    num_photos: int,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Write card and contact sheet, and return the card; `more` are entries that do not come from the rows."""
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


def _counts(totals: Totals, num_photos: int, num_people: int) -> dict[str, Any]:
    statuses: Counter[str] = sum(totals.statuses.values(), Counter())
    return {
        "photos": num_photos,
        "rows": totals.num_rows,
        **{status: statuses[status] for status in table.STATUSES},
        "identities": num_people,
    }


def _split_figures(totals: Totals, split: str, num_people: int) -> dict[str, Any]:
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
        if picture is None:  # nobody has decoded crops that came aligned
            continue
        sheet[y : y + _TILE, x : x + _TILE] = cv2.resize(picture, (_TILE, _TILE), interpolation=cv2.INTER_AREA)
    used_rows = max(1, -(-min(len(crops), num_tiles) // _SHEET_COLUMNS))
    return to_jpeg(sheet[: used_rows * _TILE], quality=90)
