"""The files of IJB-B and IJB-C: images, templates made of them, pairs of templates, galleries and probes.

`meta/` holds them as text, `loose_crop/` the images. NAME is ijbb or ijbc:

    NAME_face_tid_mid.txt            image, template, media
    NAME_template_pair_label.txt     template, template, 1 for one person or 0
    NAME_name_5pts_score.txt         image, x y of five landmarks, score of the detector
    NAME_1N_gallery_G1.csv           template, subject, and more; a header. There are two galleries, or none
    NAME_1N_probe_mixed.csv          the same

Shapes: N images, R rows (an image in a template), T templates, P pairs, E templates of a gallery or of the probes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from lib import storage
from lib.errors import UserError
from lib.ranged_files import RangedFile

META, IMAGES = "meta", "loose_crop"
TEMPLATES_SUFFIX, PAIRS_SUFFIX, POINTS_SUFFIX = "_face_tid_mid.txt", "_template_pair_label.txt", "_name_5pts_score.txt"
PROBES_SUFFIX = "_1N_probe_mixed.csv"
NUM_POINTS = 10
"""Coordinates of the five landmarks."""

_BLOCK_BYTES = 2**22


@dataclass(frozen=True, kw_only=True, eq=False)
class Enrolled:
    """The templates of a gallery, or the probes, with a number for the subject of each."""

    template_E: NDArray[np.int64]
    """Indices into the templates of the set."""
    subject_E: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class IjbSet:
    """A set, read and checked. Templates are indices into `templates_T`, which holds their numbers in the files."""

    name: str
    images_url: str
    images: pa.Array
    """Names [N] below `images_url`."""
    marks: pa.Array
    """Size and mark of each image [N]: a changed image has another."""
    landmarks_NX: NDArray[np.float32]
    """x y of left eye, right eye, nose, mouth left, mouth right, in pixels of the image: ten numbers each."""
    score_N: NDArray[np.float32]
    """Score of the detector."""
    image_R: NDArray[np.int64]
    template_R: NDArray[np.int64]
    media_R: NDArray[np.int64]
    templates_T: NDArray[np.int64]
    a_P: NDArray[np.int32]
    b_P: NDArray[np.int32]
    same_P: NDArray[np.bool_]
    galleries: Mapping[str, Enrolled]
    """Galleries by the part of the file's name, such as G1. Empty if there are no galleries or no probes."""
    probes: Enrolled | None


def read_ijb(url: str) -> IjbSet:
    """Return the set in a folder.

    Raises:
        UserError: files are missing or malformed; they name images or templates that are not there.
    """
    folder, names, name = _meta(url)
    images_url = storage.join(url, IMAGES)
    rows = _read_text(storage.join(folder, name + TEMPLATES_SUFFIX), _TEMPLATE_COLUMNS, "image template media")
    if not len(rows):
        raise UserError(f"{storage.redacted(folder)}/{name}{TEMPLATES_SUFFIX} is empty: copy the set again")
    encoded = rows["image"].combine_chunks().dictionary_encode()
    images = encoded.dictionary
    templates_T, template_R = np.unique(rows["template"].to_numpy(), return_inverse=True)
    landmarks_NX, score_N = _points(storage.join(folder, name + POINTS_SUFFIX), images)
    pairs_url = storage.join(folder, name + PAIRS_SUFFIX)
    pairs = _read_text(pairs_url, _PAIR_COLUMNS, "template template label")
    a_P, b_P = (_placed(pairs[side], templates_T, pairs_url).astype(np.int32) for side in ("a", "b"))
    label_P = pairs["same"].to_numpy()
    if np.any((label_P != 0) & (label_P != 1)):
        raise UserError(f"{storage.redacted(pairs_url)}: a label is 1 for one person or 0, and some are neither")
    galleries, probes = _enrolled(folder, names, name, templates_T)
    return IjbSet(
        name=name,
        images_url=images_url,
        images=images,
        marks=_marks(images_url, images, storage.join(folder, name + TEMPLATES_SUFFIX)),
        landmarks_NX=landmarks_NX,
        score_N=score_N,
        image_R=encoded.indices.to_numpy().astype(np.int64),
        template_R=template_R.astype(np.int64),
        media_R=rows["media"].to_numpy(),
        templates_T=templates_T,
        a_P=a_P,
        b_P=b_P,
        same_P=label_P.astype(bool),
        galleries=galleries,
        probes=probes,
    )


_TEMPLATE_COLUMNS = {"image": pa.string(), "template": pa.int64(), "media": pa.int64()}
_PAIR_COLUMNS = {"a": pa.int32(), "b": pa.int32(), "same": pa.int8()}
_POINT_COLUMNS = {"image": pa.string(), **{f"p{n}": pa.float32() for n in range(NUM_POINTS)}, "score": pa.float32()}


def _meta(url: str) -> tuple[str, list[str], str]:
    """Return the folder of the text files, the names of its files, and the name of the set."""
    shown = storage.redacted(url)
    for folder in (storage.join(url, META), url):
        names = storage.children(folder)[0]
        found = [name.removesuffix(TEMPLATES_SUFFIX) for name in names if name.endswith(TEMPLATES_SUFFIX)]
        if len(found) > 1:
            raise UserError(f"{shown} holds several sets ({', '.join(found)}): give a folder that holds one of them")
        if found:
            missing = [found[0] + end for end in (PAIRS_SUFFIX, POINTS_SUFFIX) if found[0] + end not in names]
            if missing:
                raise UserError(f"{storage.redacted(folder)} lacks {' and '.join(missing)}: copy the whole set")
            return folder, names, found[0]
    raise UserError(
        f"{shown} is no folder of IJB-B or IJB-C: it has no {META}/*{TEMPLATES_SUFFIX}; give the folder that holds "
        f"{META}/ and {IMAGES}/"
    )


def _read_text(url: str, columns: Mapping[str, pa.DataType], line: str) -> pa.Table:
    """Return the lines of a file with fields separated by spaces, read a block at a time."""
    return _read(
        url,
        pa.csv.ReadOptions(column_names=list(columns), block_size=_BLOCK_BYTES, use_threads=False),
        pa.csv.ParseOptions(delimiter=" ", quote_char=False),
        pa.csv.ConvertOptions(column_types=columns),
        f"'{line}', parted by single spaces",
    )


def _read(
    url: str,
    read: pa.csv.ReadOptions,
    parse: pa.csv.ParseOptions,
    convert: pa.csv.ConvertOptions,
    line: str,
) -> pa.Table:
    convert.null_values, convert.strings_can_be_null = [], False
    try:
        with pa.csv.open_csv(pa.PythonFile(RangedFile(url), mode="r"), read, parse, convert) as batches:
            return pa.Table.from_batches(list(batches), schema=batches.schema)
    except pa.ArrowException as error:
        if "Empty CSV" in str(error):
            raise UserError(f"{storage.redacted(url)} is empty: copy the set again") from None
        raise UserError(f"{storage.redacted(url)}: a line is {line}: {str(error)[:200]}") from None


def _points(url: str, images: pa.Array) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return landmarks [N, 10] and score [N] of the images."""
    points = _read_text(url, _POINT_COLUMNS, "image x y x y x y x y x y score")
    place_N = pc.index_in(images, points["image"])
    if place_N.null_count:
        lost = images.filter(pc.is_null(place_N))
        raise UserError(
            f"{storage.redacted(url)} has no landmarks of {len(lost)} images of templates, such as {lost[0]}: copy the "
            "whole set"
        )
    values_NX = np.column_stack([points[name].to_numpy() for name in points.column_names[1:]])[place_N.to_numpy()]
    if not np.isfinite(values_NX).all():
        raise UserError(f"{storage.redacted(url)}: some landmarks or scores are not finite numbers: copy the set again")
    return np.ascontiguousarray(values_NX[:, :-1]), np.ascontiguousarray(values_NX[:, -1])


def _marks(images_url: str, images: pa.Array, named_in: str) -> pa.Array:
    """Return the size and the modification mark of each image."""
    names, marks = [], []
    for info in storage.list_files(images_url, skip_prefixes=(), in_order=False):
        names.append(info.path)
        marks.append(f"{info.num_bytes} {info.mark}")
    place_N = pc.index_in(images, pa.array(names, pa.string()))
    if place_N.null_count:
        lost = images.filter(pc.is_null(place_N))
        raise UserError(
            f"{len(lost)} of the {len(images)} images that {storage.redacted(named_in)} names are not in "
            f"{storage.redacted(images_url)}, such as {lost[0]}: copy the whole set"
        )
    return pa.array(marks, pa.string()).take(place_N)


def _placed(numbers: pa.ChunkedArray, templates_T: NDArray[np.int64], url: str) -> NDArray[np.int64]:
    """Return the index of each template."""
    number_X = numbers.to_numpy()
    place_X = np.minimum(np.searchsorted(templates_T, number_X), len(templates_T) - 1)
    is_lost_X = templates_T[place_X] != number_X
    if is_lost_X.any():
        lost = np.unique(number_X[is_lost_X])
        raise UserError(
            f"{storage.redacted(url)} names {len(lost)} templates that have no image in *{TEMPLATES_SUFFIX}, such as "
            f"{lost[0]}: copy the whole set"
        )
    return place_X.astype(np.int64)


def _enrolled(
    folder: str, names: Sequence[str], name: str, templates_T: NDArray[np.int64]
) -> tuple[dict[str, Enrolled], Enrolled | None]:
    """Return the galleries and the probes, both empty if either is missing."""
    matches = [re.fullmatch(rf"{re.escape(name)}_1N_gallery_(.+)\.csv", each) for each in names]
    files = {match[1]: match[0] for match in matches if match}
    if not files or name + PROBES_SUFFIX not in names:
        return {}, None
    files[""] = name + PROBES_SUFFIX
    read = {}
    for key, file in files.items():
        url = storage.join(folder, file)
        rows = _read_csv(url)
        read[key] = (url, _placed(rows.column(0), templates_T, url), rows.column(1).to_pylist())
    _, subject_X = np.unique([each for _, _, subjects in read.values() for each in subjects], return_inverse=True)
    ends = np.cumsum([len(subjects) for _, _, subjects in read.values()])[:-1]
    enrolled = {
        key: _one_subject_each(url, template_X, subject_X)
        for (key, (url, template_X, _)), subject_X in zip(read.items(), np.split(subject_X, ends), strict=True)
    }
    probes = enrolled.pop("")
    return enrolled, probes


def _read_csv(url: str) -> pa.Table:
    """Return the first two columns, template and subject."""
    return _read(
        url,
        pa.csv.ReadOptions(skip_rows=1, autogenerate_column_names=True, use_threads=False),
        pa.csv.ParseOptions(),
        pa.csv.ConvertOptions(column_types={"f0": pa.int64(), "f1": pa.string()}, include_columns=["f0", "f1"]),
        "'template,subject,…' after a header",
    )


def _one_subject_each(url: str, template_X: NDArray[np.int64], subject_X: NDArray[np.int64]) -> Enrolled:
    template_E, first_E, of_X = np.unique(template_X, return_index=True, return_inverse=True)
    subject_E = subject_X[first_E].astype(np.int64)
    if np.any(subject_E[of_X] != subject_X):
        raise UserError(f"{storage.redacted(url)}: a template has two subjects: copy the set again")
    return Enrolled(template_E=template_E, subject_E=subject_E)
