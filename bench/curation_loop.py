"""Does curation gain accuracy? Faults are planted in drawn people, then: train, curate, apply, train again.

    python -m bench.curation_loop --people 300 --swapped 0.05 --split 0.05 --copies 0.02

Swaps labels, splits people in two, and adds altered copies of photos, half of them under another name. Trains on
that, proposes changes by that model and compares them with what was planted, applies those of `--over`, trains again by
the same flags, and measures both models on other drawn people, whose labels are right. A third model is trained on the
right labels: more than it, no curation can gain. Prints a line of JSON.
"""

import csv
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import tyro

from bench.inputs import drawn, run_job

TRAINING = "--backbone test_convnext --init none --image-size 80 --lr 2e-3 --epochs 10 --triplets-per-epoch 4000"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is planted, and how it is looked for."""

    people: int = 300
    photos: int = 10
    """Of each person."""
    judges: int = 150
    """People who measure the models."""
    swapped: float = 0.05
    """Share of photos with another person's label."""
    split: float = 0.05
    """Share of people with two labels."""
    copies: float = 0.02
    """Altered copies, as a share of the photos."""
    over: float = 0.3
    """Certainty from which proposals are applied."""
    seeds: tuple[int, ...] = (0, 1)
    training: str = TRAINING
    """Flags of train."""


@dataclass
class Planted:
    """What is wrong, and the labels that were right."""

    right: dict[str, str]
    """Identity by photo."""
    labels: dict[str, str]
    swapped: set[str] = field(default_factory=set)
    halves: dict[str, str] = field(default_factory=dict)
    """Identity of a second half -> that of the first."""
    copies: dict[str, str] = field(default_factory=dict)
    """Copy -> photo."""


def plant(folder: Path, flags: Flags, rng: np.random.Generator) -> Planted:
    """Write `identities.txt` with faults, and altered copies of photos."""
    listed = [line.rsplit(" ", 1) for line in (folder / "identities.txt").read_text().splitlines()]
    planted = Planted(right=dict(listed), labels={})
    labels = planted.labels = dict(planted.right)
    photos = sorted(photo for photo in labels if cv2.haveImageReader(str(folder / "photos" / photo)))
    chosen = rng.permutation(photos)[: int(len(photos) * flags.swapped) // 2 * 2].tolist()
    for one, other in zip(chosen[::2], chosen[1::2], strict=True):
        if labels[one] != labels[other]:
            labels[one], labels[other] = labels[other], labels[one]
            planted.swapped |= {one, other}
    people = sorted(set(planted.right.values()))
    for person in rng.permutation(people)[: round(len(people) * flags.split)].tolist():
        theirs = sorted(photo for photo, identity in labels.items() if identity == person)
        planted.halves[f"{person} again"] = person
        labels.update(dict.fromkeys(theirs[::2], f"{person} again"))
    for number, photo in enumerate(rng.permutation(photos)[: round(len(photos) * flags.copies)].tolist()):
        name = f"copy-{number:05d}.jpg"
        pixels = cv2.imread(str(folder / "photos" / photo))
        smaller = cv2.resize(pixels, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / "photos" / name), smaller, [cv2.IMWRITE_JPEG_QUALITY, 60])
        planted.copies[name] = photo
        planted.right[name] = planted.right[photo]
        labels[name] = labels[photo] if number % 2 else str(rng.choice(people))
    write_list(folder, labels)
    return planted


def write_list(folder: Path, labels: dict[str, str]) -> None:
    """Write a list of identities."""
    with (folder / "identities.txt").open("w", newline="") as file:
        csv.writer(file).writerows([("photo", "identity"), *sorted(labels.items())])


def found_of(folder: Path, planted: Planted) -> dict[str, Any]:
    """Return recall and precision of the proposals by kind, over all and where precision is still 0.95."""
    rows = pq.ParquetFile(folder / "curation" / "curation.parquet").read().to_pylist()
    right: dict[str, list[bool]] = defaultdict(list)
    seen: dict[str, set[str]] = defaultdict(set)
    at: dict[str, float] = {}
    wanted = {
        "label": planted.swapped | {copy for copy in planted.copies if planted.labels[copy] != planted.right[copy]},
        "merge": set(planted.halves),
        "duplicate": set(planted.copies),
    }
    for row in sorted(rows, key=lambda each: -each["certainty"]):
        for kind, one, is_right in judged(row, planted):
            right[kind].append(is_right)
            if is_right:
                seen[kind].add(one)
            if np.mean(right[kind]) >= 0.95:
                at[kind] = len(seen[kind] & wanted[kind]) / max(1, len(wanted[kind]))
    return {
        kind: {
            "planted": len(each),
            "recall": round(len(seen[kind] & each) / max(1, len(each)), 3),
            "precision": round(float(np.mean(right[kind])), 3) if right[kind] else None,
            "recall_at_precision_0.95": round(at.get(kind, 0.0), 3),
        }
        for kind, each in wanted.items()
    }


def judged(row: dict[str, Any], planted: Planted) -> list[tuple[str, str, bool]]:
    """Return the kind, the thing and whether it was planted, for each thing that a proposal says."""
    if row["kind"] in ("relabel", "split", "outlier"):
        is_wrong = [planted.labels[photo].removesuffix(" again") != planted.right[photo] for photo in row["photos"]]
        return [("label", photo, wrong) for photo, wrong in zip(row["photos"], is_wrong, strict=True)]
    if row["kind"] == "merge":
        pair = {row["identity"], row["to_identity"]}
        second = next((half for half, person in planted.halves.items() if {half, person} == pair), "")
        return [("merge", second, bool(second))]
    if row["kind"] == "duplicate":
        pairs = [{photo, other} for photo in row["photos"] for other in row["evidence"]]
        copies = [copy for copy, photo in planted.copies.items() if {copy, photo} in pairs]
        return [("duplicate", copies[0] if copies else "", bool(copies))]
    return []


def train(folder: Path, name: str, flags: Flags, seed: int) -> str:
    """Train on the labels as they are, and return the model."""
    run_job("preprocess.py", "--data", str(folder), "--split-shares", "90", "10", "0")
    place = ("--data", str(folder), "--name", name, "--cache-dir", str(folder / "cache"), "--seed", str(seed))
    return str(run_job("train.py", *place, *flags.training.split())["model"])


def loop(work: Path, flags: Flags, seed: int) -> dict[str, Any]:
    """Run the whole sequence, and return its figures."""
    folder, judges = work / "people", work / "judges"
    drawn(folder, flags.people, flags.photos)
    run_job("sample.py", "--data", str(judges), "--identities", str(flags.judges), "--seed", "1000")
    run_job("preprocess.py", "--data", str(judges), "--split-shares", "0", "0", "100")
    planted = plant(folder, flags, np.random.default_rng(seed))
    models = [train(folder, "noisy", flags, seed)]
    run_job("curate.py", "--data", str(folder), "--model", models[0])
    found = found_of(folder, planted)
    run_job("curate.py", "--data", str(folder), "--apply-over", str(flags.over))
    models.append(train(folder, "curated", flags, seed))
    write_list(folder, planted.right)
    models.append(train(folder, "right", flags, seed))
    gains = [measured(judges, [models[0], other], work / "report") for other in models[1:]]
    return {
        "found": found,
        "noisy": gains[0][0],
        "curated": gains[0][1],
        "gain": gains[0][2],
        "right_labels": gains[1][1],
        "possible_gain": gains[1][2],
    }


def measured(judges: Path, models: Sequence[str], report: Path) -> tuple[float, float, list[float]]:
    """Return the accuracies of two models, and how far the second is ahead, with the standard error."""
    flags = (
        "--data",
        str(judges),
        "--model",
        models[0],
        "--model",
        models[1],
        "--num-pairs",
        "20000",
        "--keep-threshold",
    )
    run_job("evaluate.py", *flags, "--output", str(report))
    metrics = json.loads((report / "metrics.json").read_text())
    gain = metrics["difference"]
    accuracies = [round(each["accuracy"], 4) for each in metrics["models"]]
    return accuracies[0], accuracies[1], [round(gain["accuracy"], 4), round(gain["std"], 4)]


def main() -> None:
    """Run the loop with each seed, and print."""
    flags = tyro.cli(Flags, description=__doc__)
    for seed in flags.seeds:
        with tempfile.TemporaryDirectory() as work:
            print(json.dumps({"bench": "curation_loop", "seed": seed, **loop(Path(work), flags, seed)}), flush=True)


if __name__ == "__main__":
    main()
