"""Splits that the user gives: shares, folders, lists, and people who must not be trained on."""

from pathlib import Path

import pytest

from lib.errors import UserError
from lib.faces.manifest import read_manifest
from lib.faces.preprocess_config import PreprocessConfig
from lib.faces.sources.opening import open_source
from lib.faces.splits import Splits, listed_splits, split_of


def place(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"never opened")


def splits_of(root: Path, splits: Splits, *exclude: Path) -> dict[str, str]:
    manifest = read_manifest(
        open_source(str(root)), None, splits=splits, identities_required=True, exclude=[str(path) for path in exclude]
    )
    return {row["photo"]: row["split"] for row in manifest.photos.to_pylist()}


def test_shares_are_the_users():
    names = [f"person {n}" for n in range(2000)]
    made = [split_of(name, 0, (95, 5, 0)) for name in names]
    assert set(made) == {"train", "val"}
    assert 60 < made.count("val") < 140
    assert {split_of(name, 0, (100, 0, 0)) for name in names} == {"train"}
    # A larger share of train keeps all who were in it.
    assert all(mine == "train" for name, mine in zip(names, made, strict=True) if split_of(name, 0) == "train")
    with pytest.raises(UserError, match=r"--split-shares is 90 5 0: three numbers of at least 0 that add up to 100"):
        PreprocessConfig(split_shares=(90, 5, 0))


def test_folders_decide_the_split(tmp_path):
    place(tmp_path / "p", "train/ada/1.jpg", "Valid/bob/1.jpg", "test/eve/1.jpg")
    assert splits_of(tmp_path / "p", Splits(level=1)) == {
        "train/ada/1.jpg": "train",
        "Valid/bob/1.jpg": "val",
        "test/eve/1.jpg": "test",
    }
    with pytest.raises(UserError, match=r"--split-from 2: the folder '\w+' of .* is no split; allowed are train"):
        splits_of(tmp_path / "p", Splits(level=2))


def test_a_list_decides_the_split(tmp_path):
    place(tmp_path / "p", "Ada L/1.jpg", "Ada L/2.jpg", "bob/1.jpg")
    (tmp_path / "splits.csv").write_text("Ada L,train\nbob/1.jpg\ttest\nAda L/2.jpg val\n")
    listed = listed_splits(str(tmp_path / "splits.csv"))
    assert splits_of(tmp_path / "p", Splits(listed=listed)) == {
        "Ada L/1.jpg": "train",
        "Ada L/2.jpg": "val",
        "bob/1.jpg": "test",
    }
    with pytest.raises(UserError, match=r"--split-from names neither bob/1\.jpg nor its identity 'bob'"):
        splits_of(tmp_path / "p", Splits(listed={"Ada L": "train"}))
    (tmp_path / "splits.csv").write_text("Ada L,train\nbob,holdout\n")
    with pytest.raises(UserError, match=r"line 2 is not \"identity split\""):
        listed_splits(str(tmp_path / "splits.csv"))


@pytest.mark.parametrize(
    "text", ["ada\t1\t2\nbob\t1\teve\t2\n", "photo_a,photo_b,same\nada/1.jpg,bob/1.jpg,0\n", "bob\nada\n"]
)
def test_people_of_a_test_set_are_left_out_of_training_and_counted(tmp_path, text, caplog):
    caplog.set_level("INFO")
    place(tmp_path / "p", "ada/1.jpg", "bob/1.jpg", "zoe/1.jpg")
    (tmp_path / "pairs.txt").write_text(text)
    made = splits_of(tmp_path / "p", Splits(shares=(100, 0, 0)), tmp_path / "pairs.txt")
    assert made == {"ada/1.jpg": "test", "bob/1.jpg": "test", "zoe/1.jpg": "train"}
    assert "names 2 of the 3 people here: they are left out of training" in caplog.text


def test_a_test_set_without_names_is_refused(tmp_path):
    place(tmp_path / "p", "ada/1.jpg")
    (tmp_path / "lfw.bin").write_bytes(b"\x80\x03]q\xff\xfe")
    with pytest.raises(UserError, match=r"lfw\.bin is no text: name a list of people, photos or pairs"):
        splits_of(tmp_path / "p", Splits(), tmp_path / "lfw.bin")
