"""The reader of `.bin` files: what is written in the wild, what is refused, and what damage does."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib import storage
from lib.errors import UserError
from lib.evaluation.verification_sets import parse_verification_set, read_verification_set
from tests.evaluation.drawn_sets import drawn_set, python_2_pickle, write_set

IMAGES = [bytes([n]) * (3 + 60 * n) for n in range(20)]
SAME = [n % 3 == 0 for n in range(10)]

IMAGE_FORMS = {
    "bytes": lambda image: image,
    "view": lambda image: np.frombuffer(image, np.uint8),
    "array": lambda image: np.array(list(image), np.uint8),
    "text": lambda image: image.decode("latin-1"),
}
BOOLEAN_FORMS = {
    "bools": lambda same: same,
    "NumPy bools": lambda same: [np.bool_(each) for each in same],
    "array": lambda same: np.array(same),
    "ints": lambda same: [int(each) for each in same],
}


@pytest.mark.parametrize("booleans", BOOLEAN_FORMS)
@pytest.mark.parametrize("images", IMAGE_FORMS)
@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_form_is_read(tmp_path: Path, protocol: int, images: str, booleans: str) -> None:
    content = ([IMAGE_FORMS[images](image) for image in IMAGES], BOOLEAN_FORMS[booleans](SAME))
    found = read_verification_set(write_set(tmp_path / "lfw é.bin", content, protocol))
    assert found.name == "lfw é"
    assert found.images == IMAGES
    assert found.same_P.tolist() == SAME


def test_a_file_of_numpy_1_is_read() -> None:
    content = pickle.dumps(([np.frombuffer(image, np.uint8) for image in IMAGES], SAME), 2)
    old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != content
    assert parse_verification_set(old, "lfw.bin").images == IMAGES


def test_a_file_of_python_2_is_read() -> None:
    found = parse_verification_set(python_2_pickle(IMAGES, SAME), "lfw.bin")
    assert found.images == IMAGES
    assert found.same_P.tolist() == SAME


def test_a_set_in_a_bucket_is_read(s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/a b/lfw.bin", pickle.dumps((IMAGES, SAME), 4))
    assert read_verification_set(f"{s3_bucket}/a b/lfw.bin").images == IMAGES


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


def refused(content: object, protocol: int = 4) -> str:
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
    with pytest.raises(UserError) as caught:
        parse_verification_set(data, "s3://user:sec-ret@b/lfw.bin")
    assert "sec-ret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_no_set_holds_is_named_and_refused(tmp_path: Path, protocol: int) -> None:
    told = refused(([Hostile(tmp_path / "ran")], [True]), protocol)
    assert f"{os.system.__module__}.system" in told
    assert not (tmp_path / "ran").exists()
    assert "NumPy array of type f8" in refused(([np.zeros(3)], [True]), protocol)
    assert "2 dimensions" in refused(([np.zeros((2, 2), np.uint8)], [True]), protocol)
    assert "EMPTY_DICT" in refused(([{}], [True]), protocol)
    assert "BINFLOAT" in refused((IMAGES, [0.5]), protocol)


def test_what_is_no_set_is_told() -> None:
    assert "not hold two lists" in refused([IMAGES, SAME, 1])
    assert "20 images for 9 pairs" in refused((IMAGES, SAME[1:]))
    assert "0 images for 0 pairs" in refused(([], []))
    assert "image 1 is not" in refused((["a", 5], [True]))
    assert "no list of booleans" in refused((IMAGES, [2] * 10))
    assert "no list of images" in refused((5, SAME))


def test_files_that_are_no_pickle_are_told(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\3\4 a zip file")
    (tmp_path / "empty.bin").write_bytes(b"")
    for name in ("pytorch_model.bin", "empty.bin"):
        with pytest.raises(UserError, match="is no verification set: it is no pickle"):
            read_verification_set(str(tmp_path / name))
    with pytest.raises(UserError, match="gone"):
        read_verification_set(str(tmp_path / "gone.bin"))


def test_a_place_far_away_takes_no_memory() -> None:
    """Python's reader in C would reserve 64 GB for this."""
    assert "no verification set" in refused(b"\x80\x02]r\xff\xff\xff\xff.")
    assert "cut off or damaged" in refused(b"\x80\x05\x96" + b"\xff" * 8 + b".")


FORMS = {
    **{f"protocol {n}": pickle.dumps((IMAGES, SAME), n) for n in range(2, 6)},
    **{f"arrays {n}": pickle.dumps(([np.array(list(i), np.uint8) for i in IMAGES], np.array(SAME)), n) for n in (2, 5)},
    "Python 2": python_2_pickle(IMAGES, SAME),
}


@pytest.mark.parametrize("form", FORMS)
def test_damage_gives_one_line_or_a_set(form: str) -> None:
    whole = FORMS[form]
    rng = np.random.default_rng(0)
    num_read = 0
    for number in range(200):
        data = bytearray(whole)
        if number % 4 == 0:
            del data[rng.integers(len(data)) :]
        else:
            # Half of the damage hits the opcodes, which are a small part of a file.
            places = [n for n, byte in enumerate(data) if n < 40 or byte > 80] if number % 2 else range(len(data))
            for _ in range(1 + number % 3):
                data[places[rng.integers(len(places))]] = rng.integers(256)
        try:
            found = parse_verification_set(bytes(data), "lfw.bin")
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
        else:
            num_read += 1
            assert len(found.images) == 2 * len(found)
    assert num_read < 200


def test_every_cut_is_told() -> None:
    whole = pickle.dumps((IMAGES[:4], SAME[:2]), 4)
    for end in range(len(whole)):
        assert "lfw.bin" in refused(whole[:end])


def test_a_set_of_drawn_images_is_read(tmp_path: Path) -> None:
    images, same = drawn_set(4)
    assert read_verification_set(write_set(tmp_path / "a.bin", (images, same))).images == images
