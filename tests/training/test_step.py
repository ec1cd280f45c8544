"""A worker's step: it never waits for the device, says where a loss is not finite, and adds batches up to one step."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib import device as devices
from lib.errors import JobError, UserError
from lib.recognition.compiling import repeated_blocks
from lib.recognition.model import ModelSpec
from lib.training.batches import StoredVectors, TrainingBatch
from lib.training.control import WorkerJob
from lib.training.first_checkpoint import begin
from lib.training.loading import BatchLoader, LoadTask
from lib.training.loop import Worker
from lib.training.objective import EpochSums
from lib.training.settings import TrainConfig
from lib.training.trial_runs import _run
from tests.training.learnable_faces import write_faces

CPU = torch.device("cpu")
WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "unique", "item")
"""Operations whose answer a GPU's program waits for."""
CONTROL: Any = SimpleNamespace(tell=SimpleNamespace(remote=lambda **_: None))


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_faces(folder / "faces", people={"train": 8}, photos=6)
    return folder


def made(faces: Path, tmp_path: Path, device: torch.device = CPU, **settings: Any) -> Worker:
    config = TrainConfig.of(
        **{
            "data": str(tmp_path),
            "faces": str(faces / "faces"),
            "cache_dir": str(faces),
            "backbone": "test_convnext",
            "init": "none",
            "batch_size": 24,
            "negatives": "random",
            "warmup_share": 0,
            **settings,
        }
    )
    spec = ModelSpec(backbone=config.backbone, embedding_dim=8, image_size=32)
    spec = begin(config, {"fingerprint": {}}, spec)
    job = WorkerJob(config=config, spec=spec, num_shards=0, use_gpu=device.type == "cuda")
    return Worker(job, CONTROL, device)


def batch_of(worker: Worker, number: int = 0, num_stored: int = 0) -> TrainingBatch:
    config = worker.config
    loader = BatchLoader(cache=worker.data.train, size=32, level="strong", seed=0, epoch=1, upload=worker.data.upload)
    rng = np.random.default_rng(number)
    shape = (3, 8) if config.sampling.batch == "triplets" else (6, 4)
    loaded = loader(LoadTask(rows=rng.integers(len(worker.data.train), size=shape), first_draw=24 * number))
    stored = None
    if num_stored:
        stored = StoredVectors(rng.normal(size=(num_stored, 8)).astype(np.float32), np.arange(num_stored) - 1)
    return TrainingBatch(loaded, stored)


class RefuseToWait(TorchDispatchMode):
    """Raises where an operation would have a GPU's program wait."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = function.name().removeprefix("aten::").split(".")[0]
        indices = arguments[1] if name.startswith("index") and len(arguments) > 1 else ()
        by_mask = isinstance(indices, list | tuple) and any(
            torch.is_tensor(each) and each.dtype == torch.bool for each in indices
        )
        if name in WAITING or by_mask:
            raise AssertionError(f"{function} waits for the device")
        return function(*arguments, **(named or {}))


CENTRES: dict[str, Any] = {"loss": "arcface+softmax", "sample_rate": 0.5, "sub_centers": 3}


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"loss": "semihard"}, {"batch": "triplets"}, {"precision": "bf16"}),
        *(CENTRES, {"loss": "adaface"}, {"loss": "cosface+triplet", "batch": "triplets"}),
    ],
    ids=lambda s: str(s),
)
def test_no_operation_of_a_step_waits_for_the_device(faces: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    worker = made(faces, tmp_path, **settings)
    worker.state.optimizer = torch.optim.AdamW(worker.state.model.parameters(), fused=True)  # as on GPUs
    sums = EpochSums(CPU, {})
    worker.step(batch_of(worker), sums, 1e-3)  # the first one makes the optimiser's state
    with RefuseToWait():
        worker.step(batch_of(worker, 1, num_stored=0 if "batch" in settings else 5), sums, 1e-3)
    worker.step.settle()
    assert worker.state.progress.step == 2
    assert sums.values()[1] == 48


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [{}, {"loss": "semihard"}, {"batch": "triplets"}, {"compile": "on"}, CENTRES, {"loss": "adaface"}],
    ids=lambda s: str(s),
)
def test_no_step_waits_for_a_gpu(faces: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    device = torch.device("cuda", 0)
    worker = made(faces, tmp_path, device, **settings)
    sums = EpochSums(device, {})
    try:
        worker.compile()
        batches = [batch_of(worker, n, num_stored=0 if "batch" in settings else 5) for n in range(8)]
        for batch in batches[:3]:
            worker.step(batch, sums, 1e-3)
        torch.cuda.set_sync_debug_mode("error")
        for batch in batches[3:]:
            worker.step(batch, sums, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        worker.close()
    worker.step.settle()
    assert worker.state.progress.step == 8
    assert np.isfinite(sums.values()).all()


def test_a_gradient_that_is_not_finite_names_its_step_before_anything_is_written(faces: Path, tmp_path: Path) -> None:
    worker = made(faces, tmp_path)
    worker.step(batch_of(worker), EpochSums(CPU, {}), 1e-3)
    with torch.no_grad():
        worker.state.model.head[0].bias.fill_(torch.nan)
    with pytest.raises(JobError, match=r"^the loss is not finite at step 2 \(epoch 1, learning rate 0.001\): "):
        worker.step(batch_of(worker, 1), EpochSums(CPU, {}), 1e-3)


def test_a_centre_that_is_not_finite_is_named_with_its_identity(faces: Path, tmp_path: Path) -> None:
    worker = made(faces, tmp_path, loss="arcface")
    assert worker.state.centres is not None
    worker.state.centres.centres_RSD[3] = torch.nan
    with pytest.raises(JobError, match=r"^the centre of identity 'person 3' is not finite at step 1 "):
        worker.step(batch_of(worker), EpochSums(CPU, {}), 1e-3)


def test_what_has_not_come_yet_is_looked_at_before_a_checkpoint(faces: Path, tmp_path: Path) -> None:
    worker = made(faces, tmp_path)
    late = SimpleNamespace(is_there=False, numpy=lambda: np.float32(np.nan))
    worker.step._norms.extend([("step 7", late)] * 2)  # type: ignore[list-item]
    worker.step._check_norms(max_left=2)
    with pytest.raises(JobError, match="not finite at step 7"):
        worker.step.settle()


def test_batches_that_are_added_up_make_one_step_with_the_mean_of_their_gradients(faces: Path, tmp_path: Path) -> None:
    gradients = []
    for accumulate in (False, True):
        worker = made(faces, tmp_path / str(accumulate), ema=0)
        first, second = batch_of(worker, 0), batch_of(worker, 1)
        kept: list[torch.Tensor] = []
        parameters = list(worker.state.model.parameters())

        def keep(_: float, parameters: list[Any] = parameters, kept: list[torch.Tensor] = kept) -> None:
            kept.extend([parameter.grad.clone() for parameter in parameters])

        worker.step._update = keep  # type: ignore[method-assign]
        sums = EpochSums(CPU, {})
        if accumulate:
            worker.step(first, sums, 1e-3, share=0.5, is_last=False)
            assert not kept
            worker.step(second, sums, 1e-3, share=0.5)
            gradients.append(kept)
        else:
            worker.step(first, sums, 1e-3)
            worker.state.optimizer.zero_grad()
            worker.step(second, sums, 1e-3)
            half = len(kept) // 2
            gradients.append([(a + b) / 2 for a, b in zip(kept[:half], kept[half:], strict=True)])
    for summed, mean in zip(*gradients, strict=True):
        torch.testing.assert_close(summed, mean)


@pytest.mark.parametrize(
    ("name", "num_blocks"), [("convnext_tiny", 18), ("vit_tiny_patch16_224", 12), ("resnet18", 8), ("vgg11", 0)]
)
def test_the_blocks_of_a_backbone_are_found(name: str, num_blocks: int) -> None:
    import timm

    with torch.device("meta"):
        assert len(repeated_blocks(timm.create_model(name, num_classes=0))) == num_blocks


def test_an_automatic_batch_is_the_usual_one_on_a_cpu_and_stays_what_it_was_found_to_be(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made(faces, tmp_path / "a", batch_size="auto").config.batch_size == 96
    monkeypatch.setattr(devices, "largest_batch", lambda *_, **__: 27)
    worker = made(faces, tmp_path / "b", batch_size="auto")
    assert worker.config.batch_size == 24, "people of 4 photos"
    progress = dataclasses.replace(worker.state.progress, step=1)
    worker.state.save(worker.config.run_url, progress, worker.state.suspects)
    monkeypatch.setattr(devices, "largest_batch", lambda *_, **__: 1000)
    job = WorkerJob(
        config=dataclasses.replace(worker.config, batch_size="auto"),
        spec=worker.state.model.spec,
        num_shards=0,
        use_gpu=False,
    )
    assert Worker(job, CONTROL, CPU).config.batch_size == 24
    with pytest.raises(UserError, match="memory holds no batch"):
        TrainConfig.of(data="d", batch_size="auto").with_batch_of(7)


def test_trial_runs_leave_the_model_as_it_was(faces: Path, tmp_path: Path) -> None:
    worker = made(faces, tmp_path, backbone="resnet18", batch_norm="batch")
    before = {name: tensor.clone() for name, tensor in worker.state.model.state_dict().items()}
    with worker.state.kept():
        _run(worker.state, worker.config, CPU, 8)
        assert not worker.state.model.state_dict()["backbone.bn1.running_mean"].equal(
            before["backbone.bn1.running_mean"]
        )
    for name, tensor in worker.state.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], msg=name)
    assert all(parameter.grad is None for parameter in worker.state.model.parameters())
