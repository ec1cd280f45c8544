from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.faces.splits import split_of
from lib.faces.table import SPLITS

IDENTITIES = [str(identity) for identity in range(20_000)]


@pytest.mark.parametrize("seed", [0, 1, 2026])
def test_shares_are_seventy_five_and_twenty_five(seed: int) -> None:
    counts = Counter(split_of(identity, seed) for identity in IDENTITIES)
    # Four standard deviations of a draw of 20,000.
    assert abs(counts["train"] / 20_000 - 0.70) < 0.013
    assert abs(counts["val"] / 20_000 - 0.05) < 0.0062
    assert abs(counts["test"] / 20_000 - 0.25) < 0.0123


def test_another_seed_splits_otherwise() -> None:
    same = sum(split_of(identity, 0) == split_of(identity, 1) for identity in IDENTITIES) / 20_000
    # Two independent draws agree with probability 0.70² + 0.05² + 0.25².
    assert abs(same - 0.555) < 0.015


def test_the_split_never_changes_between_versions() -> None:
    # A table made by an older version must not move a person from test to train.
    known = {"1": "train", "2": "test", "3": "train", "5": "test", "Zoë": "train", "名前": "train", "": "test"}
    assert {identity: split_of(identity, 0) for identity in known} == known


@given(identity=st.text(), seed=st.integers(0, 2**40))
def test_any_name_has_a_split_that_nothing_else_decides(identity: str, seed: int) -> None:
    first = split_of(identity, seed)
    split_of(identity + "x", seed + 1)
    assert split_of(identity, seed) == first
    assert first in SPLITS


def test_bytes_that_are_no_text_have_a_split() -> None:
    assert split_of(b"caf\xe9".decode("utf-8", "surrogateescape"), 0) in SPLITS
