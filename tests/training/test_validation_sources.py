"""What a run is judged by: pairs of files, people of another table, and nobody who is trained on."""

import csv
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lib.errors import UserError
from lib.evaluation.pair_files import read_pairs
from lib.faces.table import read_success
from lib.training.cache_building import NoFacesError, Only, build_cache
from lib.training.face_cache import FaceCache
from lib.training.face_names import read_identities
from lib.training.set_cache import SetFaces, build_set_cache
from lib.training.settings import TrainConfig
from lib.training.validation_sources import ValidationSources, column_names, read_sources
from tests.training.learnable_faces import crop, write_faces

PHOTOS = 4


def write_pairs(path: Path, people: range, *, photos: int = PHOTOS) -> str:
    """Write each person's photos as same pairs, and as many different pairs with the next person."""
    following = {person: people[(place + 1) % len(people)] for place, person in enumerate(people)}
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["photo_a", "photo_b", "same"])
        for person in people:
            for photo in range(1, photos):
                mine = f"person {person}/“0”.jpg"
                rows.writerow([mine, f"person {person}/“{photo}”.jpg", 1])
                rows.writerow([mine, f"person {following[person]}/“{photo}”.jpg", 0])
    return str(path)


def sources_of(config: TrainConfig) -> ValidationSources:
    config = config.with_absolute_paths()
    trained = read_identities(config.faces_url, ["train"]).unique().sort()
    return read_sources(config, read_success(config.faces_url), trained)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Make a table of six trained people, four of split val and four of split test."""
    folder = tmp_path / "it's data"
    write_faces(folder / "faces", people={"train": 6, "val": 4, "test": 4}, photos=PHOTOS, broken=())
    return folder


def test_a_number_files_and_both_are_understood() -> None:
    assert TrainConfig.of(data="d", val_pairs=400).validation.num_pairs == 400
    both = TrainConfig.of(data="d", val_pairs=("400", "/lfw/pairs.txt", "s3://b/cfp.csv")).validation
    assert both.num_pairs == 400
    assert both.pair_files == ("/lfw/pairs.txt", "s3://b/cfp.csv")
    assert TrainConfig.of(data="d", val_pairs=("/lfw/pairs.txt",)).validation.num_pairs == 20_000
    for wrong in (19, (), ("10", "a.txt"), ("400", "500"), ("a.txt", ""), -400, ("-400",)):
        with pytest.raises(UserError, match=r"--val-pairs is .*one or more files"):
            TrainConfig.of(data="d", val_pairs=wrong)


def test_pairs_of_a_file_are_those_that_evaluate_reads(data: Path) -> None:
    file = write_pairs(data / "pairs.csv", range(6, 14))
    (group,) = sources_of(TrainConfig.of(data=str(data), val_pairs=(file,))).groups
    (found,) = group.sets
    photos = [f"person {person}/“{photo}”.jpg" for person in range(14) for photo in range(PHOTOS)]
    expected = read_pairs(file, photos)
    names = np.array(group.photos.to_pylist())
    for ours_P, theirs_P in ((found.pairs.a_P, expected.a_P), (found.pairs.b_P, expected.b_P)):
        assert names[ours_P].tolist() == [photos[row] for row in theirs_P]
    assert found.pairs.fold_P.tolist() == expected.fold_P.tolist()
    assert found.name == "pairs"
    assert group.faces.splits == ("val", "test")
    assert len(set(group.people_M)) == 8


def test_a_cache_holds_the_photos_of_the_pairs_alone(data: Path) -> None:
    names = ["person 7/“1”.jpg", "person 11/“0”.jpg"]
    only = Only(column="photo", names=pa.array(names))
    path = build_cache(str(data / "faces"), ["val", "test"], str(data / "cache"), only=only)
    assert sorted(FaceCache(path).photos.to_pylist()) == sorted(names)
    assert path == build_cache(str(data / "faces"), ["val", "test"], str(data / "cache"), only=only)
    others = Only(column="photo", names=pa.array(names[:1]))
    assert path != build_cache(str(data / "faces"), ["val", "test"], str(data / "cache"), only=others)
    with pytest.raises(NoFacesError):
        build_cache(
            str(data / "faces"), ["val"], str(data / "cache"), only=Only(column="photo", names=pa.array(["no"]))
        )


def test_pairs_that_show_trained_people_are_left_out_and_counted(data: Path) -> None:
    file = write_pairs(data / "pairs.csv", range(4, 14))
    sources = sources_of(TrainConfig.of(data=str(data), val_pairs=(file,)))
    # Persons 4 and 5 are trained on, and 13 is compared with 4.
    assert len(sources.groups[0].sets[0].pairs) == 60 - 15
    assert "pairs: 15 of 60 pairs show people who are trained on, and are left out" in sources.notes
    trained = write_pairs(data / "trained.csv", range(6))
    with pytest.raises(UserError, match=r"trained.csv: 36 of 36 pairs show people who are trained on.*two are needed"):
        sources_of(TrainConfig.of(data=str(data), val_pairs=(trained,)))


def test_a_file_that_names_other_photos_is_refused_before_anything_starts(data: Path) -> None:
    file = write_pairs(data / "pairs.csv", range(20, 24))
    with pytest.raises(UserError, match="none of its 24 pairs has both photos here"):
        sources_of(TrainConfig.of(data=str(data), val_pairs=(file,)))
    with pytest.raises(UserError, match="nowhere"):
        sources_of(TrainConfig.of(data=str(data), val_pairs=(str(data / "nowhere.csv"),)))


def test_people_of_another_table_are_validated_on_save_those_who_are_trained_on(data: Path) -> None:
    write_faces(data / "others", people={"train": 8, "test": 2}, photos=PHOTOS)
    sources = sources_of(TrainConfig.of(data=str(data), val_faces=str(data / "others")))
    only = sources.people.only
    assert only is not None
    assert sorted(only.names.to_pylist()) == ["person 6", "person 7", "person 8", "person 9"]
    assert "6 of the 10 people of --val-faces are trained on, and are not validated on" in sources.notes
    write_faces(data / "all" / "faces", people={"train": 14}, photos=PHOTOS)
    with pytest.raises(UserError, match="shows 14 people, and training has 14 of these names"):
        sources_of(TrainConfig.of(data=str(data / "all"), val_faces=str(data / "faces")))


def test_other_faces_serve_the_file_where_training_has_people_of_its_own(data: Path) -> None:
    write_faces(data / "lfw", people={"test": 10}, photos=PHOTOS)
    file = write_pairs(data / "pairs.csv", range(6, 10))
    config = TrainConfig.of(data=str(data), val_faces=str(data / "lfw"), val_pairs=(file,))
    sources = sources_of(config)
    assert sources.people.url == str(data / "faces")
    assert sources.groups[0].faces.url == str(data / "lfw")
    write_faces(data / "whole" / "faces", people={"train": 6}, photos=PHOTOS)
    assert sources_of(config.replaced(data=str(data / "whole"))).people.url == str(data / "lfw")


def write_set(path: Path, people: range, *, photos: int = PHOTOS) -> str:
    """Write a set as InsightFace does: the pairs of `write_pairs`, of pictures that the file holds."""
    images, same = [], []
    for place, person in enumerate(people):
        for photo in range(1, photos):
            other = people[(place + 1) % len(people)]
            images += [crop(person, 0), crop(person, photo), crop(person, 0), crop(other, photo)]
            same += [True, False]
    path.write_bytes(pickle.dumps((images, same), protocol=2))
    return str(path)


def test_a_set_of_insightface_brings_its_own_images(data: Path) -> None:
    url = write_set(data / "lfw.bin", range(20, 30))
    file = write_pairs(data / "pairs.csv", range(6, 14))
    first, second = sources_of(TrainConfig.of(data=str(data), val_pairs=(url, file))).groups
    (found,) = first.sets
    assert (found.name, len(found.pairs), second.sets[0].name) == ("lfw", 60, "pairs")
    assert found.pairs.fold_P.tolist() == np.repeat(range(10), 6).tolist()
    assert isinstance(first.faces, SetFaces)
    path = build_set_cache(first.faces, str(data / "cache"))
    cache = FaceCache(path)
    assert cache.photos.to_pylist() == [str(number) for number in range(120)]
    assert bytes(cache.crop_bytes(3)) == crop(21, 1)
    assert build_set_cache(first.faces, str(data / "cache")) == path
    (data / "hostile.bin").write_bytes(pickle.dumps(Path("/")))
    with pytest.raises(UserError, match="is refused: it wants"):
        sources_of(TrainConfig.of(data=str(data), val_pairs=(str(data / "hostile.bin"),)))
    write_set(data / "short.bin", range(2))
    with pytest.raises(UserError, match="pairs of one kind only"):
        sources_of(TrainConfig.of(data=str(data), val_pairs=(str(data / "short.bin"),)))


def test_files_have_columns_by_their_names() -> None:
    assert column_names(["/lfw/pairs.txt", "s3://b/the cfp.csv?x=1"]) == ["pairs", "the_cfp"]
    assert column_names(["/lfw/pairs.txt", "/cfp fp/pairs.csv"]) == ["lfw_pairs", "cfp_fp_pairs"]
    with pytest.raises(UserError, match="both be called 'lfw_pairs'"):
        column_names(["/a/lfw/pairs.txt", "/b/lfw/pairs.txt"])


def test_a_secret_in_a_url_does_not_stand_in_the_configuration() -> None:
    config = TrainConfig.of(data="/d", val_pairs=("s3://key:secret@b/pairs.csv",), val_faces="s3://key:secret@b/lfw")
    content = config.content({"run_id": "r", "fingerprint": {}})
    assert "secret" not in str(content["val_pairs"]) + str(content["val_faces"])
