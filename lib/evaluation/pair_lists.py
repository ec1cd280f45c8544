"""Lists of pairs by the names of photos, as CALFW, CPLFW, AgeDB-30 and CFP have them.

    a.jpg 1                a pair in two lines, as pairs_CALFW.txt and pairs_CPLFW.txt: 0 for two people, else 1 or the
    b.jpg 1                number of a fold
    1 a.jpg b.jpg          a pair in a line, the label first or last, as agedb_30_ann.txt and others
    Protocol/Split/FP/01/same.txt, diff.txt
                           CFP: "1,2" are lines of Pair_list_F.txt and Pair_list_P.txt; FF has both from the former

Shapes: P pairs.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lib import storage
from lib.errors import UserError
from lib.evaluation.pairs import NUM_NAMED, Strings
from lib.faces.images import PHOTO_SUFFIXES

logger = logging.getLogger(__name__)

CFP_LISTS = {"FF": ("Pair_list_F.txt", "Pair_list_F.txt"), "FP": ("Pair_list_F.txt", "Pair_list_P.txt")}
"""For each protocol of CFP, the two lists that the two numbers of a line refer to."""
_KINDS = {"same.txt": True, "diff.txt": False}

TAIL = 3
"""A photo is looked up by this many last parts of its path. CFP needs several: its photos have the same names in every
person's folder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NamedPairs:
    """Pairs by the names of their photos."""

    names_a: list[str]
    names_b: list[str]
    same_P: NDArray[np.bool_]
    fold_P: NDArray[np.int64] | None
    """None where the list has no folds."""


def parse_list(content: bytes, url: str) -> NamedPairs | None:
    """Return the pairs of a list of names; None if its first line is not of one.

    Raises:
        UserError: malformed lines, named by number.
    """
    lines = [line.strip() for line in content.decode("utf-8-sig", "surrogateescape").splitlines()]
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
    first = numbered[0][1] if numbered else ""
    if _one_line(first) is not None:
        rows = [_one_line(line) for _, line in numbered]
        _refuse([number for (number, _), row in zip(numbered, rows, strict=True) if row is None], _ONE, url)
        names_a, names_b, labels = zip(*(row for row in rows if row is not None), strict=True)
        return NamedPairs(names_a=list(names_a), names_b=list(names_b), same_P=np.array(labels, bool), fold_P=None)
    if _half(first) is not None:
        halves = [_half(line) for _, line in numbered]
        _refuse([number for (number, _), half in zip(numbered, halves, strict=True) if half is None], _TWO, url)
        return _of_halves([half for half in halves if half is not None], numbered, url)
    return None


_ONE = "a line is '1 a.jpg b.jpg' or 'a.jpg b.jpg 1', the label 1 for one person or 0"
_TWO = "a pair is two lines 'a.jpg 1', the label 0 for two people, else 1 or the number of a fold"


def _one_line(line: str) -> tuple[str, str, bool] | None:
    """Return both names and the label."""
    fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
    match fields:
        case ["0" | "1" as label, a, b] | [a, b, "0" | "1" as label] if _is_photo(a) and _is_photo(b):
            return a, b, label == "1"
    return None


def _half(line: str) -> tuple[str, int] | None:
    """Return the name and the label of one photo of a pair."""
    fields = line.rsplit(None, 1)
    if len(fields) == 2 and _is_photo(fields[0]) and fields[1].isdecimal():
        return fields[0], int(fields[1])
    return None


def _is_photo(name: str) -> bool:
    return name.lower().endswith(PHOTO_SUFFIXES)


def _of_halves(halves: Sequence[tuple[str, int]], numbered: Sequence[tuple[int, str]], url: str) -> NamedPairs:
    if len(halves) % 2:
        raise UserError(f"{storage.redacted(url)}: {_TWO}, and it has {len(halves)} lines: is the file cut off?")
    pairs = list(zip(halves[::2], halves[1::2], strict=True))
    _refuse([numbered[2 * n][0] for n, (a, b) in enumerate(pairs) if a[1] != b[1]], _TWO, url)
    label_P = np.array([label for (_, label), _ in pairs])
    same_P = label_P > 0
    folds = np.unique(label_P[same_P])
    fold_P = None
    if len(folds) > 1:
        # The others have no number: they are dealt in the order of the file.
        fold_P = np.searchsorted(folds, label_P)
        num_others = int(np.count_nonzero(~same_P))
        fold_P[~same_P] = np.arange(num_others) * len(folds) // max(1, num_others)
    return NamedPairs(
        names_a=[name for (name, _), _ in pairs],
        names_b=[name for _, (name, _) in pairs],
        same_P=same_P,
        fold_P=fold_P,
    )


def _refuse(numbers: Sequence[int], what: str, url: str) -> None:
    if numbers:
        named = ", ".join(map(str, numbers[:NUM_NAMED])) + (", …" if len(numbers) > NUM_NAMED else "")
        raise UserError(f"{storage.redacted(url)}: {len(numbers)} line(s) ({named}) malformed: {what}")


def is_cfp(url: str) -> bool:
    """Return whether a URL is the folder of a protocol of CFP, such as Protocol/Split/FP."""
    return PurePosixPath(url.rstrip("/")).name.upper() in CFP_LISTS


def read_cfp(url: str) -> NamedPairs:
    """Return the pairs of a protocol of CFP, in its folds.

    Raises:
        UserError: files are missing or malformed.
    """
    url = url.rstrip("/")
    folders = storage.children(url)[1]
    if not folders:
        raise UserError(f"{storage.redacted(url)} has no folders 01, 02, … with same.txt and diff.txt: copy all of CFP")
    protocol = url.rpartition("/")[0].rpartition("/")[0]
    listed = [_cfp_photos(storage.join(protocol, name)) for name in CFP_LISTS[url.rpartition("/")[2].upper()]]
    names: tuple[list[str], list[str]] = ([], [])
    same: list[bool] = []
    folds: list[int] = []
    for fold, folder in enumerate(folders):
        for file, is_same in _KINDS.items():
            file_url = storage.join(url, folder, file)
            lines = storage.read_bytes(file_url).decode("utf-8-sig", "replace").split()
            fields = [line.split(",") for line in lines]
            wrong = [
                number
                for number, numbers in enumerate(fields, 1)
                if len(numbers) != 2
                or any(number not in photos for number, photos in zip(numbers, listed, strict=True))
            ]
            _refuse(wrong, "a line is '1,2', numbers of lines of Pair_list_F.txt and Pair_list_P.txt", file_url)
            for side, photos, numbers in zip(names, listed, zip(*fields, strict=True), strict=True):
                side.extend(photos[number] for number in numbers)
            same += [is_same] * len(fields)
            folds += [fold] * len(fields)
    return NamedPairs(names_a=names[0], names_b=names[1], same_P=np.array(same), fold_P=np.array(folds))


def _cfp_photos(url: str) -> dict[str, str]:
    """Return the photos of a list by their numbers, without the way up out of its folder."""
    photos = {}
    lines = storage.read_bytes(url).decode("utf-8-sig", "surrogateescape").splitlines()
    for number, line in enumerate(lines, 1):
        fields = line.split(None, 1)
        if fields and (len(fields) != 2 or not fields[0].isdecimal()):
            _refuse([number], "a line is '1 ../Data/Images/001/frontal/01.jpg'", url)
        if fields:
            photos[fields[0]] = "/".join(part for part in fields[1].strip().split("/") if part not in ("..", "."))
    return photos


def places_of(names: set[str], photos: Strings, url: str) -> dict[str, int]:
    """Return the index of the photo of each name, for the names that have one.

    A list may start its paths at, below or above the photo root. So a name belongs to a photo if the two paths are
    equal or one ends with the other. If there are several such photos, the one in a folder with the name of the list's
    own folder is taken.

    Raises:
        UserError: several photos have the name.
    """
    parts = {name: tuple(name.replace("\\", "/").removeprefix("./").split("/")) for name in names}
    # A photo is looked up by as many last parts as both it and the name have, up to TAIL.
    short = {path[-TAIL:] for path in parts.values()}
    long = {path[-depth:] for path in parts.values() for depth in range(1, min(TAIL, len(path)) + 1)}
    found: dict[tuple[str, ...], list[tuple[int, tuple[str, ...]]]] = {}
    for n, photo in enumerate(texts_of(photos)):
        path = tuple(photo.rsplit("/", TAIL)[-TAIL:])
        for depth in range(1, len(path) + 1):
            if path[-depth:] in (long if depth == len(path) else short):
                found.setdefault(path[-depth:], []).append((n, tuple(photo.split("/"))))
    beside = url.rstrip("/").rpartition("/")[0].rpartition("/")[2]
    places: dict[str, int] = {}
    for name, path in parts.items():
        candidates = {
            n: photo
            for depth in range(1, min(TAIL, len(path)) + 1)
            for n, photo in found.get(path[-depth:], ())
            if depth == min(TAIL, len(path), len(photo)) and _ends_alike(path, photo)
        }
        exact = [n for n, photo in candidates.items() if photo == path]
        near = exact or [n for n, photo in candidates.items() if beside in photo[:-1]] or list(candidates)
        if len(near) > 1:
            first, second = ("/".join(candidates[n]) for n in near[:2])
            raise UserError(
                f"{storage.redacted(url)}: {name!r} may be {first!r} or {second!r}: name a photo folder that holds one "
                "of them"
            )
        if near:
            places[name] = near[0]
    return places


def _ends_alike(path: tuple[str, ...], photo: tuple[str, ...]) -> bool:
    shorter = min(len(path), len(photo))
    return path[-shorter:] == photo[-shorter:]


def texts_of(photos: Strings) -> Any:
    """Yield names, a chunk of an Arrow array at a time."""
    chunks = photos.chunks if isinstance(photos, pa.ChunkedArray) else [photos]
    for chunk in chunks:
        yield from chunk.to_pylist() if isinstance(chunk, pa.Array) else chunk


def list_names(urls: Sequence[str]) -> Mapping[str, str]:
    """Return the name of each list by its URL: the file name without suffix. For pairs.txt it is the folder's name.

    Raises:
        UserError: two lists would have the same name.
    """
    names = {url: _list_name(url) for url in urls}
    again = [name for name in names.values() if list(names.values()).count(name) > 1]
    if again or len(names) < len(urls):
        raise UserError(f"--pairs names two lists that are called {(again or list(names.values()))[0]!r}: rename one")
    return names


def _list_name(url: str) -> str:
    path = PurePosixPath((url.partition("?")[0] if "://" in url else url).rstrip("/"))
    if is_cfp(url):
        return f"cfp_{path.name.lower()}"
    stem = path.stem.removeprefix("pairs_").removesuffix("_ann")
    return path.parent.name if stem == "pairs" and path.parent.name else stem
