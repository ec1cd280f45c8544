"""The state of a run is the same after it was saved and loaded, and trains on to the same weights."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib import device as devices
from lib import storage
from lib.errors import UserError
from lib.recognition.model import EmbeddingModel, ModelSpec
from lib.training import checkpoint_parts, checkpoints, collective
from lib.training.batches import TrainingBatch
from lib.training.cache_building import build_cache
from lib.training.checkpoints import Progress
from lib.training.face_cache import FaceCache
from lib.training.loading import BatchLoader, LoadTask
from lib.training.objective import EpochSums
from lib.training.settings import TrainConfig
from lib.training.state import TrainingState
from lib.training.step import TrainingStep
from tests.training.learnable_faces import write_faces

CPU = torch.device("cpu")
NUM_PEOPLE = 8
SPEC = ModelSpec(backbone="test_convnext", embedding_dim=8, image_size=32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FaceCache:
    folder = tmp_path_factory.mktemp("data")
    write_faces(folder / "faces", people={"train": NUM_PEOPLE}, photos=6)
    return FaceCache(build_cache(str(folder / "faces"), ["train"], str(folder)))


def loaded(config: TrainConfig, num_photos: int, *, is_first: bool = True) -> TrainingState:
    checkpoint = checkpoints.load_newest(config.run_url)
    return TrainingState(
        config, SPEC, checkpoint, device=CPU, num_photos=num_photos, is_first=is_first, num_identities=NUM_PEOPLE
    )


def begun(config: TrainConfig, num_photos: int) -> TrainingState:
    torch.manual_seed(0)
    weights = EmbeddingModel(SPEC).state_dict()
    checkpoints.write(config.run_url, Progress(epoch=1), checkpoints.prefixed("model", weights))
    return loaded(config, num_photos)


def train(state: TrainingState, config: TrainConfig, cache: FaceCache, steps: range) -> None:
    loader = BatchLoader(cache=cache, size=32, level="none", seed=0, epoch=1, upload=devices.Upload(CPU))
    step = TrainingStep(state, config, cache.labels_N, device=CPU)
    for number in steps:
        rows = np.random.default_rng(number).integers(len(cache), size=(6, 4))
        batch = TrainingBatch(loader(LoadTask(rows=rows, first_draw=24 * number)), None)
        step(batch, EpochSums(CPU, {}), 1e-3)
    step.settle()


@pytest.mark.parametrize(
    "settings",
    [{}, {"ema": 0.0}, {"frozen_stages": 1}, {"loss": "adaface+softmax", "sub_centers": 2, "sample_rate": 0.9}],
    ids=str,
)
def test_a_state_that_was_saved_trains_on_to_the_same_weights(
    cache: FaceCache, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = TrainConfig.of(data=str(tmp_path), batch_size=24, **settings)
    state = begun(config, len(cache))
    train(state, config, cache, range(3))
    state.suspects.add(np.array([1]), np.array([9]), np.array([0.97]))
    state.save(config.run_url, state.progress, state.suspects)
    again = loaded(config, len(cache))
    assert again.progress == state.progress
    assert again.progress.step == 3
    assert state.usage.counts_3M.any()
    np.testing.assert_array_equal(again.usage.counts_3M, state.usage.counts_3M)
    assert len(again.suspects) == 1
    for each in (state, again):
        train(each, config, cache, range(3, 6))
    if state.centres is not None and again.centres is not None:
        assert torch.equal(again.centres.centres_RSD, state.centres.centres_RSD)
    for name, tensor in state.evaluated.state_dict().items():
        torch.testing.assert_close(again.evaluated.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_torch_draws_the_same_in_an_epoch_that_begins_again(cache: FaceCache, tmp_path: Path) -> None:
    state = begun(TrainConfig.of(data=str(tmp_path)), len(cache))
    state.seed_torch(seed=1, rank=0, first_step=0)
    first = torch.rand(3)
    state.seed_torch(seed=1, rank=0, first_step=0)
    assert torch.equal(torch.rand(3), first)
    state.seed_torch(seed=1, rank=1, first_step=0)
    assert not torch.equal(torch.rand(3), first)


def centres_of(folder: Path, cache: FaceCache) -> tuple[TrainConfig, TrainingState]:
    config = TrainConfig.of(data=str(folder), batch_size=24, loss="arcface")
    state = begun(config, len(cache))
    train(state, config, cache, range(2))
    state.save(config.run_url, state.progress, state.suspects)
    return config, state


def test_three_workers_go_on_with_the_centres_of_one(
    cache: FaceCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, state = centres_of(tmp_path, cache)
    assert state.centres is not None
    parts = []
    for rank in range(3):
        monkeypatch.setattr(collective, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(collective, "num_workers", lambda: 3)
        centres = loaded(config, len(cache), is_first=rank == 0).centres
        assert centres is not None
        parts.append(centres.centres_RSD)
    assert [len(part) for part in parts] == [2, 3, 3]
    assert torch.equal(torch.cat(parts), state.centres.centres_RSD)


@pytest.mark.parametrize("name", ["usage-000000", "centres-000000000000-000000000008"])
def test_a_checkpoint_is_not_there_before_all_its_parts_are(
    cache: FaceCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, state = centres_of(tmp_path, cache)
    real_write, written = storage.write_bytes, []

    def killed_before(url: str, data: bytes) -> None:
        if written and name in written[-1]:
            raise KeyboardInterrupt
        written.append(url)
        real_write(url, data)

    monkeypatch.setattr(storage, "write_bytes", killed_before)
    train(state, config, cache, range(2, 4))
    with pytest.raises(KeyboardInterrupt):
        state.save(config.run_url, state.progress, state.suspects)
    monkeypatch.setattr(storage, "write_bytes", real_write)
    folder = Path(config.run_url, checkpoints.FOLDER)
    assert len(list(folder.glob("*step-0000000004/*"))) == len(written)
    again = loaded(config, len(cache))
    assert again.progress.step == 2
    assert again.usage.counts_3M.sum() * 2 == state.usage.counts_3M.sum()
    checkpoints.remove_unfinished(config.run_url)
    assert not list(folder.glob("*step-0000000004"))
    assert loaded(config, len(cache)).progress.step == 2


def test_more_workers_than_identities_are_refused(
    cache: FaceCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = centres_of(tmp_path, cache)
    monkeypatch.setattr(collective, "num_workers", lambda: 9)
    with pytest.raises(UserError, match="9 workers share the centres of 8 identities: ask for at most --workers 8"):
        loaded(config, len(cache))


@pytest.mark.parametrize(("damage", "words"), [(b"half", "is damaged"), (None, "lacks the centres of identity 0")])
def test_a_part_that_is_damaged_or_missing_is_named_with_the_way_on(
    cache: FaceCache, tmp_path: Path, damage: bytes | None, words: str
) -> None:
    config, _ = centres_of(tmp_path, cache)
    part = next(Path(config.run_url, checkpoints.FOLDER).glob("*/centres-*"))
    if damage is None:
        part.unlink()
    else:
        part.write_bytes(damage)
    with pytest.raises(UserError, match=f"{words}.*and the run goes on from the checkpoint before"):
        loaded(config, len(cache))


def test_centres_of_old_checkpoints_go_and_those_of_unfinished_ones_too(cache: FaceCache, tmp_path: Path) -> None:
    config, state = centres_of(tmp_path, cache)
    assert state.centres is not None
    block = next(state.centres.blocks())
    checkpoint_parts.write_centres(
        config.run_url, dataclasses.replace(state.progress, step=3), block.start, block.tensors
    )
    for step in (4, 5, 6):
        progress = dataclasses.replace(state.progress, step=step)
        state.save(config.run_url, progress, state.suspects)
    folders = sorted(path.name for path in Path(config.run_url, checkpoints.FOLDER).iterdir() if any(path.glob("*")))
    assert folders == ["epoch-000001-step-0000000005", "epoch-000001-step-0000000006"]
