"""What is checked of embeddings before they are measured."""

import numpy as np
import pytest

from lib.errors import UserError
from lib.evaluation.model_metrics import check_embedded
from lib.recognition.embeddings_table import Embeddings


def embeddings(statuses: list[str]) -> Embeddings:
    num = len(statuses)
    return Embeddings(
        photos=[f"{n}.jpg" for n in range(num)],
        identities=["a"] * num,
        statuses=statuses,
        splits=["test"] * num,
        boxes_N4=np.zeros((num, 4)),
        embeddings_ND=np.zeros((num, 2), np.float32),
        failed_N=np.array([status != "aligned" for status in statuses]),
        model={},
        fingerprint={},
    )


def test_photos_that_all_failed_are_counted_by_their_statuses() -> None:
    """The photos were moved while they were read; the finished folder would otherwise be taken for good."""
    with pytest.raises(UserError, match=r"none of the 3 photos .*\(2 missing, 1 no_face\).*remove '/data/emb'"):
        check_embedded(embeddings(["missing", "no_face", "missing"]), "/data/emb")


def test_one_face_is_enough_to_go_on() -> None:
    check_embedded(embeddings(["missing", "aligned"]), "/data/emb")
