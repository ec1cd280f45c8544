"""The learning rate's curve, and when negatives get harder or easier."""

import pytest

from lib.training.schedule import Phase, first_phase, learning_rate, next_phase, usual_lr

RANDOM, HARD = Phase(negatives="random", first_epoch=1), Phase(negatives="hard", first_epoch=4)


def test_the_rate_rises_to_the_highest_and_falls_to_zero() -> None:
    rates = [learning_rate(2.0, share / 1000, 0.1) for share in range(1001)]
    assert rates[0] == 0.0
    assert rates[100] == max(rates) == 2.0
    assert rates[550] == pytest.approx(1.0)
    assert rates[1000] == pytest.approx(0.0)
    assert rates[:101] == sorted(rates[:101])
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_without_a_warm_up_it_begins_at_the_highest() -> None:
    assert learning_rate(3e-4, 0.0, 0.0) == 3e-4


@pytest.mark.parametrize(("policy", "first"), [("auto", "random"), ("hard", "hard"), ("random", "random")])
def test_only_auto_begins_with_something_else(policy: str, first: str) -> None:
    assert first_phase(policy).negatives == first


def step(phase: Phase, policy: str, losses: list[float], variances: list[float]) -> tuple[Phase, str]:
    return next_phase(phase, policy=policy, epoch=7, losses=losses, variances=variances, patience=2)


def test_auto_gets_harder_once_the_loss_no_longer_falls() -> None:
    assert step(RANDOM, "auto", [0.3, 0.2, 0.1], [1.0])[0] == RANDOM
    phase, note = step(RANDOM, "auto", [0.3, 0.1, 0.1, 0.1], [1.0])
    assert phase == Phase(negatives="hard", first_epoch=8)
    assert "hard negatives from now on" in note


def test_random_that_was_asked_for_stays() -> None:
    assert step(RANDOM, "random", [0.1, 0.1, 0.1, 0.1], [1.0, 0.0]) == (RANDOM, "")


@pytest.mark.parametrize("policy", ["auto", "hard"])
def test_a_collapse_makes_negatives_semi_hard(policy: str) -> None:
    phase, note = step(HARD, policy, [0.1], [0.9, 0.8, 0.01])
    assert phase == Phase(negatives="semihard", first_epoch=8)
    assert "collapsed" in note
    assert step(HARD, policy, [0.1], [0.9, 0.8, 0.5]) == (HARD, "")


@pytest.mark.parametrize(
    ("is_pretrained", "has_batch_norm", "lr"),
    [(False, False, 9e-4), (False, True, 9e-4), (True, True, 9e-4), (True, False, 1e-4)],
)
def test_pretrained_backbones_without_batch_norm_have_a_lower_rate(
    is_pretrained: bool, has_batch_norm: bool, lr: float
) -> None:
    assert usual_lr(is_pretrained=is_pretrained, has_batch_norm=has_batch_norm) == lr
