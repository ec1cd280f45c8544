"""Which photo is compared with which: pairs read from a file, or drawn by a seed.

A pair holds two indices into the caller's list of photos, so that a million pairs take 19 MB.

Shapes: N photos of the caller, I identities, P pairs, M photos of one fold.
"""

import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from lib.errors import UserError
from lib.storage import read_bytes

logger = logging.getLogger(__name__)

DEFAULT_FOLDS = 10
MAX_FOLDS = 32_767
"""Folds are numbered in 16 bits."""

NUM_NAMED = 5
"""So many of the photos or lines that are wrong are named in a message."""

SMALL_FOLD = 8
"""Where a fold has fewer cross pairs than this many times what is asked, all are listed instead of drawn at random."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Pairs of photos, as indices into the caller's list of photos."""

    a_P: NDArray[np.int64]
    b_P: NDArray[np.int64]
    same_P: NDArray[np.bool_]
    """Whether both photos show the same person."""
    fold_P: NDArray[np.int16]
    missing_photos: tuple[str, ...] = ()
    """Photos that the file names and the caller does not have; their pairs are not among the arrays."""
    num_missing_pairs: int = 0
    note: str = ""
    """What the user should be told about these pairs; empty where all is as asked."""

    def __len__(self) -> int:
        return len(self.a_P)


def read_pairs(url: str, photos: Sequence[str], *, seed: int = 0) -> Pairs:
    """Return the pairs of a file: `.txt` in LFW's format, `.csv` or `.parquet` with photo_a, photo_b, same (and fold).

    A file without folds is dealt into 10 by `seed`, each with its share of both kinds; such folds may share people.

    Raises:
        UserError: another kind of file, a malformed line or row (named by number), no pair whose photos are there.
    """
    suffix = PurePosixPath(url).suffix.lower()
    if suffix == ".txt":
        return parse_lfw_pairs(read_bytes(url), photos, url, seed=seed)
    if suffix in (".csv", ".parquet"):
        return parse_pairs_table(read_bytes(url), photos, url, seed=seed)
    raise UserError(
        f"{url}: pairs are read from .txt (LFW's format), .csv or .parquet, not {suffix or 'a bare name'!r}"
    )


def parse_lfw_pairs(content: bytes, photos: Sequence[str], url: str, *, seed: int = 0) -> Pairs:
    """Return the pairs of LFW's `pairs.txt`.

    The first line holds the number of folds and of pairs of each kind in a fold (or the latter alone: one fold, dealt
    into 10 here). A line `person i j` is a same pair, `person i other j` a different one; `person i` stands for the
    photo `person/person_%04d` of any extension, wherever that folder lies under the photo root. `url` names the file in
    messages.
    """
    try:
        lines = content.decode("utf-8-sig").splitlines()
        header = [int(field) for field in lines[0].split()]
        num_folds, num_each = header if len(header) == 2 else (1, *header)
    except (ValueError, IndexError):
        raise UserError(
            f"{url}: line 1 must hold the number of folds and of pairs of each kind, as in '10 300'"
        ) from None
    if not 1 <= num_folds <= MAX_FOLDS or num_each < 1:
        raise UserError(
            f"{url}: line 1 asks for {num_folds} folds of {num_each} pairs; 1 to {MAX_FOLDS} folds can be read"
        )

    numbered = [(number, _lfw_pair(line)) for number, line in enumerate(lines[1:], start=2) if line.strip()]
    malformed = [number for number, pair in numbered if pair is None]
    if malformed:
        raise UserError(
            f"{url}: {_named('line', malformed)} malformed: a line is 'person i j' with i and j different, "
            "or 'person i other-person j', parted by tabs"
        )
    pairs = [pair for _, pair in numbered if pair is not None]
    if len(pairs) != 2 * num_folds * num_each:
        raise UserError(
            f"{url}: line 1 promises {num_folds} x 2 x {num_each} = {2 * num_folds * num_each} pairs, "
            f"and {len(pairs)} follow: is the file cut off?"
        )

    all_a, all_b, same = zip(*pairs, strict=True)
    kept = _distinct(pa.array(all_a), pa.array(all_b), np.array(same), url)
    names_a, names_b = ([names[row] for row in kept] for names in (all_a, all_b))
    same_P = np.array(same)[kept]
    fold_P = kept // (2 * num_each) if num_folds > 1 else _dealt_folds(same_P, seed)
    index = _index_by_person_and_stem(photos, {*names_a, *names_b}, url)
    a_P, b_P = (np.array([index.get(name, -1) for name in names]) for names in (names_a, names_b))
    return _found_pairs(a_P, b_P, same_P, fold_P, pa.array(names_a), pa.array(names_b), url)


def _distinct(names_a: pa.Array, names_b: pa.Array, same_P: NDArray[np.bool_], url: str) -> NDArray[np.int64]:
    """Return the row in which each pair is listed first, whichever of its photos is named first, in order.

    Raises:
        UserError: a pair is listed as one person and as two.
    """
    encoded = pa.array([*names_a.to_pylist(), *names_b.to_pylist()], pa.string()).dictionary_encode()
    a_P, b_P = encoded.indices.to_numpy().astype(np.int64).reshape(2, -1)
    key_P = np.minimum(a_P, b_P) * len(encoded.dictionary) + np.maximum(a_P, b_P)
    _, rows_U, pair_P = np.unique(key_P, return_index=True, return_inverse=True)
    first_P = rows_U[pair_P]
    _refuse_rows(same_P != same_P[first_P], "contradict an earlier row on whether two photos show one person", url)
    num_again = len(same_P) - len(rows_U)
    if num_again:
        logger.warning("%s: %d of %d pairs are listed more than once: each counts once", url, num_again, len(same_P))
    return np.sort(rows_U)


def _lfw_pair(line: str) -> tuple[str, str, bool] | None:
    """Return both photos as `person/stem` and whether they show one person; None for a malformed line."""
    fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
    match fields:
        case [person, i, j] if i.isdecimal() and j.isdecimal() and int(i) != int(j):
            return _lfw_photo(person, i), _lfw_photo(person, j), True
        case [person, i, other, j] if i.isdecimal() and j.isdecimal() and person != other:
            return _lfw_photo(person, i), _lfw_photo(other, j), False
    return None


def _lfw_photo(person: str, number: str) -> str:
    return f"{person}/{person}_{int(number):04d}"


def _index_by_person_and_stem(photos: Sequence[str], wanted: set[str], url: str) -> dict[str, int]:
    """Map each wanted `person/stem` to the one photo whose path ends so, whatever its extension."""
    index: dict[str, int] = {}
    for n, photo in enumerate(photos):
        key = os.path.splitext("/".join(photo.rsplit("/", 2)[-2:]))[0]  # noqa: PTH122  (pathlib is 20 times slower)
        if key in wanted and index.setdefault(key, n) != n:
            raise UserError(
                f"{url}: {key!r} may be {photos[index[key]]!r} or {photo!r}: name a photo folder that holds one of them"
            )
    return index


def parse_pairs_table(content: bytes, photos: Sequence[str], url: str, *, seed: int = 0) -> Pairs:
    """Return the pairs of a CSV or Parquet file with columns photo_a, photo_b, same (true/false, 1/0), perhaps fold."""
    table = _read_table(content, url)
    absent = [name for name in ("photo_a", "photo_b", "same") if name not in table.column_names]
    if absent:
        raise UserError(
            f"{url}: no column {', '.join(absent)} among {', '.join(table.column_names)}; "
            "needed are photo_a, photo_b, same"
        )
    columns = [name for name in ("photo_a", "photo_b", "same", "fold") if name in table.column_names]
    for name in columns:
        _refuse_rows(pc.is_null(table[name]).to_numpy(), f"without {name}", url)
    try:
        names_a, names_b = (table[name].cast(pa.string()) for name in ("photo_a", "photo_b"))
    except pa.ArrowException as error:
        raise UserError(f"{url}: photo_a and photo_b must be text: {error}") from None
    _refuse_rows(pc.equal(names_a, names_b).to_numpy(), "pair a photo with itself", url)
    same = table["same"].to_numpy()
    _refuse_rows(~np.isin(same, (0, 1)), "where same is neither true, false, 1 nor 0", url)
    same_P = same.astype(bool)

    kept = _distinct(names_a, names_b, same_P, url)
    table, same_P, names_a, names_b = table.take(kept), same_P[kept], names_a.take(kept), names_b.take(kept)
    if "fold" in columns:
        labels, fold_P = np.unique(table["fold"].to_numpy(), return_inverse=True)
        if len(labels) > MAX_FOLDS:
            raise UserError(f"{url}: {len(labels)} different folds; at most {MAX_FOLDS} are read, usual are 10")
    else:
        fold_P = _dealt_folds(same_P, seed)
    known = pa.array(photos, pa.string())
    a_P, b_P = (pc.fill_null(pc.index_in(names, known), -1).to_numpy() for names in (names_a, names_b))
    return _found_pairs(a_P, b_P, same_P, fold_P, names_a, names_b, url)


def _read_table(content: bytes, url: str) -> pa.Table:
    text = {"photo_a": pa.string(), "photo_b": pa.string()}  # a name such as 000123 is no number
    try:
        if url.lower().endswith(".csv"):
            options = pa.csv.ConvertOptions(column_types=text)
            content.decode()  # Arrow finds out only once the name of a column is asked for
            return pa.csv.read_csv(io.BytesIO(content), convert_options=options)
        return pa.parquet.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{url}: cannot be read as a table of pairs: {error}") from None


def _refuse_rows(wrong_P: NDArray[np.bool_], what: str, url: str) -> None:
    """Raise for the rows marked wrong, numbered from 1 after any header."""
    if wrong_P.any():
        raise UserError(f"{url}: {_named('row', (np.flatnonzero(wrong_P) + 1).tolist())} {what}")


def _named(kind: str, numbers: Sequence[int]) -> str:
    named = ", ".join(str(number) for number in numbers[:NUM_NAMED])
    return f"{len(numbers)} {kind}(s) ({named}{', …' if len(numbers) > NUM_NAMED else ''})"


def _dealt_folds(same_P: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """Deal the pairs of each kind evenly into 10 folds, or fewer where one kind has not as many pairs."""
    num_folds = max(1, min(DEFAULT_FOLDS, int(same_P.sum()), int((~same_P).sum())))
    rng = np.random.default_rng(seed)
    fold_P = np.empty(len(same_P), np.int64)
    for kind in (True, False):
        chosen = np.flatnonzero(same_P == kind)
        fold_P[rng.permutation(chosen)] = np.arange(len(chosen)) % num_folds
    return fold_P


def _found_pairs(
    a_P: NDArray, b_P: NDArray, same_P: NDArray, fold_P: NDArray, names_a: pa.Array, names_b: pa.Array, url: str
) -> Pairs:
    """Part the pairs whose photos are there from those with an index of -1, which are named and counted."""
    found_P = (a_P >= 0) & (b_P >= 0)
    num_missing = len(found_P) - int(found_P.sum())
    lost_a, lost_b = (
        names.filter(pa.array(index_P < 0)).to_pylist() for names, index_P in ((names_a, a_P), (names_b, b_P))
    )
    missing = tuple(sorted({*lost_a, *lost_b}))
    examples = ", ".join(repr(name) for name in missing[:NUM_NAMED])
    if num_missing == len(found_P):
        raise UserError(
            f"{url}: none of its {len(found_P)} pairs has both photos here (missing: {examples or 'no pairs at all'}): "
            "do the names in it start at the photo folder given?"
        )
    return Pairs(
        a_P=a_P[found_P].astype(np.int64),
        b_P=b_P[found_P].astype(np.int64),
        same_P=same_P[found_P],
        fold_P=fold_P[found_P].astype(np.int16),
        missing_photos=missing,
        num_missing_pairs=num_missing,
        note=f"{num_missing} of {len(found_P)} pairs name photos that are not there: {len(missing)}, such as {examples}"
        if num_missing
        else "",
    )


def made_pairs(
    photos: Sequence[str],
    identities: Sequence[str],
    *,
    num_pairs: int = 6_000,
    num_folds: int = DEFAULT_FOLDS,
    seed: int,
) -> Pairs:
    """Draw pairs as LFW has them: half of one person, half of two, in folds that share no person, no pair twice.

    Within a fold every person serves as evenly as the photos allow. The draw depends on the names and the seed, not on
    the order of the photos (length N, as `identities`). Where there is too little for `num_pairs`, each fold gets as
    many as it has, still half of each kind, and `note` says so.

    Raises:
        UserError: not enough people for two folds, or too few pairs asked for the folds.
    """
    if not 2 <= num_folds <= MAX_FOLDS or num_pairs < 2 * num_folds:
        raise UserError(f"{num_pairs} pairs in {num_folds} folds: at least 2 folds and 2 pairs a fold are needed")
    photo_N, count_I = _by_identity(photos, identities)
    num_paired = int((count_I >= 2).sum())
    folds = min(num_folds, num_paired, len(count_I) // 2)
    if folds < 2:
        raise UserError(
            f"{len(count_I)} people, {num_paired} of them with two photos or more, are too few to make pairs from: "
            "two folds need four people, two of them with two photos"
        )
    rng = np.random.default_rng(seed)
    # Dealt in order of their number of photos, so that the folds are alike in size.
    fold_I = np.empty(len(count_I), np.int64)
    fold_I[np.lexsort((rng.random(len(count_I)), -count_I))] = np.arange(len(count_I)) % folds
    start_I = np.cumsum(count_I) - count_I

    parts = []
    for fold in range(folds):
        people = rng.permutation(np.flatnonzero(fold_I == fold))
        count_J = count_I[people]
        wanted = num_pairs // 2 // folds + (fold < num_pairs // 2 % folds)
        num_each = min(wanted, int(_num_same(count_J).sum()), _num_different(count_J))
        same = _draw_same(count_J, num_each, rng)
        different = _draw_different(count_J, num_each, rng)
        # Positions within the fold's photos, laid out person by person -> positions in photo_N.
        place_M = np.arange(count_J.sum()) + np.repeat(start_I[people] - (np.cumsum(count_J) - count_J), count_J)
        parts.append(photo_N[place_M[np.concatenate([same, different])]])
    a_P, b_P = np.concatenate(parts).T
    size_F = np.array([len(part) for part in parts])
    fold_P = np.repeat(np.arange(folds, dtype=np.int16), size_F)
    same_P = np.concatenate([np.repeat([True, False], size // 2) for size in size_F])
    short = len(a_P) < num_pairs - num_pairs % 2 or folds < num_folds
    note = (
        f"{len(a_P)} pairs in {folds} folds were made, {num_pairs} in {num_folds} asked for: "
        f"there are {len(count_I)} people, {num_paired} of them with two photos or more"
    )
    return Pairs(a_P=a_P.copy(), b_P=b_P.copy(), same_P=same_P, fold_P=fold_P, note=note if short else "")


def original_pairs(photos: Sequence[str], identities: Sequence[str], *, seed: int) -> Pairs:
    """Return the original project's pairs: every two photos of a person, and for each a random photo of someone else.

    Each same pair and its different pair stand in the fold of that person (10 folds, fewer where fewer people have two
    photos), so folds share no person among same pairs, but the random others may come from any fold.

    Raises:
        UserError: nobody has two photos, or there is only one person.
    """
    photo_N, count_I = _by_identity(photos, identities)
    paired = np.flatnonzero(count_I >= 2)
    if not len(paired) or len(count_I) < 2:
        raise UserError(
            f"{len(count_I)} people, {len(paired)} of them with two photos or more: "
            "pairs need two people, one of them with two photos"
        )
    rng = np.random.default_rng(seed)
    num_photos = len(photo_N)
    person_N = np.repeat(np.arange(len(count_I)), count_I)
    stop_N = np.cumsum(count_I)[person_N]
    a_P, b_P = _listed(np.arange(1, num_photos + 1), stop_N)
    person_P = person_N[a_P]
    other_P = rng.integers(num_photos - count_I[person_P])
    other_P += np.where(other_P >= stop_N[a_P] - count_I[person_P], count_I[person_P], 0)  # step over the own photos

    fold_I = np.zeros(len(count_I), np.int16)
    fold_I[rng.permutation(paired)] = np.arange(len(paired)) % min(DEFAULT_FOLDS, len(paired))
    return Pairs(
        a_P=photo_N[np.concatenate([a_P, a_P])],
        b_P=photo_N[np.concatenate([b_P, other_P])],
        same_P=np.arange(2 * len(a_P)) < len(a_P),
        fold_P=np.tile(fold_I[person_P], 2),
    )


def _by_identity(photos: Sequence[str], identities: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the photos person by person, by name within each, and how many photos each person has."""
    assert len(photos) == len(identities)
    table = pa.table({"identity": pa.array(identities, pa.string()), "photo": pa.array(photos, pa.string())})
    assert table["identity"].null_count == 0
    photo_N = pc.sort_indices(table, sort_keys=[("identity", "ascending"), ("photo", "ascending")]).to_numpy()
    runs = pc.run_end_encode(table["identity"].combine_chunks().take(photo_N))
    return photo_N.astype(np.int64), np.diff(runs.run_ends.to_numpy().astype(np.int64), prepend=0)


def _num_same(count_J: NDArray[np.int64]) -> NDArray[np.int64]:
    return count_J * (count_J - 1) // 2


def _num_different(count_J: NDArray[np.int64]) -> int:
    return int(count_J.sum() ** 2 - (count_J**2).sum()) // 2


def _draw_same(count_J: NDArray[np.int64], num: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw `num` pairs, [num, 2], of positions among photos laid out person by person, evenly over those people."""
    capacity_J = np.sort(_num_same(count_J))
    num_people = len(count_J)
    before_J = np.cumsum(capacity_J) - capacity_J
    # Everyone gives the same number of pairs, save those who have not as many and give all.
    num_spent = int(np.searchsorted(before_J + capacity_J * np.arange(num_people, 0, -1), num, side="right"))
    level = (num - before_J[num_spent]) // (num_people - num_spent) if num_spent < num_people else capacity_J[-1]
    quota_J = np.minimum(_num_same(count_J), level)
    quota_J[rng.permutation(np.flatnonzero(_num_same(count_J) > level))[: num - quota_J.sum()]] += 1

    start_J = np.cumsum(count_J) - count_J
    drawn = []
    for person in np.flatnonzero(quota_J):
        code = rng.choice(int(_num_same(count_J[person])), int(quota_J[person]), replace=False)
        b = ((1 + np.sqrt(1 + 8 * code)) / 2).astype(np.int64)  # row of the lower triangle, counted row by row
        drawn.append(start_J[person] + np.stack([code - b * (b - 1) // 2, b], axis=1))
    return np.concatenate(drawn)


def _draw_different(count_J: NDArray[np.int64], num: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw `num` pairs, [num, 2], of positions of two people's photos, evenly over the people, none twice."""
    num_people, num_photos = len(count_J), int(count_J.sum())
    person_M = np.repeat(np.arange(num_people), count_J)
    start_J = np.cumsum(count_J) - count_J
    if _num_different(count_J) <= SMALL_FOLD * num:
        a, b = _listed(start_J[person_M] + count_J[person_M], np.full(num_photos, num_photos))
        candidates = np.stack([a, b], axis=1)
    else:
        num_rounds = 1 + 2 * num // (num_people // 2)
        candidates = np.empty((0, 2), np.int64)
        while len(candidates) < num:
            # Everyone is paired with one other in each round.
            people = rng.permuted(np.tile(np.arange(num_people), (num_rounds, 1)), axis=1)[:, : num_people // 2 * 2]
            person = np.sort(people.reshape(-1, 2), axis=1)
            photo = start_J[person] + (rng.random(person.shape) * count_J[person]).astype(np.int64)
            candidates = np.stack(np.divmod(np.unique(photo[:, 0] * num_photos + photo[:, 1]), num_photos), axis=1)
            num_rounds *= 2
    candidates = rng.permutation(candidates)
    # Whoever has served most often already waits longest.
    turn = _occurrence(person_M[candidates].ravel()).reshape(-1, 2).max(axis=1)
    return candidates[np.argsort(turn, kind="stable")[:num]]


def _occurrence(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each value how many equal ones stand before it."""
    order = np.argsort(values, kind="stable")
    count = np.bincount(values)
    occurrence = np.empty(len(values), np.int64)
    occurrence[order] = np.arange(len(values)) - (np.cumsum(count) - count)[values[order]]
    return occurrence


def _listed(first_N: NDArray[np.int64], stop_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List every (n, m) with first[n] <= m < stop[n]."""
    length_N = stop_N - first_N
    a_P = np.repeat(np.arange(len(first_N)), length_N)
    b_P = np.arange(len(a_P)) + np.repeat(first_N - (np.cumsum(length_N) - length_N), length_N)
    return a_P, b_P
