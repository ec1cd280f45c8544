"""`--recipe`: what it picks from the table and the weights, and that flags which were given hold."""

import json
from pathlib import Path

import numpy as np
import pytest

from lib.errors import UserError
from lib.recognition.model import ModelSpec
from lib.training import checkpoints
from lib.training.checkpoints import Progress
from lib.training.first_checkpoint import begin
from lib.training.recipe import TableCounts, all_settings, of_stage, stage_of, with_recipe
from lib.training.settings import TrainConfig
from lib.tuning.winner import given_names, train_defaults

FEW, MANY = TableCounts(photos=3_000, people=500), TableCounts(photos=500_000, people=10_000)


def recipe_of(counts: TableCounts, **settings: object) -> TrainConfig:
    return with_recipe(TrainConfig.of(data="d", recipe="auto", **settings), counts)


@pytest.mark.parametrize(
    ("counts", "init", "name", "why"),
    [
        (FEW, "auto", "fine-tune", "500 people with 6.0 photos each are few"),
        (MANY, "auto", "centers", "10,000 people with 50.0 photos each are many"),
        (MANY, "/runs/first", "fine-tune", "/runs/first knows faces"),
        (MANY, "weights.safetensors", "centers", "are many"),
        (TableCounts(photos=40_000, people=20_000), "none", "fine-tune", "no weights"),
    ],
)
def test_what_is_picked_and_why(counts: TableCounts, init: str, name: str, why: str) -> None:
    staged = recipe_of(counts, init=init).staged
    assert staged is not None
    assert staged.name == name
    assert staged.reason.startswith(f"{name}: ")
    assert why in staged.reason


def test_published_weights_of_faces_are_fine_tuned() -> None:
    staged = recipe_of(MANY, init="backbone.pth", backbone="iresnet50").staged
    assert staged is not None
    assert "backbone.pth knows faces" in staged.reason


def test_centres_come_before_the_softmax_and_are_sampled_where_they_are_very_many() -> None:
    config = recipe_of(MANY, epochs=10)
    before, after = (of_stage(config, Progress(epoch=epoch)) for epoch in (7, 8))
    assert (before.objective.loss, before.sampling.batch, before.objective.sample_rate) == ("arcface", "photos", 1.0)
    assert (after.objective.loss, after.sampling.batch) == ("softmax", "identities")
    assert [stage_of(config, epoch) for epoch in range(1, 12)] == [0] * 7 + [1] * 4
    huge = recipe_of(TableCounts(photos=10_000_000, people=500_000))
    assert of_stage(huge, Progress(epoch=1)).objective.sample_rate == 0.1
    assert of_stage(huge, Progress(epoch=30)).objective.sample_rate == 1.0


def test_stages_are_frozen_first_where_the_weights_are_pretrained() -> None:
    config = recipe_of(FEW, epochs=10)
    assert of_stage(config, Progress(epoch=2, may_freeze=True)).model.frozen_stages == 3
    assert of_stage(config, Progress(epoch=3, may_freeze=True)).model.frozen_stages == 0
    assert of_stage(config, Progress(epoch=2)).model.frozen_stages == 0


def test_flags_that_were_given_hold_in_every_stage() -> None:
    given = given_names(["--loss=softmax", "--no-normalize", "--train.model.frozen-stages", "2", "x"])
    assert given == ("frozen_stages", "loss", "normalize")
    config = recipe_of(FEW, given=given, frozen_stages=2, loss="softmax", epochs=10)
    assert [each.model.frozen_stages for each in all_settings(config)] == [2]
    assert "from epoch 1 batch identities" in config.staged.reason  # type: ignore[union-attr]
    many = recipe_of(MANY, given=("loss",), loss="softmax")
    with pytest.raises(UserError, match="--batch photos with --loss softmax"):
        all_settings(many)
    assert train_defaults(["--recipe", "auto", "--batch", "identities"]).given == ("batch", "recipe")


def test_one_epoch_and_no_recipe_have_one_stage() -> None:
    assert len(all_settings(recipe_of(FEW, epochs=1))) == 1
    assert len(all_settings(recipe_of(MANY, epochs=1))) == 1
    config = with_recipe(TrainConfig(data="d"), MANY)
    assert config.staged is None
    assert "stages" not in config.content({"run_id": "r", "fingerprint": {}})
    assert of_stage(config, Progress(epoch=9)) is config


def test_the_configuration_says_what_was_picked_and_stays_the_same_when_read_again() -> None:
    content = recipe_of(MANY, epochs=10).content({"run_id": "r", "fingerprint": {}})
    assert content["recipe"] == "auto"
    assert "are many" in content["recipe_reason"]
    assert json.loads(json.dumps(content)) == content
    assert "given" not in content


@pytest.mark.parametrize("init", ["none", "model"])
def test_random_weights_are_never_frozen(tmp_path: Path, init: str) -> None:
    from lib.recognition.model import EmbeddingModel, save_model

    spec = ModelSpec(backbone="test_convnext", embedding_dim=8, image_size=32)
    save_model(EmbeddingModel(spec), str(tmp_path / "model"))
    config = TrainConfig.of(
        data=str(tmp_path), recipe="fine-tune", init=str(tmp_path / init) if init == "model" else init
    )
    begin(with_recipe(config, FEW), {"fingerprint": {}}, spec)
    progress = checkpoints.newest_progress(config.run_url)
    assert progress is not None
    assert progress.may_freeze == (init == "model")
    assert np.isfinite(progress.lr)
