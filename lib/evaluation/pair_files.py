"""Files of pairs: LFW's text format, CSV and Parquet.

Shapes: P pairs.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from numpy.typing import NDArray

from lib.csv_text import read_csv
from lib.errors import UserError
from lib.evaluation.insightface_protocol import file_order_folds
from lib.evaluation.pair_lists import NamedPairs, is_cfp, parse_list, places_of, read_cfp, texts_of
from lib.evaluation.pairs import DEFAULT_FOLDS, MAX_FOLDS, NUM_NAMED, Pairs, Strings, strings_of
from lib.storage import read_bytes

logger = logging.getLogger(__name__)

_WORDS = {"true": 1, "t": 1, "yes": 1, "y": 1, "1": 1, "false": 0, "f": 0, "no": 0, "n": 0, "0": 0}


def read_pairs(url: str, photos: Strings, *, seed: int = 0) -> Pairs:
    """Return the pairs of a file: `.txt` in LFW's format, `.csv` or `.parquet` with photo_a, photo_b, same (and fold).

    `pair_lists` reads the other formats: lists of CALFW, CPLFW and AgeDB-30, and folders of CFP. Pairs without folds
    are dealt into 10 folds by `seed`, each with its share of both kinds. Such folds may share people.

    Raises:
        UserError: another kind of file, a malformed line or row (named by number), no pair whose photos are there.
    """
    suffix = PurePosixPath(url).suffix.lower()
    if suffix == ".txt":
        content = read_bytes(url)
        named = parse_list(content, url)
        return (
            parse_lfw_pairs(content, photos, url, seed=seed)
            if named is None
            else _named_pairs(named, photos, url, seed)
        )
    if is_cfp(url):
        return _named_pairs(read_cfp(url), photos, url, seed)
    if suffix in (".csv", ".parquet"):
        return parse_pairs_table(read_bytes(url), photos, url, seed=seed)
    if suffix == ".mat":
        raise UserError(
            f"{url}: the protocols of AgeDB are not read, because they call the photos otherwise than the files are "
            "called: name agedb_30.bin, AgeDB-30 as a text list, or a .csv with photo_a, photo_b, same"
        )
    raise UserError(
        f"{url}: pairs are read from .txt (LFW's format, or a list of names), .csv, .parquet, or the folders FF and FP "
        f"of CFP, not {suffix or 'a bare name'!r}"
    )


def parse_lfw_pairs(content: bytes, photos: Strings, url: str, *, seed: int = 0) -> Pairs:
    """Return the pairs of LFW's `pairs.txt`.

    The first line holds the number of folds and the number of pairs of each kind in a fold. If it holds only the
    latter, the pairs are one fold and are dealt into 10 here. A line `person i j` is a same pair, `person i other j` a
    different one. `person i` stands for the photo `person/person_%04d` with any extension, wherever that folder lies
    under the photo root. `url` names the file in messages.
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
    fold_P = kept // (2 * num_each) if num_folds > 1 else dealt_folds(same_P, seed)
    index = _index_by_person_and_stem(photos, {*names_a, *names_b}, url)
    a_P, b_P = (np.array([index.get(name, -1) for name in names]) for names in (names_a, names_b))
    return _found_pairs(a_P, b_P, same_P, fold_P, pa.array(names_a), pa.array(names_b), url)


def _distinct(names_a: pa.Array, names_b: pa.Array, same_P: NDArray[np.bool_], url: str) -> NDArray[np.int64]:
    """Return the row in which each pair is first listed, in rising order. The order of its two photos does not matter.

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
    """Return both photos as `person/stem`, and whether they show one person. None for a malformed line."""
    fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
    match fields:
        case [person, i, j] if i.isdecimal() and j.isdecimal() and int(i) != int(j):
            return _lfw_photo(person, i), _lfw_photo(person, j), True
        case [person, i, other, j] if i.isdecimal() and j.isdecimal() and person != other:
            return _lfw_photo(person, i), _lfw_photo(other, j), False
    return None


def _lfw_photo(person: str, number: str) -> str:
    return f"{person}/{person}_{int(number):04d}"


def _index_by_person_and_stem(photos: Strings, wanted: set[str], url: str) -> dict[str, int]:
    """Map each wanted `person/stem` to the photo whose path ends with it, with any extension."""
    index: dict[str, int] = {}
    for n, photo in enumerate(texts_of(photos)):
        key = os.path.splitext("/".join(photo.rsplit("/", 2)[-2:]))[0]  # noqa: PTH122  (pathlib is 20 times slower)
        if key in wanted and index.setdefault(key, n) != n:
            earlier = str(photos[index[key]])
            raise UserError(
                f"{url}: {key!r} may be {earlier!r} or {photo!r}: name a photo folder that holds one of them"
            )
    return index


def _named_pairs(named: NamedPairs, photos: Strings, url: str, seed: int) -> Pairs:
    """Return the pairs of a list of names.

    If the list has no folds, they are runs in the order of the list, as in InsightFace's protocol. If such a run would
    have pairs of one kind only, the pairs are dealt into folds instead.
    """
    names_a, names_b = pa.array(named.names_a, pa.string()), pa.array(named.names_b, pa.string())
    _refuse_rows(pc.equal(names_a, names_b).to_numpy(zero_copy_only=False), "pair a photo with itself", url)
    kept = _distinct(names_a, names_b, named.same_P, url)
    names_a, names_b, same_P = names_a.take(pa.array(kept)), names_b.take(pa.array(kept)), named.same_P[kept]
    if named.fold_P is not None:
        fold_P = named.fold_P[kept]
    else:
        fold_P = file_order_folds(len(kept)).astype(np.int64)
        num_same_F = np.bincount(fold_P, weights=same_P)
        if np.any((num_same_F == 0) | (num_same_F == np.bincount(fold_P))):
            fold_P = dealt_folds(same_P, seed)
    places = places_of({*named.names_a, *named.names_b}, photos, url)
    a_P, b_P = (np.array([places.get(name, -1) for name in names.to_pylist()]) for names in (names_a, names_b))
    return _found_pairs(a_P, b_P, same_P, fold_P, names_a, names_b, url)


def parse_pairs_table(content: bytes, photos: Strings, url: str, *, seed: int = 0) -> Pairs:
    """Return the pairs of a CSV or Parquet file with columns photo_a, photo_b, same, and perhaps fold.

    `same` holds true or false, 1 or 0, or yes or no. The CSV separator is a comma, a semicolon or a tab.
    """
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
    same_P = _booleans(table["same"], url)

    kept = _distinct(names_a, names_b, same_P, url)
    table, same_P, names_a, names_b = table.take(kept), same_P[kept], names_a.take(kept), names_b.take(kept)
    if "fold" in columns:
        labels, fold_P = np.unique(table["fold"].to_numpy(), return_inverse=True)
        if len(labels) > MAX_FOLDS:
            raise UserError(f"{url}: {len(labels)} different folds; at most {MAX_FOLDS} are read, usual are 10")
    else:
        fold_P = dealt_folds(same_P, seed)
    known = strings_of(photos)
    a_P, b_P = (pc.fill_null(pc.index_in(names, known), -1).to_numpy() for names in (names_a, names_b))
    return _found_pairs(a_P, b_P, same_P, fold_P, names_a, names_b, url)


def _booleans(column: pa.ChunkedArray, url: str) -> NDArray[np.bool_]:
    """Return a column of booleans, numbers or words as booleans.

    Raises:
        UserError: values that mean neither yes nor no. The message names their rows.
    """
    values = column.to_numpy()
    if pa.types.is_string(column.type):
        values = np.array([_WORDS.get(word.strip().lower(), -1) for word in column.to_pylist()])
    _refuse_rows(~np.isin(values, (0, 1)), "where same is neither true nor false, 1 nor 0, yes nor no", url)
    return values.astype(bool)


def _read_table(content: bytes, url: str) -> pa.Table:
    try:
        if url.lower().endswith(".csv"):
            return read_csv(content, text=["photo_a", "photo_b"])  # a name such as 000123 is no number
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


def dealt_folds(same_P: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
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
    """Return the pairs with both photos. Pairs with an index of -1 are counted and named."""
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
