from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import UserError
from lib.evaluation.pair_files import parse_lfw_pairs, parse_pairs_table, read_pairs
from lib.evaluation.pairs import made_pairs, original_pairs

PHOTOS = [
    "Ann Lee/Ann Lee_0001.jpg",
    "Ann Lee/Ann Lee_0002.png",
    "Zoë_O'Neil/Zoë_O'Neil_0001.jpeg",
    "Zoë_O'Neil/Zoë_O'Neil_0012.jpg",
]
LFW_BODY = [
    "Ann Lee\t1\t2",
    "Ann Lee\t1\tZoë_O'Neil\t12",
    "Zoë_O'Neil\t1\t12",
    "Zoë_O'Neil\t1\tAnn Lee\t2",
]


def lfw(*lines):
    return "\n".join(lines).encode()


def listed(pairs):
    return list(zip(pairs.a_P.tolist(), pairs.b_P.tolist(), pairs.same_P.tolist(), strict=True))


def test_lfw_pairs_become_indices_whatever_the_extension():
    pairs = parse_lfw_pairs(lfw("2\t1", *LFW_BODY), PHOTOS, "pairs.txt")
    assert listed(pairs) == [(0, 1, True), (0, 3, False), (2, 3, True), (2, 1, False)]
    assert pairs.fold_P.tolist() == [0, 0, 1, 1]
    assert [array.dtype for array in (pairs.a_P, pairs.b_P, pairs.same_P, pairs.fold_P)] == [
        np.int64,
        np.int64,
        np.bool_,
        np.int16,
    ]
    assert (pairs.missing_photos, pairs.num_missing_pairs, pairs.note) == ((), 0, "")


def test_lfw_photos_are_found_in_a_folder_further_down():
    pairs = parse_lfw_pairs(lfw("2 1", *LFW_BODY), [f"lfw funneled/{photo}" for photo in PHOTOS], "pairs.txt")
    assert listed(pairs)[1] == (0, 3, False)


def test_lfw_header_of_one_number_is_dealt_into_folds_with_both_kinds():
    photos = [f"P{person}/P{person}_{n:04d}.jpg" for person in range(30) for n in (1, 2)]
    body = [f"P{person} 1 2" for person in range(30)] + [f"P{person} 1 P{(person + 1) % 30} 2" for person in range(30)]
    pairs = parse_lfw_pairs(lfw("30", *body), photos, "pairsDevTrain.txt")
    assert Counter(zip(pairs.fold_P.tolist(), pairs.same_P.tolist(), strict=True)) == {
        (fold, same): 3 for fold in range(10) for same in (True, False)
    }


def test_lfw_byte_order_mark_windows_line_ends_and_blank_lines_are_read():
    content = b"\xef\xbb\xbf" + "\r\n".join(["2\t1", *LFW_BODY, "", ""]).encode()
    assert len(parse_lfw_pairs(content, PHOTOS, "pairs.txt")) == 4


@pytest.mark.parametrize(
    "line",
    ["Ann Lee\t1", "Ann Lee\t1\tx", "Ann Lee\t1\t1", "Ann Lee\t1\tAnn Lee\t2", "a\t1\tb\t2\t3", "Ann Lee\t-1\t2"],
)
def test_malformed_lfw_lines_are_named_by_number(line):
    with pytest.raises(UserError, match=r"2 line\(s\) \(3, 5\) malformed"):
        parse_lfw_pairs(lfw("2\t1", LFW_BODY[0], line, LFW_BODY[2], line), PHOTOS, "pairs.txt")


@pytest.mark.parametrize("content", [b"", b"ten\t300", b"1 2 3", b"\xff\xfe1", b"Ann\t1\t2"])
def test_an_lfw_file_without_its_first_line_is_refused(content):
    with pytest.raises(UserError, match="line 1"):
        parse_lfw_pairs(content, PHOTOS, "pairs.txt")


@pytest.mark.parametrize("header", ["0 5", "2 0", "2 -1", "40000 1"])
def test_an_lfw_header_out_of_range_is_refused(header):
    with pytest.raises(UserError, match="line 1"):
        parse_lfw_pairs(lfw(header, *LFW_BODY), PHOTOS, "pairs.txt")


def test_an_lfw_file_cut_off_is_refused():
    with pytest.raises(UserError, match=r"promises 2 x 2 x 1 = 4 pairs, and 3 follow"):
        parse_lfw_pairs(lfw("2\t1", *LFW_BODY[:3]), PHOTOS, "pairs.txt")


def test_a_photo_of_two_extensions_is_ambiguous():
    with pytest.raises(UserError, match=r"Ann Lee_0001\.jpg.*Ann Lee_0001\.png"):
        parse_lfw_pairs(lfw("2\t1", *LFW_BODY), [*PHOTOS, "Ann Lee/Ann Lee_0001.png"], "pairs.txt")


def test_missing_photos_are_named_and_their_pairs_counted():
    pairs = parse_lfw_pairs(lfw("2\t1", *LFW_BODY), PHOTOS[:3], "pairs.txt")
    assert listed(pairs) == [(0, 1, True), (2, 1, False)]
    assert pairs.fold_P.tolist() == [0, 1]
    assert (pairs.missing_photos, pairs.num_missing_pairs) == (("Zoë_O'Neil/Zoë_O'Neil_0012",), 2)
    assert "2 of 4 pairs" in pairs.note


def test_pairs_without_a_single_photo_are_refused():
    with pytest.raises(UserError, match=r"none of its 4 pairs.*Ann Lee_0001"):
        parse_lfw_pairs(lfw("2\t1", *LFW_BODY), ["other.jpg"], "pairs.txt")


def parquet(columns):
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("yes", "no"), [("true", "false"), ("True", "False"), ("1", "0")])
def test_a_csv_of_pairs_is_read(yes, no):
    content = f'photo_a,photo_b,same,fold\n007,"a, b.jpg",{yes},x\n007,gone é.jpg,{no},x\n"a, b.jpg",008,{no},y\n'
    pairs = parse_pairs_table(content.encode(), ["a, b.jpg", "007", "008"], "p.csv")
    assert listed(pairs) == [(1, 0, True), (0, 2, False)]
    assert pairs.fold_P.tolist() == [0, 1]
    assert (pairs.missing_photos, pairs.num_missing_pairs) == (("gone é.jpg",), 1)


@pytest.mark.parametrize("same", [[True, False], [1, 0], [1.0, 0.0], pa.array([1, 0], pa.uint8())])
def test_a_parquet_of_pairs_is_read_and_dealt_into_folds(same):
    photos = [f"é {n}.jpg" for n in range(80)]
    content = parquet({"photo_a": photos[:40], "photo_b": photos[40:], "same": pa.concat_arrays([pa.array(same)] * 20)})
    pairs = parse_pairs_table(content, photos, "p.parquet", seed=5)
    assert pairs.same_P.tolist() == [True, False] * 20
    assert set(Counter(zip(pairs.fold_P.tolist(), pairs.same_P.tolist(), strict=True)).values()) == {2}
    again = parse_pairs_table(content, photos, "p.parquet", seed=5)
    np.testing.assert_array_equal(again.fold_P, pairs.fold_P)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"photo_a": ["a"], "photo_b": ["b"]}, "no column same"),
        ({"photo_a": ["a", "a"], "photo_b": ["b", "b"], "same": [1, 2]}, r"1 row\(s\) \(2\) where same is neither"),
        ({"photo_a": ["a", "a"], "photo_b": ["b", "b"], "same": ["maybe", "no"]}, r"1 row\(s\) \(1\) where same"),
        ({"photo_a": ["a", None], "photo_b": ["b", "b"], "same": [1, 0]}, r"1 row\(s\) \(2\) without photo_a"),
        ({"photo_a": ["a"] * 2, "photo_b": ["b"] * 2, "same": [None, True]}, r"1 row\(s\) \(1\) without same"),
        ({"photo_a": ["a"] * 2, "photo_b": ["b", "a"], "same": [0, 1]}, r"1 row\(s\) \(2\) pair a photo with itself"),
        ({"photo_a": [["a"]], "photo_b": ["b"], "same": [0]}, "must be text"),
        (
            {"photo_a": pa.array([], "string"), "photo_b": pa.array([], "string"), "same": pa.array([], "bool")},
            "0 pairs",
        ),
    ],
)
def test_bad_tables_are_refused_with_the_row(columns, message):
    with pytest.raises(UserError, match=message):
        parse_pairs_table(parquet(columns), ["a", "b"], "p.parquet")


@pytest.mark.parametrize(("url", "content"), [("p.parquet", b"PAR1 no"), ("p.csv", b""), ("p.csv", b"a,b\n1\n")])
def test_files_that_are_no_table_are_refused(url, content):
    with pytest.raises(UserError, match="cannot be read"):
        parse_pairs_table(content, ["a", "b"], url)


def test_files_are_read_by_their_suffix(tmp_path):
    folder = tmp_path / "my 'pairs' é"
    folder.mkdir()
    (folder / "pairs.txt").write_bytes(lfw("2\t1", *LFW_BODY))
    (folder / "pairs.csv").write_text(f"photo_a,photo_b,same\n{PHOTOS[0]},{PHOTOS[1]},1\n{PHOTOS[0]},{PHOTOS[3]},0\n")
    assert (
        listed(read_pairs(str(folder / "pairs.csv"), PHOTOS))
        == listed(read_pairs(str(folder / "pairs.txt"), PHOTOS))[:2]
    )
    with pytest.raises(UserError, match=r"not '\.json'"):
        read_pairs(str(folder / "pairs.json"), PHOTOS)
    with pytest.raises(UserError, match=r"years\.mat: the protocols of AgeDB are not read, .*: name agedb_30\.bin"):
        read_pairs(str(folder / "3_newSplits_30_years.mat"), PHOTOS)


@pytest.mark.real_photos
def test_the_pairs_of_lfw_are_all_found_among_its_photos(real_photos):
    root = real_photos / "lfw" / "photos"
    photos = sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
    pairs = read_pairs(str(real_photos / "lfw" / "pairs.txt"), photos)
    assert Counter(zip(pairs.fold_P.tolist(), pairs.same_P.tolist(), strict=True)) == {
        (fold, same): 300 for fold in range(5) for same in (True, False)
    }
    assert pairs.num_missing_pairs == 0
    people = [photo.split("/")[-2] for photo in photos]
    assert [people[a] == people[b] for a, b in zip(pairs.a_P, pairs.b_P, strict=True)] == pairs.same_P.tolist()


def people_of(counts):
    identities = [f"person {person}" for person, count in enumerate(counts) for _ in range(count)]
    return [f"{identity}/é {n}.jpg" for n, identity in enumerate(identities)], identities


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=4, max_size=40),
    num_pairs=st.integers(20, 400),
    seed=st.integers(0, 2**32),
)
def test_made_pairs_are_disjoint_half_and_half_and_never_repeat(counts, num_pairs, seed):
    counts = [2, 2, *counts]
    photos, identities = people_of(counts)
    pairs = made_pairs(photos, identities, num_pairs=num_pairs, num_folds=10, seed=seed)
    people_of_fold = {}
    for a, b, same, fold in zip(pairs.a_P, pairs.b_P, pairs.same_P, pairs.fold_P, strict=True):
        assert a != b
        assert (identities[a] == identities[b]) == same
        people_of_fold.setdefault(fold, set()).update((identities[a], identities[b]))
    assert sum(len(people) for people in people_of_fold.values()) == len(set().union(*people_of_fold.values()))
    assert len({frozenset(pair) for pair in zip(pairs.a_P.tolist(), pairs.b_P.tolist(), strict=True)}) == len(pairs)
    for fold in people_of_fold:
        assert 2 * np.count_nonzero(pairs.same_P & (pairs.fold_P == fold)) == np.count_nonzero(pairs.fold_P == fold)
    assert len(pairs) <= num_pairs
    assert bool(pairs.note) == (len(pairs) < num_pairs - num_pairs % 2 or len(people_of_fold) < 10)


def test_made_pairs_are_lfws_number_and_use_people_evenly():
    photos, identities = people_of([5] * 400 + [1] * 100 + [80] * 2)
    pairs = made_pairs(photos, identities, seed=0)
    assert (len(pairs), len(np.unique(pairs.fold_P)), pairs.note) == (6_000, 10, "")
    assert (np.bincount(pairs.fold_P) == 600).all()
    same_use = Counter(identities[a] for a in pairs.a_P[pairs.same_P])
    assert set(same_use.values()) <= {7, 8}  # 300 pairs of 40 or 41 people a fold
    either = np.concatenate([pairs.a_P[~pairs.same_P], pairs.b_P[~pairs.same_P]])
    different_use = Counter(identities[n] for n in either)
    assert len(different_use) == 502
    assert max(different_use.values()) <= 1.5 * 2 * 3_000 / 502


def test_made_pairs_of_one_dominating_person_fill_up_from_what_there_is():
    photos, identities = people_of([3_000, 3_000, *[1] * 40])
    pairs = made_pairs(photos, identities, num_pairs=600, num_folds=2, seed=1)
    assert len(pairs) == 600
    either = np.concatenate([pairs.a_P[~pairs.same_P], pairs.b_P[~pairs.same_P]])
    people = Counter(identities[n] for n in either)
    assert len(people) == 42


def test_made_pairs_depend_on_the_names_and_the_seed_but_not_on_the_order():
    photos, identities = people_of([4] * 60)
    shuffled = np.random.default_rng(0).permutation(len(photos))
    first = made_pairs(photos, identities, num_pairs=200, seed=3)
    second = made_pairs([photos[n] for n in shuffled], [identities[n] for n in shuffled], num_pairs=200, seed=3)
    np.testing.assert_array_equal(first.a_P, shuffled[second.a_P])
    np.testing.assert_array_equal(first.b_P, shuffled[second.b_P])
    other = made_pairs(photos, identities, num_pairs=200, seed=4)
    assert (other.a_P != first.a_P).any()


def test_made_pairs_of_small_data_are_all_there_are_and_say_so():
    photos, identities = people_of([2, 2, 2, 2])
    pairs = made_pairs(photos, identities, seed=0)
    assert len(pairs) == 8  # two folds of two people: two same pairs in each, and as many different ones
    assert "8 pairs in 2 folds were made, 6000 in 10 asked for: there are 4 people" in pairs.note


@pytest.mark.parametrize("counts", [[], [9], [2, 2, 2], [9, 1, 1, 1, 1]])
def test_too_few_people_for_two_folds_are_refused(counts):
    photos, identities = people_of(counts)
    with pytest.raises(UserError, match="too few to make pairs"):
        made_pairs(photos, identities, seed=0)


@pytest.mark.parametrize(("num_pairs", "num_folds"), [(100, 1), (19, 10), (0, 2)])
def test_too_few_pairs_for_the_folds_are_refused(num_pairs, num_folds):
    photos, identities = people_of([4] * 60)
    with pytest.raises(UserError, match="at least 2 folds"):
        made_pairs(photos, identities, num_pairs=num_pairs, num_folds=num_folds, seed=0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=12), st.integers(0, 2**32))
def test_the_originals_pairs_are_every_pair_of_a_person_and_as_many_of_two(counts, seed):
    counts = [2, *counts]
    photos, identities = people_of(counts)
    pairs = original_pairs(photos, identities, seed=seed)
    num_same = sum(count * (count - 1) // 2 for count in counts)
    assert len(pairs) == 2 * num_same
    same = {frozenset(pair) for pair in zip(pairs.a_P[:num_same].tolist(), pairs.b_P[:num_same].tolist(), strict=True)}
    assert len(same) == num_same == np.count_nonzero(pairs.same_P)
    assert [identities[a] == identities[b] for a, b in zip(pairs.a_P, pairs.b_P, strict=True)] == pairs.same_P.tolist()
    fold_of = {identities[a]: fold for a, fold in zip(pairs.a_P, pairs.fold_P, strict=True)}
    assert [fold_of[identities[a]] for a in pairs.a_P] == pairs.fold_P.tolist()


def test_the_originals_random_others_come_from_everybody_else_alike():
    photos, identities = people_of([40, 3, 7])
    pairs = original_pairs(photos, identities, seed=0)
    others = pairs.b_P[~pairs.same_P & (pairs.a_P < 40)]
    counts = np.bincount(others, minlength=50)[40:]
    assert (counts > 0.6 * len(others) / 10).all()


@pytest.mark.parametrize("counts", [[], [5], [1, 1, 1]])
def test_the_originals_pairs_need_two_people_and_two_photos_of_one(counts):
    photos, identities = people_of(counts)
    with pytest.raises(UserError, match="pairs need two people"):
        original_pairs(photos, identities, seed=0)


def test_a_pair_that_is_listed_again_counts_once_and_is_told(caplog):
    names = [f"{n}.jpg" for n in range(40)]
    rows = [f"{a},{b},{int(n < 10)}" for n, (a, b) in enumerate(zip(names[::2], names[1::2], strict=True))]
    turned = [",".join((b, a, same)) for a, b, same in (row.split(",") for row in rows)]
    once, thrice = (
        parse_pairs_table("\n".join(["photo_a,photo_b,same", *lines]).encode(), names, "x.csv")
        for lines in (rows, [*rows, *turned, *rows])
    )
    assert listed(once) == listed(thrice)
    assert "x.csv: 40 of 60 pairs are listed more than once: each counts once" in caplog.text


def test_lfw_pairs_that_are_listed_again_count_once():
    pairs = parse_lfw_pairs(
        lfw("2", "a 1 2", "a 2 1", "a 1 b 1", "b 1 a 1"), ["a/a_0001.jpg", "a/a_0002.jpg", "b/b_0001.jpg"], "x"
    )
    assert len(pairs) == 2
    assert pairs.same_P.tolist() == [True, False]


def test_a_pair_of_one_person_and_of_two_is_refused():
    content = b"photo_a,photo_b,same\na,b,1\nc,d,0\nb,a,0\n"
    with pytest.raises(UserError, match=r"x.csv: 1 row\(s\) \(3\) contradict an earlier row"):
        parse_pairs_table(content, ["a", "b", "c", "d"], "x.csv")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize(("yes", "no"), [("Yes", "no"), ("1", "0"), ("T", "F"), ("TRUE", "FALSE")])
def test_csv_of_spreadsheets_is_read(delimiter: str, yes: str, no: str) -> None:
    rows = [("photo_a", "photo_b", "same"), ("1.jpg", "2.jpg", yes), ("1.jpg", "3, x.jpg", no)]
    text = "\ufeff" + "".join(delimiter.join(f'"{field}"' for field in row) + "\r\n" for row in rows)
    pairs = parse_pairs_table(text.encode(), ["1.jpg", "2.jpg", "3, x.jpg"], "p.csv")
    assert pairs.same_P.tolist() == [True, False]
    assert pairs.b_P.tolist() == [1, 2]
