"""Draws of triplets and of people x photos, against plain loops over the same labels."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import UserError
from lib.training.triplets import IdentityBatchSampler, PhotoIndex, draw_triplets

# Two identities or more, at least one of them with two photos.
label_lists = st.lists(st.integers(0, 8), min_size=3, max_size=60).filter(
    lambda labels: 1 < len(set(labels)) < len(labels)
)


def labels_of(counts: list[int], seed: int = 0) -> np.ndarray:
    labels_N = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    return np.random.default_rng(seed).permutation(labels_N)


@settings(deadline=None)
@given(label_lists, st.integers(0, 2**32), st.integers(0, 5))
def test_a_triplet_is_two_photos_of_one_person_and_one_of_another(labels, seed, epoch):
    labels_N = np.array(labels, np.int32)
    triplets = draw_triplets(PhotoIndex(labels_N), 50, seed=seed, epoch=epoch)
    assert len(triplets) == 50
    assert (labels_N[triplets.anchors] == labels_N[triplets.positives]).all()
    assert (triplets.anchors != triplets.positives).all()
    assert (labels_N[triplets.anchors] != labels_N[triplets.negatives]).all()


def test_identities_serve_evenly_however_many_photos_they_have():
    labels_N = labels_of([2, 3, 200, 1])
    triplets = draw_triplets(PhotoIndex(labels_N), 30_000, seed=1)
    shares = np.bincount(labels_N[triplets.anchors], minlength=4) / 30_000
    np.testing.assert_allclose(shares, [1 / 3, 1 / 3, 1 / 3, 0], atol=0.02)
    photos_of_second = np.bincount(triplets.anchors, minlength=len(labels_N))[labels_N == 1]
    np.testing.assert_allclose(photos_of_second / photos_of_second.sum(), 1 / 3, atol=0.03)


def test_every_ordered_pair_of_photos_is_equally_likely():
    labels_N = labels_of([4, 1])
    triplets = draw_triplets(PhotoIndex(labels_N), 24_000, seed=2)
    pairs = collections.Counter(zip(triplets.anchors.tolist(), triplets.positives.tolist(), strict=True))
    assert set(pairs) == set(itertools.permutations(np.flatnonzero(labels_N == 0).tolist(), 2))
    np.testing.assert_allclose(np.array(list(pairs.values())) / 2000, 1, atol=0.12)


def test_the_same_epoch_draws_the_same_and_another_epoch_rank_or_seed_something_else():
    index = PhotoIndex(labels_of([5] * 40))

    def drawn(**changes: int) -> bytes:
        triplets = draw_triplets(index, 100, **{"seed": 7, "epoch": 3, "rank": 1, **changes})
        return np.stack([triplets.anchors, triplets.positives, triplets.negatives]).tobytes()

    assert drawn() == drawn()
    assert len({drawn(), drawn(epoch=4), drawn(rank=2), drawn(seed=8)}) == 4


@settings(deadline=None)
@given(label_lists, st.sets(st.integers(0, 59), max_size=5))
def test_excluded_rows_are_never_drawn(labels, excluded):
    labels_N = np.array(labels, np.int32)
    excluded = {row for row in excluded if row < len(labels)}
    try:
        index = PhotoIndex(labels_N, excluded_rows=excluded)
    except UserError:
        return
    triplets = draw_triplets(index, 40, seed=0)
    photos = index.draw_photos(index.pairable, 3, np.random.default_rng(0))
    drawn = {*triplets.anchors.tolist(), *triplets.positives.tolist(), *triplets.negatives.tolist()}
    assert not excluded & (drawn | set(photos.ravel().tolist()))


@pytest.mark.parametrize(
    ("labels", "said"), [([0, 0, 0], "show 1 identity"), ([0, 1, 2], "has two photos"), ([], "show 0 identity")]
)
def test_labels_that_give_no_triplet_are_refused_with_the_next_step(labels, said):
    with pytest.raises(UserError, match=said) as caught:
        PhotoIndex(np.array(labels, np.int32))
    assert "jobs/preprocess.py" in str(caught.value)


@settings(deadline=None)
@given(st.lists(st.integers(1, 7), min_size=4, max_size=12), st.integers(2, 6), st.integers(0, 1000))
def test_a_batch_holds_distinct_people_and_repeats_no_photo_before_all_were_taken(counts, num_photos, seed):
    labels_N = labels_of(counts, seed)
    if sum(count >= 2 for count in counts) < 2:
        return
    sampler = IdentityBatchSampler(index=PhotoIndex(labels_N), num_people=2, num_photos=num_photos, seed=seed)
    for rows_PK in sampler.batches(epoch=0, num_batches=3):
        assert rows_PK.shape == (2, num_photos)
        people_PK = labels_N[rows_PK]
        assert (people_PK == people_PK[:, :1]).all()
        assert people_PK[0, 0] != people_PK[1, 0]
        for rows_K in rows_PK:
            count = counts[labels_N[rows_K[0]]]
            for start in range(0, num_photos, count):
                part = rows_K[start : start + count]
                assert len(set(part.tolist())) == len(part)


def test_everyone_serves_once_before_anyone_serves_again():
    labels_N = labels_of([3] * 12)
    sampler = IdentityBatchSampler(index=PhotoIndex(labels_N), num_people=4, num_photos=2, seed=3)
    people = [labels_N[rows_PK[:, 0]] for rows_PK in sampler.batches(epoch=1, num_batches=6)]
    assert sorted(np.concatenate(people[:3]).tolist()) == list(range(12))
    assert sorted(np.concatenate(people[3:]).tolist()) == list(range(12))


def test_photos_of_a_batch_are_drawn_evenly_without_replacement():
    labels_N = labels_of([5, 5])
    sampler = IdentityBatchSampler(index=PhotoIndex(labels_N), num_people=2, num_photos=3, seed=4)
    subsets = collections.Counter(
        frozenset(rows_K.tolist()) for rows_PK in sampler.batches(0, 4000) for rows_K in rows_PK
    )
    assert len(subsets) == 20  # ten subsets of three of five photos, for two people
    np.testing.assert_allclose(np.array(list(subsets.values())) / 400, 1, atol=0.25)


def test_confusable_people_fill_their_share_nearest_first_and_nobody_comes_twice():
    labels_N = labels_of([3] * 20 + [1])
    sampler = IdentityBatchSampler(index=PhotoIndex(labels_N), num_people=8, num_photos=2, seed=5)

    def next_numbers(seeds_S: np.ndarray, *, num_neighbours: int) -> np.ndarray:
        return (seeds_S[:, None] + 1 + np.arange(num_neighbours)) % 20

    for rows_PK in sampler.batches(0, 50, next_numbers):
        people = labels_N[rows_PK[:, 0]].tolist()
        assert len(set(people)) == 8
        first, second = people[:2]
        wanted = [first, second, *(x for n in (1, 2, 3) for x in ((first + n) % 20, (second + n) % 20))]
        distinct = list(dict.fromkeys(wanted))
        assert people[: len(distinct)] == distinct


def test_seeds_are_known_ahead_and_a_later_start_draws_the_same_batches_without_asking_for_earlier_ones():
    labels_N = labels_of([3] * 20)
    sampler = IdentityBatchSampler(index=PhotoIndex(labels_N), num_people=8, num_photos=4, seed=5)
    asked: list[int] = []

    def next_numbers(seeds_S: np.ndarray, *, num_neighbours: int) -> np.ndarray:
        asked.extend(seeds_S.tolist())
        return (seeds_S[:, None] + 1 + np.arange(num_neighbours)) % 20

    whole = list(sampler.batches(3, 12, next_numbers))
    assert asked == sampler.seeds(3, 12).tolist()
    asked.clear()
    rest = list(sampler.batches(3, 12, next_numbers, first=7))
    assert asked == sampler.seeds(3, 12, first=7).tolist()
    np.testing.assert_array_equal(rest, whole[7:])


def test_neighbours_that_do_not_exist_or_have_no_second_photo_leave_room_for_others():
    labels_N = labels_of([3] * 10 + [1])
    sampler = IdentityBatchSampler(index=PhotoIndex(labels_N), num_people=6, num_photos=2, seed=6)

    def useless(seeds_S: np.ndarray, *, num_neighbours: int) -> np.ndarray:
        return np.tile([-1, 10, *seeds_S.tolist()], (len(seeds_S), 1))[:, :num_neighbours]

    for with_useless, without in zip(sampler.batches(0, 20, useless), sampler.batches(0, 20), strict=True):
        assert (labels_N[with_useless[:, 0]] == labels_N[without[:, 0]]).all()


@pytest.mark.parametrize(
    "changes", [{"num_people": 4}, {"num_people": 1}, {"num_photos": 1}, {"confusable_share": 1.0}]
)
def test_a_batch_that_cannot_be_filled_is_refused(changes):
    index = PhotoIndex(labels_of([2, 2, 3, 1]))
    with pytest.raises(UserError):
        IdentityBatchSampler(index=index, **{"num_people": 3, "num_photos": 2, "seed": 0, **changes})


def test_photos_of_single_people_take_places_in_a_batch_each_once_a_round():
    labels_N = np.concatenate([labels_of([3] * 4), np.arange(4, 14)]).astype(np.int32)
    index = PhotoIndex(labels_N)
    assert index.singles.tolist() == list(range(12, 22))
    assert index.num_places(2) == 4 + 5
    sampler = IdentityBatchSampler(index=index, num_people=3, num_photos=2, seed=0, with_singles=True)
    rows = np.stack(list(sampler.batches(1, 3)))
    singles = rows[rows >= 12]
    assert sorted(singles.tolist()) == list(range(12, 22))
    people = labels_N[rows[(rows < 12).all(axis=2)]]
    assert sorted(people[:, 0].tolist()) == [0, 1, 2, 3]
    assert (people[:, 0] == people[:, 1]).all()


def test_only_single_photos_will_do_where_no_pairs_are_needed():
    index = PhotoIndex(np.arange(9, dtype=np.int32), needs_pairs=False)
    sampler = IdentityBatchSampler(index=index, num_people=2, num_photos=4, seed=0, with_singles=True)
    (rows,) = sampler.batches(1, 1)
    assert len(set(rows.ravel().tolist())) == 8
