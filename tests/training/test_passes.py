"""Which stored features are computed again, and that passes give what `embed` gives, without augmentation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.recognition.model import EmbeddingModel, ModelSpec, embed
from lib.training.cache_building import build_cache
from lib.training.embedding_passes import EmbeddingPass, rows_to_refresh
from lib.training.face_cache import FaceCache
from lib.training.feature_shard import NEVER
from tests.training.learnable_faces import write_faces


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_missing_come_first_then_used_and_oldest_by_halves(data: st.DataObject) -> None:
    num = data.draw(st.integers(1, 60))
    stamps = np.array(data.draw(st.lists(st.integers(NEVER, 20), min_size=num, max_size=num)))
    used = np.array(sorted(data.draw(st.sets(st.integers(0, num - 1)))), np.int64)
    budget = data.draw(st.integers(0, num))
    rows = rows_to_refresh(stamps, used, budget)
    missing = set(np.flatnonzero(stamps == NEVER))
    assert len(set(rows)) == len(rows)
    assert missing <= set(rows)
    assert len(rows) == max(len(missing), min(budget, num))
    left = budget - len(missing)
    if left > 0:
        assert len(set(rows) & (set(used) | missing)) >= len(missing) + min(left // 2, len(set(used) - missing))


def test_the_oldest_are_refreshed_when_nothing_was_used() -> None:
    assert rows_to_refresh(np.array([5, 1, 9, 2]), np.array([], np.int64), 2).tolist() == [1, 3]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FaceCache:
    folder = tmp_path_factory.mktemp("faces")
    faces = write_faces(folder / "faces", people={"train": 9}, photos=9, broken=("person 1/“3”.jpg",))
    return FaceCache(build_cache(faces, ["train"], str(folder)))


def test_a_pass_embeds_the_crops_as_they_are(cache: FaceCache) -> None:
    torch.manual_seed(0)
    model = EmbeddingModel(ModelSpec(backbone="test_convnext", embedding_dim=8, image_size=32))
    how = EmbeddingPass(device=torch.device("cpu"), precision="fp32", num_threads=2)
    rows = np.random.default_rng(0).permutation(len(cache))
    parts = list(how.over(rows, cache, model))
    assert np.concatenate([part.rows_M for part in parts]).tolist() == rows.tolist()
    wanted = embed(model, cache.decode(rows, size=32)[0])
    np.testing.assert_allclose(np.concatenate([part.embeddings_MD for part in parts]), wanted, atol=1e-5)
    failed = np.concatenate([part.failed_M for part in parts])
    assert rows[failed].tolist() == [12]
    np.testing.assert_allclose(how.shared(rows, cache, model), wanted, atol=1e-5)
    assert model.training
