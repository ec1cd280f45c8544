"""How well `jobs/curate.py` finds planted faults, and how well it groups faces without labels.

    python -m bench.curation --embeddings data/embeddings/first

Takes an embeddings table whose labels are right. Swaps 5 % of the labels and splits 5 % of the identities in two, looks
for both, and prints precision and recall of the surest proposals. Then it groups the faces without their labels, beside
scikit-learn's DBSCAN and HDBSCAN, each at its best of several settings, and prints F-measures of pairs and BCubed, and
seconds.

    python -m bench.curation --drawn 1000000

draws so many faces instead, and prints the CPU seconds of each step of the job from vectors to proposals.
"""

import json
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import tyro
from sklearn.cluster import DBSCAN, HDBSCAN

from lib.curation.changes import changes_table
from lib.curation.linkage import average_linkage
from lib.curation.neighbour_graph import near_faces
from lib.curation.page import shown_rows
from lib.curation.proposals import Proposal, best_threshold, pairwise_f, proposals
from lib.recognition.embeddings_table import read_embeddings


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What to measure on."""

    embeddings: str | None = None
    """Embeddings table."""
    drawn: int = 0
    """Draw so many faces of unit length instead, and time the steps."""
    faces_of_person: int = 20
    """Mean number of faces of a drawn person; the numbers are spread geometrically."""
    noise: float = 0.9
    """Of a drawn face, in each dimension; people differ by 1."""
    dim: int = 128
    min_photos: int = 2
    """Photos that a person needs to take part: the label of a person's only photo can be checked by nothing."""
    threshold: float = 0.6
    """The model's threshold; shares of it from 0.6 to 1.2 are tried."""
    seeds: int = 5


def main() -> None:
    """Print the figures."""
    flags = tyro.cli(Flags)
    if flags.drawn:
        steps(flags)
        return
    if flags.embeddings is None:
        raise SystemExit("give --embeddings or --drawn")
    made = read_embeddings(flags.embeddings)
    usable = [n for n, identity in enumerate(made.identities) if identity is not None and not made.failed_N[n]]
    person_N = np.unique([str(made.identities[n]) for n in usable], return_inverse=True)[1].astype(np.int64)
    vectors_ND = made.embeddings_ND[usable]
    kept_N = np.bincount(person_N)[person_N] >= flags.min_photos
    vectors_ND, person_N = vectors_ND[kept_N], np.unique(person_N[kept_N], return_inverse=True)[1].astype(np.int64)
    print(f"{len(person_N)} faces of {person_N.max() + 1} people")
    thresholds = shares_of(flags.threshold)
    for seed in range(flags.seeds):
        print(f"seed {seed}: {planted_faults(vectors_ND, person_N, thresholds, np.random.default_rng(seed))}")
    groupings(vectors_ND, person_N, thresholds)


def shares_of(threshold: float) -> list[float]:
    """Return the thresholds that the job tries."""
    return [round(float(share * threshold), 4) for share in np.linspace(0.6, 1.2, 13)]


def steps(flags: Flags) -> None:
    """Print the CPU seconds of each step for drawn people with 5 % of the labels swapped, and what the clusters are."""
    rng = np.random.default_rng(0)
    sizes = 1 + rng.geometric(1 / max(1, flags.faces_of_person - 1), 2 * flags.drawn // flags.faces_of_person + 10)
    person_N = np.repeat(np.arange(len(sizes)), sizes)[: flags.drawn]
    centres_MD = rng.standard_normal((person_N.max() + 1, flags.dim), np.float32)
    vectors_ND = rng.standard_normal((len(person_N), flags.dim), np.float32)
    vectors_ND *= flags.noise
    vectors_ND += centres_MD[person_N]
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    order = rng.permutation(len(person_N))
    vectors_ND, person_N, label_N = vectors_ND[order], person_N[order], person_N[order]
    swapped = rng.permutation(len(person_N))[: len(person_N) // 20]
    label_N[swapped] = rng.permutation(label_N[swapped])
    thresholds, spent = shares_of(1.1), {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        made = work()
        spent[name] = round(time.process_time() - start, 1)
        print(f"{name}: {spent[name]} CPU s", flush=True)
        return made

    near = timed("nearest of each face", lambda: near_faces(vectors_ND, thresholds[-1]))
    tree = timed("linkage", lambda: average_linkage(vectors_ND, thresholds[-1], near))
    threshold = timed("threshold", lambda: best_threshold({each: tree.clusters(each) for each in thresholds}, label_N))
    cluster_N = tree.clusters(threshold)
    found = timed("proposals", lambda: proposals(vectors_ND, label_N, cluster_N, threshold))
    names = [f"{n:08d}.jpg" for n in range(len(person_N))]
    identities = [str(n) for n in range(int(person_N.max()) + 1)]
    table = timed("table", lambda: changes_table(found, [], names, ["train"] * len(names), identities, []))
    timed("rows of the page", lambda: shown_rows(table, 200))
    line = {
        "faces": len(person_N),
        "people": int(person_N.max()) + 1,
        "pairs_F": round(pairwise_f(cluster_N, person_N), 5),
    }
    line |= {"threshold": threshold, "proposals": len(found)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    print(json.dumps({**line, "cpu_s": spent, "sum": round(sum(spent.values()), 1), "peak_MB": peak}))


def planted_faults(
    vectors_ND: np.ndarray, person_N: np.ndarray, thresholds: list[float], rng: np.random.Generator
) -> str:
    """Plant swapped labels and split identities, and return how well they are found."""
    label_N = person_N.copy()
    swapped = rng.permutation(len(label_N))[: len(label_N) // 40 * 2]
    label_N[swapped[::2]], label_N[swapped[1::2]] = person_N[swapped[1::2]], person_N[swapped[::2]]
    wrong = set(np.flatnonzero(label_N != person_N).tolist())
    large = np.flatnonzero(np.bincount(person_N) >= 4)
    half_of: dict[int, int] = {}
    for person in rng.permutation(large)[: max(1, (person_N.max() + 1) // 20)]:
        photos = rng.permutation(np.flatnonzero(label_N == person))
        half_of[int(label_N.max()) + 1] = int(person)
        label_N[photos[: len(photos) // 2]] = label_N.max() + 1
    tree = average_linkage(vectors_ND, thresholds[-1])
    threshold = best_threshold({each: tree.clusters(each) for each in thresholds}, label_N)
    found = proposals(vectors_ND, label_N, tree.clusters(threshold), threshold)

    def is_swapped(proposal: Proposal) -> list[bool]:
        return [face in wrong for face in proposal.faces.tolist()]

    def is_split(proposal: Proposal) -> list[bool]:
        return [half_of.get(proposal.identity) == proposal.to or half_of.get(proposal.to or -1) == proposal.identity]

    labels = curve((each for each in found if each.kind == "relabel"), is_swapped, len(wrong))
    merges = curve((each for each in found if each.kind == "merge"), is_split, len(half_of))
    return f"threshold {threshold:.3f}; swapped labels: {labels}; split identities: {merges}"


def curve(found: Iterable[Proposal], is_right: Callable[[Proposal], list[bool]], num_all: int) -> str:
    """Return the recall at a precision of 0.95 or more, and both over all proposals."""
    right = np.array([each for proposal in found for each in is_right(proposal)], bool)
    if not len(right):
        return "none found"
    precision, recall = np.cumsum(right) / np.arange(1, len(right) + 1), np.cumsum(right) / num_all
    sure = np.flatnonzero(precision >= 0.95)
    at = f"recall {recall[sure[-1]]:.3f} at precision {precision[sure[-1]]:.3f}" if len(sure) else "never 0.95"
    return f"{at} (all: {recall[-1]:.3f} at {precision[-1]:.3f}, {num_all} planted)"


def groupings(vectors_ND: np.ndarray, person_N: np.ndarray, thresholds: list[float]) -> None:
    """Print how well faces without labels are grouped, by ours and by others."""

    def line(name: str, groups: dict[float, np.ndarray], seconds: float) -> None:
        best = max(groups, key=lambda setting: pairwise_f(groups[setting], person_N))
        pairs, bcubed = pairwise_f(groups[best], person_N), bcubed_f(groups[best], person_N)
        print(f"{name:28} best at {best:.3f}: pairs F {pairs:.4f}, BCubed F {bcubed:.4f}, {seconds:.1f} s")

    start = time.perf_counter()
    tree = average_linkage(vectors_ND, thresholds[-1])
    line("average linkage (ours)", {each: tree.clusters(each) for each in thresholds}, time.perf_counter() - start)
    start = time.perf_counter()
    by_density = {each: alone(DBSCAN(eps=each, min_samples=2).fit_predict(vectors_ND)) for each in thresholds}
    line("DBSCAN, one of 13", by_density, (time.perf_counter() - start) / len(thresholds))
    start = time.perf_counter()
    sizes = (2, 3, 5)
    hierarchical = {
        float(size): alone(HDBSCAN(min_cluster_size=size, copy=True).fit_predict(vectors_ND)) for size in sizes
    }
    line("HDBSCAN, one of 3", hierarchical, (time.perf_counter() - start) / len(sizes))


def alone(label_N: np.ndarray) -> np.ndarray:
    """Return the groups with each face that is in none (-1) as a group of its own."""
    out_N = label_N.astype(np.int64)
    noise_N = out_N < 0
    out_N[noise_N] = out_N.max() + 1 + np.arange(noise_N.sum())
    return out_N


def bcubed_f(cluster_N: np.ndarray, identity_N: np.ndarray) -> float:
    """Return the BCubed F-measure (Bagga and Baldwin 1998): precision and recall of each face's cluster, averaged."""
    rows = pd.DataFrame({"cluster": cluster_N, "identity": identity_N})
    shared = rows.groupby(["cluster", "identity"])["cluster"].transform("size")
    precision = float((shared / rows.groupby("cluster")["cluster"].transform("size")).mean())
    recall = float((shared / rows.groupby("identity")["identity"].transform("size")).mean())
    return 2 * precision * recall / (precision + recall)


if __name__ == "__main__":
    main()
