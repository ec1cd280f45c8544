"""Which trials follow from the flags of a sweep, and which flags are refused."""

import itertools
from typing import Any

import pytest

from lib.errors import UserError
from lib.training.settings import TrainConfig
from lib.tuning.settings import SweepConfig, plan_trials


def test_every_combination_is_a_trial_with_a_name_of_its_own() -> None:
    config = SweepConfig(
        backbones=("a", "b,c"), heads=("128", "256,64"), normalizations=("yes,no",), lrs=("1e-3",), train=TrainConfig()
    )
    trials = plan_trials(config)
    found = [
        (t.config.backbone, t.config.model.head, t.config.model.embedding_dim, t.config.model.normalize) for t in trials
    ]
    heads = (("128", 128), ("256,64", 64))
    assert found == [(a, *head, n) for a, head, n in itertools.product("abc", heads, (True, False))]
    assert len({trial.name for trial in trials}) == 12
    assert trials[3].name == "004-a-head256,64-raw"
    assert all(trial.config.lr == 1e-3 and trial.config.workers == (1,) for trial in trials)
    assert all(trial.config.run_url.endswith(f"/sweeps/default/runs/{trial.name}") for trial in trials)


def test_random_negatives_are_tried_once_whatever_the_candidates() -> None:
    config = SweepConfig(
        policies=("random", "hard"), candidate_counts=("200,2000",), train=TrainConfig.of(batch="triplets")
    )
    found = [(trial.config.mining.negatives, trial.config.mining.candidates) for trial in plan_trials(config)]
    assert found == [("random", 200), ("hard", 200), ("hard", 2000)]


def test_a_draw_of_combinations_follows_from_the_seed() -> None:
    def drawn(seed: int) -> list[tuple[str, float]]:
        train = TrainConfig.of(seed=seed)
        config = SweepConfig(backbones=("a,b,c",), lrs=("1e-3,2e-3,3e-3",), max_trials=4, train=train)
        return [(trial.config.backbone, trial.config.lr) for trial in plan_trials(config)]

    assert len(set(drawn(0))) == 4
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": {"epochs": 0}}, "--epochs is 0: 1 or more"),
        ({"min_epochs": 31}, "--min-epochs is 31: 0 to --epochs 30"),
        ({"keep_one_in": 1}, "--keep-one-in is 1"),
        ({"train": {"workers": (2,)}}, "--workers is (2,): 1: a trial has one worker"),
        ({"train": {"from_sweep": "x"}}, "--from-sweep"),
        ({"lrs": ("1e-3,fast",)}, "--lrs is 1e-3,fast: values such as 0.0009"),
        ({"lrs": ("0",)}, "--lr is 0.0: above 0"),
        ({"normalizations": ("maybe",)}, "--normalizations is maybe: values such as"),
        ({"heads": ("128,x",)}, "--head is '128,x'"),
        ({"policies": ("nearest",)}, "--policies has 'nearest': allowed are random"),
        ({"policies": ("exact",)}, "--batch triplets"),
        ({"lrs": ("1e-3",), "train": {"lr": 1e-2}}, "--lrs and --lr are both given"),
        ({"heads": ("128",), "train": {"embedding_dim": 64}}, "--heads and --embedding-dim are both given"),
        ({"candidate_counts": ("10,20",)}, "--candidate-counts needs --batch triplets"),
    ],
)
def test_what_cannot_be_is_refused_in_the_words_of_the_flags(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        plan_trials(SweepConfig(**{**settings, "train": TrainConfig.of(**settings.get("train", {}))}))
    assert words in str(refused.value)
