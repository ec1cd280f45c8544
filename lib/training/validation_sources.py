"""The validation people and the pairs of files. The driver reads them before any worker starts.

Nobody who is trained on is among them.

Shape suffixes: N rows of a table, M photos in pairs, P pairs.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lib import parts, storage
from lib.errors import UserError
from lib.evaluation.insightface_protocol import file_order_folds
from lib.evaluation.pair_files import read_pairs
from lib.evaluation.pairs import Pairs
from lib.evaluation.verification_sets import is_verification_set, read_verification_set
from lib.faces import table
from lib.training.cache_building import Only
from lib.training.face_names import READ_AHEAD, chosen_people, limited_identities, read_identities
from lib.training.set_cache import SetFaces
from lib.training.settings import TrainConfig

Ints = npt.NDArray[np.integer]

COLUMNS = ("photo", "identity", "status")


@dataclass(frozen=True, kw_only=True, eq=False)
class TableFaces:
    """Aligned faces of one version of a faces table."""

    url: str
    run_id: str | None
    splits: tuple[str, ...]
    only: Only | None = None
    """Which of them; None for all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairSet:
    """The pairs of a file."""

    name: str
    """Name for its columns in the history: `NAME_accuracy` and so on."""
    pairs: Pairs
    """Indices into the photos of the group."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairGroup:
    """Files of pairs over the same faces."""

    faces: TableFaces | SetFaces
    photos: pa.Array
    """Names [M] of the photos in the pairs. A photo that `faces` lacks has no aligned face; its pairs are errors."""
    people_M: Ints
    """The person of each; a photo without an identity is a person of its own."""
    sets: tuple[PairSet, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ValidationSources:
    """The validation data of a run."""

    people: TableFaces
    """The validation people."""
    groups: tuple[PairGroup, ...] = ()
    notes: tuple[str, ...] = ()
    """Lines for the user: pairs that are left out, and why."""


def own_people(config: TrainConfig, run_id: str | None) -> ValidationSources:
    """Return the people of the training table's split val who are validated on, and no files."""
    names = read_identities(config.faces_url, ["val"], run_id=run_id)
    only = None
    if len(names):
        people = names.unique().sort()
        labels_N = pc.index_in(names, people).to_numpy()
        chosen = chosen_people(labels_N, config.validation.val_photos, config.run.seed)
        only = Only(column="identity", names=people.take(pa.array(chosen)))
    return ValidationSources(people=TableFaces(url=config.faces_url, run_id=run_id, splits=("val",), only=only))


def read_sources(config: TrainConfig, success: dict, trained: pa.Array) -> ValidationSources:
    """Return what the flags name. `success` is of the training table, `trained` are the names of its people.

    Raises:
        UserError: a table or file does not exist or cannot be read, or a file has no pair that can be judged.
    """
    own = own_people(config, success["run_id"])
    validation = config.validation
    other = None
    if validation.val_faces is not None:
        other = table.read_success(validation.val_faces)
    notes = [] if other is None else _other_settings(success, other)
    people = own.people
    if validation.val_faces is not None and other is not None:
        has_own = bool(validation.pair_files) and len(read_identities(people.url, ["val"], run_id=people.run_id))
        if not has_own:
            people, left_out = _other_people(config, other, trained)
            notes += left_out
    names = dict(zip(column_names(validation.pair_files), validation.pair_files, strict=True))
    files = {name: file for name, file in names.items() if not is_verification_set(file)}
    groups = {name: _read_set(name, file) for name, file in names.items() if name not in files}
    if groups and "arcface" not in str(success["fingerprint"]):
        notes.append(f"{', '.join(groups)}: aligned to ArcFace's template, which the faces of training are not")
    if files:
        group, left_out = _read_group(config, other or success, trained, files)
        groups |= dict.fromkeys(files, group)
        notes += left_out
    in_order = tuple({id(groups[name]): groups[name] for name in names}.values())
    return ValidationSources(people=people, groups=in_order, notes=tuple(notes))


def _read_set(name: str, url: str) -> PairGroup:
    """Return the pairs of a set, in folds by the order of the file, as in its published figures."""
    from lib.evaluation.metrics import check_folds

    info = storage.file_info(url)
    same_P = read_verification_set(url).same_P
    num_pairs = len(same_P)
    place_P = 2 * np.arange(num_pairs)
    pairs = Pairs(a_P=place_P, b_P=place_P + 1, same_P=same_P, fold_P=file_order_folds(num_pairs))
    try:
        check_folds(pairs.same_P, pairs.fold_P)
    except UserError as error:
        raise UserError(f"--val-pairs {storage.redacted(url)}: {error}") from None
    return PairGroup(
        faces=SetFaces(url=url, num_bytes=info.num_bytes, mark=str(info.mark)),
        photos=pa.array([str(number) for number in range(2 * num_pairs)]),
        people_M=np.arange(2 * num_pairs),
        sets=(PairSet(name=name, pairs=pairs),),
    )


def _other_settings(success: dict, other: dict) -> list[str]:
    ours, theirs = (each["fingerprint"] for each in (success, other))
    different = sorted(name for name in {*ours, *theirs} - {"id"} if ours.get(name) != theirs.get(name))
    if not different:
        return []
    return [f"the faces of --val-faces were made with other settings than those of training ({', '.join(different)})"]


def _other_people(config: TrainConfig, other: dict, trained: pa.Array) -> tuple[TableFaces, list[str]]:
    """Return people of `--val-faces` who are not trained on, with at most `--val-photos` photos."""
    url, limit = str(config.validation.val_faces), config.validation.val_photos
    identities = read_identities(url, table.SPLITS, run_id=other["run_id"])
    is_trained = pc.is_in(identities, value_set=trained)
    new = identities.filter(pc.invert(is_trained))
    num_people, num_trained = len(identities.unique()), len(identities.filter(is_trained).unique())
    if len(new.unique()) < 2:
        raise UserError(
            f"--val-faces {storage.redacted(url)} shows {num_people} people, and training has {num_trained} of these "
            "names: name a table of other people, or give people of one name but not one person other names"
        )
    try:
        chosen = limited_identities(new, limit)
    except UserError:
        raise UserError(f"--val-photos {limit} holds no two people of --val-faces {storage.redacted(url)}") from None
    only = Only(column="identity", names=chosen)
    notes = []
    if num_trained:
        notes = [f"{num_trained} of the {num_people} people of --val-faces are trained on, and are not validated on"]
    return TableFaces(url=url, run_id=other["run_id"], splits=table.SPLITS, only=only), notes


def _read_group(
    config: TrainConfig, success: dict, trained: pa.Array, files: Mapping[str, str]
) -> tuple[PairGroup, list[str]]:
    """Return the pairs of the files, by the names of their columns, over the photos that they name."""
    url = config.validation.val_faces or config.faces_url
    rows, split_N = _read_rows(url, success)
    names = rows["photo"].to_pylist()
    is_trained_N = pc.is_in(rows["identity"], value_set=trained).to_numpy()
    sets, notes = [], []
    for name, file in files.items():
        pairs = read_pairs(file, names, seed=config.run.seed)
        pairs, note = _without_trained(pairs, is_trained_N, file)
        notes += [f"{name}: {each}" for each in (pairs.note, note) if each]
        sets.append(PairSet(name=name, pairs=pairs))
    used_M = np.unique(np.concatenate([rows_P for each in sets for rows_P in (each.pairs.a_P, each.pairs.b_P)]))
    photos = rows.take(pa.array(used_M))
    aligned = photos.filter(pc.and_(pc.equal(photos["status"], table.ALIGNED), pc.is_valid(photos["identity"])))
    if not len(aligned):
        raise UserError(
            f"not one photo in the pairs of {storage.redacted(next(iter(files.values())))} has an aligned face"
        )
    faces = TableFaces(
        url=url,
        run_id=success["run_id"],
        splits=tuple(table.SPLITS[split] for split in np.unique(split_N[used_M])),
        only=Only(column="photo", names=aligned["photo"].combine_chunks()),
    )
    group = PairGroup(
        faces=faces,
        photos=photos["photo"].combine_chunks(),
        people_M=_people(photos["identity"]),
        sets=tuple(dataclasses.replace(each, pairs=_placed(each.pairs, used_M)) for each in sets),
    )
    return group, notes


def _read_rows(url: str, success: dict) -> tuple[pa.Table, Ints]:
    """Return photo, identity and status of every row of a table, and its split as an index of SPLITS."""
    names = table.part_names(success, table.SPLITS)
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        read = list(
            pool.map(lambda name: storage.read_parquet(storage.join(url, name), table.columns(*COLUMNS)), names)
        )
    split_N = np.repeat([table.SPLITS.index(parts.split_in(name)) for name in names], [len(part) for part in read])
    return pa.concat_tables([part.select(COLUMNS) for part in read]), split_N


def _without_trained(pairs: Pairs, is_trained_N: npt.NDArray[np.bool_], file: str) -> tuple[Pairs, str]:
    """Return the pairs without people who are trained on, and a note about the others."""
    from lib.evaluation.metrics import check_folds

    kept_P = ~(is_trained_N[pairs.a_P] | is_trained_N[pairs.b_P])
    num_left = int(kept_P.sum())
    note = ""
    if num_left < len(kept_P):
        note = f"{len(kept_P) - num_left} of {len(kept_P)} pairs show people who are trained on, and are left out"
    kept = dataclasses.replace(
        pairs, a_P=pairs.a_P[kept_P], b_P=pairs.b_P[kept_P], same_P=pairs.same_P[kept_P], fold_P=pairs.fold_P[kept_P]
    )
    try:
        check_folds(kept.same_P, kept.fold_P)
    except UserError as error:
        raise UserError(f"--val-pairs {storage.redacted(file)}: {f'{note}; ' if note else ''}{error}") from None
    return kept, note


def _placed(pairs: Pairs, used_M: Ints) -> Pairs:
    return dataclasses.replace(
        pairs, a_P=np.searchsorted(used_M, pairs.a_P), b_P=np.searchsorted(used_M, pairs.b_P), missing_photos=()
    )


def _people(identities: pa.ChunkedArray) -> Ints:
    own = [f"\0{place}" if name is None else name for place, name in enumerate(identities.to_pylist())]
    return np.unique(own, return_inverse=True)[1]


def column_names(files: Sequence[str]) -> list[str]:
    """Return a name for the columns of each file: its own without suffix, after its folder's if two are alike.

    Raises:
        UserError: two files have one name, in folders of one name.
    """
    paths = [PurePosixPath(file.partition("?")[0]) for file in files]
    stems = [_plain(path.stem) for path in paths]
    alike = {stem for stem, count in Counter(stems).items() if count > 1}
    names = [
        f"{_plain(path.parent.name)}_{stem}" if stem in alike else stem for path, stem in zip(paths, stems, strict=True)
    ]
    if again := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"--val-pairs names two files that would both be called {again[0]!r}: rename one of them")
    return names


def _plain(name: str) -> str:
    return re.sub(r"[^0-9A-Za-z_.-]+", "_", name).strip("_") or "pairs"
