"""Lists of pairs as CALFW, CPLFW, AgeDB-30 and CFP have them, written by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lib import storage
from lib.errors import UserError
from lib.evaluation.pair_files import read_pairs
from lib.evaluation.pair_lists import list_names, parse_list, places_of
from lib.evaluation.pairs import Pairs


def listed(pairs: Pairs, photos: list[str]) -> list[tuple[str, str, bool]]:
    rows = zip(pairs.a_P, pairs.b_P, pairs.same_P, strict=True)
    return [(photos[a], photos[b], bool(same)) for a, b, same in rows]


CPLFW = """Zoë_O'Neil_1.jpg 1
Zoë_O'Neil_2.jpg 1
Al Lee_1.jpg 1
Al Lee_3.jpg 1
Al Lee_1.jpg 0
Zoë_O'Neil_2.jpg 0
Al Lee_3.jpg 0
Bo_1.jpg 0
"""


def test_a_pair_of_cplfw_is_two_lines(tmp_path: Path) -> None:
    (tmp_path / "pairs_CPLFW.txt").write_text(CPLFW)
    photos = [f"aligned images/{name}" for name in ("Al Lee_1.jpg", "Al Lee_3.jpg", "Bo_1.jpg", "Cy_1.jpg")]
    photos += [f"aligned images/Zoë_O'Neil_{n}.jpg" for n in (1, 2)]
    pairs = read_pairs(str(tmp_path / "pairs_CPLFW.txt"), photos)
    assert listed(pairs, [photo.partition("/")[2] for photo in photos]) == [
        ("Zoë_O'Neil_1.jpg", "Zoë_O'Neil_2.jpg", True),
        ("Al Lee_1.jpg", "Al Lee_3.jpg", True),
        ("Al Lee_1.jpg", "Zoë_O'Neil_2.jpg", False),
        ("Al Lee_3.jpg", "Bo_1.jpg", False),
    ]
    assert sorted(pairs.fold_P.tolist()) == [0, 0, 1, 1]
    arrow = read_pairs(str(tmp_path / "pairs_CPLFW.txt"), pa.chunked_array([photos[:2], photos[2:]]))
    np.testing.assert_array_equal(arrow.a_P, pairs.a_P)


def test_calfw_has_the_fold_of_its_same_pairs_alone(tmp_path: Path) -> None:
    rows = [(f"A{n}_0001.jpg", f"A{n}_0002.jpg", 1 + n // 3) for n in range(30)]
    rows += [(f"A{n}_0001.jpg", f"A{(n + 1) % 30}_0002.jpg", 0) for n in range(30)]
    lines = [f"{name} {label}" for a, b, label in rows for name in (a, b)]
    (tmp_path / "pairs_CALFW.txt").write_text("\r\n".join(lines) + "\r\n")
    photos = [f"A{n}_000{k}.jpg" for n in range(30) for k in (1, 2)]
    pairs = read_pairs(str(tmp_path / "pairs_CALFW.txt"), photos)
    assert pairs.same_P.tolist() == [True] * 30 + [False] * 30
    assert pairs.fold_P.tolist() == [n // 3 for n in range(30)] * 2


@pytest.mark.parametrize("line", ["{label} {a} {b}", "{a} {b} {label}", "{a}\t{b}\t{label}"])
def test_a_pair_of_agedb_is_one_line_with_the_label_first_or_last(tmp_path: Path, line: str) -> None:
    names = [f"{n}_MariaCallas_{20 + n}_f.jpg" for n in range(8)]
    photos = [f"AgeDB/{name}" for name in names]
    rows = [
        (f"agedb_30_112x112/{names[n % 8]}", f"agedb_30_112x112/{names[(n + 1 + n // 8) % 8]}", int(n % 2 == 0))
        for n in range(24)
    ]
    (tmp_path / "agedb_30_ann.txt").write_text("\n".join(line.format(a=a, b=b, label=label) for a, b, label in rows))
    here = [f"agedb_30_112x112/{name}" for name in names]
    pairs = read_pairs(str(tmp_path / "agedb_30_ann.txt"), here)
    assert listed(pairs, here) == [(a, b, bool(label)) for a, b, label in rows]
    # Each fold in the order of the file has both kinds.
    assert pairs.fold_P.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] + [4 + n // 2 for n in range(12)]
    with pytest.raises(UserError, match="none of its 24 pairs"):  # other folders of the same names
        read_pairs(str(tmp_path / "agedb_30_ann.txt"), photos)
    below = read_pairs(str(tmp_path / "agedb_30_ann.txt"), names)
    np.testing.assert_array_equal(below.a_P, pairs.a_P)


def write_cfp(protocol: Path, folds: int = 2) -> None:
    """Write the lists of 4 people with two frontal and two profile photos each, and two folds of both protocols."""
    for kind, folder in (("F", "frontal"), ("P", "profile")):
        lines = [
            f"{2 * person + n + 1} ../Data/Images/{person + 1:03d}/{folder}/0{n + 1}.jpg"
            for person in range(4)
            for n in range(2)
        ]
        storage.write_bytes(str(protocol / f"Pair_list_{kind}.txt"), "\n".join(lines).encode())
    for name in ("FF", "FP"):
        for fold in range(folds):
            first, other = 4 * fold + 1, 4 * fold + 3
            same = [f"{first},{first + 1}", f"{other},{other + 1}"]
            different = [f"{first},{other}", f"{first + 1},{other + 1}"]
            for file, rows in (("same.txt", same), ("diff.txt", different)):
                path = protocol / "Split" / name / f"{fold + 1:02d}" / file
                storage.write_bytes(str(path), ("\n".join(rows) + "\n").encode())


CFP_PHOTOS = [
    f"{person + 1:03d}/{folder}/0{n + 1}.jpg"
    for person in range(4)
    for folder in ("frontal", "profile")
    for n in range(2)
]


@pytest.mark.parametrize("root", ["", "Images/", "cfp dataset/Data/Images/"])
def test_cfp_has_a_folder_for_each_protocol(tmp_path: Path, root: str) -> None:
    write_cfp(tmp_path / "Protocol")
    photos = [f"{root}{name}" for name in CFP_PHOTOS]
    pairs = read_pairs(str(tmp_path / "Protocol" / "Split" / "FP"), photos)
    assert listed(pairs, CFP_PHOTOS)[:4] == [
        ("001/frontal/01.jpg", "001/profile/02.jpg", True),
        ("002/frontal/01.jpg", "002/profile/02.jpg", True),
        ("001/frontal/01.jpg", "002/profile/01.jpg", False),
        ("001/frontal/02.jpg", "002/profile/02.jpg", False),
    ]
    assert pairs.fold_P.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    frontal = read_pairs(str(tmp_path / "Protocol" / "Split" / "FF") + "/", photos)
    assert listed(frontal, CFP_PHOTOS)[0] == ("001/frontal/01.jpg", "001/frontal/02.jpg", True)


def test_cfp_in_a_bucket_is_read_like_a_local_one(tmp_path: Path, s3_bucket: str) -> None:
    write_cfp(tmp_path / "Protocol")
    for path in tmp_path.rglob("*.txt"):
        storage.write_bytes(f"{s3_bucket}/cfp ü/{path.relative_to(tmp_path)}", path.read_bytes())
    there = read_pairs(f"{s3_bucket}/cfp ü/Protocol/Split/FP", CFP_PHOTOS)
    here = read_pairs(str(tmp_path / "Protocol" / "Split" / "FP"), CFP_PHOTOS)
    assert listed(there, CFP_PHOTOS) == listed(here, CFP_PHOTOS)


def test_damaged_cfp_is_told_in_one_line(tmp_path: Path) -> None:
    write_cfp(tmp_path / "Protocol")
    split = tmp_path / "Protocol" / "Split" / "FP"
    (split / "02" / "diff.txt").write_text("1,2\n3,99\n")
    with pytest.raises(UserError, match=r"02/diff\.txt: 1 line\(s\) \(2\) malformed"):
        read_pairs(str(split), CFP_PHOTOS)
    (split / "02" / "diff.txt").unlink()
    with pytest.raises(UserError, match=r"02/diff\.txt"):
        read_pairs(str(split), CFP_PHOTOS)
    with pytest.raises(UserError, match="has no folders 01, 02"):
        read_pairs(str(tmp_path / "FF"), CFP_PHOTOS)


def test_of_several_photos_that_in_a_folder_named_as_the_lists_own_counts() -> None:
    photos = ["calfw/a/X_0001.jpg", "lfw/X/X_0001.jpg", "calfw/b/Y_0001.jpg", "lfw/Y/Y_0001.jpg"]
    assert places_of({"X_0001.jpg"}, photos, "/sets/calfw/pairs_CALFW.txt") == {"X_0001.jpg": 0}
    assert places_of({"X/X_0001.jpg"}, photos, "/lists/ann.txt") == {"X/X_0001.jpg": 1}
    assert places_of({"lfw/X/X_0001.jpg"}, photos, "/lists/ann.txt") == {"lfw/X/X_0001.jpg": 1}
    assert places_of({"far/away/lfw/Y/Y_0001.jpg"}, photos, "/lists/ann.txt") == {"far/away/lfw/Y/Y_0001.jpg": 3}
    assert places_of({"Z_0001.jpg", "other/X_0001.jpg"}, photos, "/lists/ann.txt") == {}
    with pytest.raises(UserError, match=r"'X_0001\.jpg' may be 'calfw/a/X_0001\.jpg' or 'lfw/X/X_0001\.jpg'"):
        places_of({"X_0001.jpg"}, photos, "/lists/pairs.txt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a.jpg 1\nb.jpg 1\nc.jpg 1\n", "and it has 3 lines: is the file cut off"),
        ("a.jpg 1\nb.jpg 0\n", r"1 line\(s\) \(1\) malformed: a pair is two lines"),
        ("a.jpg 1\nb.jpg 1\nc.jpg\nd.jpg 1\n", r"1 line\(s\) \(3\) malformed"),
        ("1 a.jpg b.jpg\n2 a.jpg c.jpg\n", r"1 line\(s\) \(2\) malformed: a line is '1 a.jpg b.jpg'"),
        ("1 a.jpg b.jpg\n0 b.jpg a.jpg\n", "contradict an earlier row"),
        ("1 a.jpg a.jpg\n", "pair a photo with itself"),
    ],
)
def test_damaged_lists_are_told_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(UserError, match=said):
        read_pairs(str(tmp_path / "list.txt"), ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])


@pytest.mark.parametrize("content", [b"10 300\na\t1\t2\n", b"", b"person 1 2\n", b"\xff\xfe.jpg\n", b"1 2 3"])
def test_other_files_are_left_to_the_reader_of_lfw(content: bytes) -> None:
    assert parse_list(content, "pairs.txt") is None


def test_lists_are_called_by_their_files() -> None:
    urls = ["/s/pairs_CPLFW.txt", "/s/agedb_30_ann.txt", "/lfw/pairs.txt", "/c/Protocol/Split/FP/", "/s/own.csv"]
    assert list(list_names(urls).values()) == ["CPLFW", "agedb_30", "lfw", "cfp_fp", "own"]
    with pytest.raises(UserError, match="two lists that are called 'own'"):
        list_names(["/a/own.csv", "/b/own.csv"])
