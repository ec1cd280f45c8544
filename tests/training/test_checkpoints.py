"""Checkpoints: what is written is read, the newest whole one counts, and a failed write harms none."""

import json
from pathlib import Path

import pytest
import torch

from lib import storage
from lib.errors import JobError, UserError
from lib.training import checkpoints
from lib.training.checkpoints import Progress

TENSORS = {"model/weight": torch.arange(6.0).reshape(2, 3), "usage": torch.ones(3, 5, dtype=torch.int32)}


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "it's a run")


def names(run: str) -> list[str]:
    return sorted(info.path for info in storage.list_files(storage.join(run, checkpoints.FOLDER)))


def test_what_is_written_is_read(run: str) -> None:
    progress = Progress(epoch=3, anchors_done=96, step=17, negatives="hard", best=0.9, sums={"loss": 1.25})
    checkpoints.write(run, progress, TENSORS)
    loaded = checkpoints.load_newest(run)
    assert loaded.progress == progress == checkpoints.newest_progress(run)
    assert loaded.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(loaded.tensors[name], TENSORS[name]) for name in TENSORS)


def test_the_newest_counts_and_two_stay(run: str) -> None:
    for epoch, step in ((1, 0), (1, 90), (2, 100), (10, 1000)):
        checkpoints.write(run, Progress(epoch=epoch, step=step), TENSORS)
    assert len(names(run)) == 2
    assert checkpoints.newest_progress(run) == Progress(epoch=10, step=1000)


def test_a_folder_without_checkpoints_has_no_progress_and_cannot_be_loaded(run: str) -> None:
    assert checkpoints.newest_progress(run) is None
    with pytest.raises(UserError, match="does not see the checkpoints"):
        checkpoints.load_newest(run)


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 100, b"\x02" + bytes(7) + b"{}"])
def test_a_damaged_one_gives_way_to_the_one_before(run: str, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints.write(run, Progress(epoch=1, step=5), TENSORS)
    checkpoints.write(run, Progress(epoch=2, step=9), TENSORS)
    damaged = storage.join(run, checkpoints.FOLDER, names(run)[-1])
    storage.write_bytes(damaged, content)
    loaded = checkpoints.load_newest(run)
    assert loaded.progress.step == 5
    assert checkpoints.newest_progress(run) == loaded.progress
    assert "is damaged" in caplog.text


def test_a_cut_off_one_is_damaged(run: str) -> None:
    checkpoints.write(run, Progress(epoch=1), TENSORS)
    url = storage.join(run, checkpoints.FOLDER, names(run)[0])
    storage.write_bytes(url, storage.read_bytes(url)[:-4])
    with pytest.raises(UserError, match="remove that folder"):
        checkpoints.load_newest(run)


def test_a_write_that_fails_is_tried_again_and_harms_none(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.write(run, Progress(epoch=1), TENSORS)
    pauses: list[float] = []
    monkeypatch.setattr(checkpoints.time, "sleep", pauses.append)
    real_write = storage.write_bytes

    def fail(url: str, data: bytes) -> None:
        raise JobError("the disk is full")

    monkeypatch.setattr(storage, "write_bytes", fail)
    with pytest.raises(JobError, match="the disk is full; the earlier one is intact"):
        checkpoints.write(run, Progress(epoch=2), TENSORS)
    assert pauses == [5.0, 10.0]
    assert checkpoints.newest_progress(run) == Progress(epoch=1)

    def fail_once(url: str, data: bytes) -> None:
        monkeypatch.setattr(storage, "write_bytes", real_write)
        raise JobError("gone for a moment")

    monkeypatch.setattr(storage, "write_bytes", fail_once)
    checkpoints.write(run, Progress(epoch=2), TENSORS)
    assert checkpoints.newest_progress(run) == Progress(epoch=2)


def test_an_optimiser_goes_on_where_it_was() -> None:
    def trained(steps: int, after: torch.optim.Optimizer | None = None) -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for _ in range(steps):
            layer(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer, optimizer

    straight, _ = trained(4)
    layer, optimizer = trained(2)
    other = torch.optim.AdamW(layer.parameters(), lr=0.1)
    flat = checkpoints.flat_optimizer(optimizer)
    assert all(torch.is_tensor(value) for value in flat.values())
    checkpoints.restore_optimizer(other, flat)
    for _ in range(2):
        layer(torch.ones(1, 3)).square().sum().backward()
        other.step()
        other.zero_grad()
    assert torch.equal(layer.weight, straight.weight)


def test_the_state_is_plain_json(run: str) -> None:
    checkpoints.write(run, Progress(epoch=4), TENSORS)
    data = storage.read_bytes(storage.join(run, checkpoints.FOLDER, names(run)[0]))
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(head["__metadata__"]["state"])["epoch"] == 4


def test_prefixes_part_and_join_tensors() -> None:
    assert checkpoints.without_prefix("a", {**checkpoints.prefixed("a", TENSORS), "b/x": torch.ones(1)}) == TENSORS
