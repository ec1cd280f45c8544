"""Margins against NumPy and pytorch-metric-learning, the logits' gradients at the edges, and sums of losses."""

import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ArcFaceLoss, CosFaceLoss, SubCenterArcFaceLoss

from lib.errors import UserError
from lib.training.centre_losses import NormStatistics, cosines, with_margin
from lib.training.centre_store import CentreStore
from lib.training.flag_groups import LossSettings
from lib.training.loss_terms import loss_terms

CPU = torch.device("cpu")
NUM, DIM = 7, 6


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def store(**settings: object) -> CentreStore:
    return CentreStore(LossSettings(**settings), num_identities=NUM, dim=DIM, device=CPU, seed=3)  # type: ignore[arg-type]


def numpy_loss(
    features: np.ndarray, centres: np.ndarray, labels: np.ndarray, settings: LossSettings, norms: np.ndarray
) -> float:
    """Return the loss by the papers' formulas, one image after the other."""
    centres = centres / np.linalg.norm(centres, axis=2, keepdims=True)
    known = labels >= 0
    quality = (norms - norms[known].mean()) / (norms[known].std(ddof=1) + 1e-3) * 0.333
    margin, losses = settings.margin_of_centres, []
    for feature, label, clear in zip(features, labels, np.clip(quality, -1, 1), strict=True):
        if label < 0:
            continue
        logits = (centres @ (feature / np.linalg.norm(feature))).max(axis=1)
        angle = math.acos(logits[label])
        if settings.loss == "cosface":
            logits[label] -= margin
        elif settings.loss == "arcface":
            beyond = math.cos(angle) - margin * math.sin(margin)
            logits[label] = math.cos(angle + margin) if angle + margin <= math.pi else beyond
        else:
            turned = np.clip(angle - margin * clear, 1e-3, math.pi - 1e-3)
            logits[label] = math.cos(turned) - margin - margin * clear
        logits = settings.scale * logits
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])
    return float(np.mean(losses))


@pytest.mark.parametrize("num_sub", [1, 3])
@pytest.mark.parametrize("loss", ["arcface", "cosface", "adaface"])
def test_the_loss_is_that_of_the_papers(loss: str, num_sub: int) -> None:
    centres = store(loss=loss, scale=10.0, sub_centers=num_sub)
    features, labels = 3 * draw(20, DIM), torch.arange(20) % NUM
    labels[4] = -1
    features[5] = -centres.centres_RSD[5, 0]  # an angle beyond pi - margin
    norms = features.norm(dim=1)
    value = centres.loss(features, labels, norms, step=0, lr=None)
    settings = LossSettings(loss=loss, scale=10.0)
    expected = numpy_loss(
        features.double().numpy(),
        centres.centres_RSD.double().numpy(),
        labels.numpy(),
        settings,
        norms.double().numpy(),
    )
    assert value.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "num_sub", "theirs"),
    [
        ("arcface", 1, ArcFaceLoss(NUM, DIM, margin=math.degrees(0.5), scale=16)),
        ("cosface", 1, CosFaceLoss(NUM, DIM, margin=0.35, scale=16)),
        (
            "arcface",
            3,
            SubCenterArcFaceLoss(
                num_classes=NUM, embedding_size=DIM, margin=math.degrees(0.5), scale=16, sub_centers=3
            ),
        ),
    ],
)
def test_loss_and_gradients_equal_those_of_pytorch_metric_learning(
    loss: str, num_sub: int, theirs: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    centres = store(loss=loss, scale=16.0, sub_centers=num_sub)
    with torch.no_grad():
        theirs.W.copy_(centres.centres_RSD.flatten(0, 1).T)
    moved: list[torch.Tensor] = []
    monkeypatch.setattr(centres, "_move", lambda _, __, gradient, ___: moved.append(gradient))
    ours, twin = (draw(20, DIM).requires_grad_() for _ in range(2))
    labels = torch.arange(20) % NUM
    value = centres.loss(ours, labels, step=0, lr=0.1)
    expected = theirs(twin, labels)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, twin.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moved[0].flatten(0, 1).T, theirs.W.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["arcface", "cosface", "adaface"])
def test_gradients_are_finite_on_and_opposite_to_the_centre_in_half_precision(loss: str) -> None:
    centres = store(loss=loss)
    features = torch.cat([centres.centres_RSD[0], -centres.centres_RSD[0]]).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = centres.loss(features, torch.tensor([0, 0]), torch.ones(2), step=0, lr=0.1)
        assert cosines(features, centres.centres_RSD).dtype == torch.float32
    value.backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()
    assert torch.isfinite(centres.centres_RSD).all()


def test_arcface_never_rises_as_the_angle_falls() -> None:
    angles = torch.linspace(0, math.pi, 200)
    assert (with_margin(angles.cos(), "arcface", 0.5).diff() <= 1e-6).all()


def test_adaface_asks_more_of_clear_photos() -> None:
    easy, hard = with_margin(torch.tensor([0.9, 0.9]), "adaface", 0.4, torch.tensor([-1.0, 1.0]))
    assert easy == pytest.approx(math.cos(math.acos(0.9) + 0.4), abs=1e-5)  # an angular margin for unclear photos
    assert hard == pytest.approx(math.cos(max(math.acos(0.9) - 0.4, 1e-3)) - 0.8, abs=1e-5)


def test_norm_statistics_are_running_means_without_unknown_images() -> None:
    statistics = NormStatistics(CPU)
    batches = [torch.tensor([1.0, 2.0, 3.0, 50.0]), torch.tensor([2.0, 4.0, 9.0, 50.0])]
    known = torch.tensor([True, True, True, False])
    for norms in batches:
        quality = statistics.quality(norms, known, learn=True)
    weights = np.array([0.99 * 0.01, 0.01])
    mean = weights @ [2.0, 5.0] / weights.sum()
    deviation = weights @ [1.0, np.std([2, 4, 9], ddof=1)] / weights.sum()
    expected = np.clip((np.array([2, 4, 9]) - mean) / (deviation + 1e-3) * 0.333, -1, 1)
    np.testing.assert_allclose(quality[:3], expected, rtol=1e-4)


def test_a_sum_of_losses_has_weights() -> None:
    terms = loss_terms("0.5*softmax + arcface")
    assert terms.centre == ("arcface", 1.0)
    assert terms.batch == ("softmax", 0.5)
    assert loss_terms("semihard") == (None, ("semihard", 1.0))


@pytest.mark.parametrize("loss", ["arcfac", "", "arcface+", "0*arcface", "-1*softmax", "x*softmax", "nan*arcface"])
def test_a_loss_that_is_none_is_refused_with_the_names(loss: str) -> None:
    with pytest.raises(UserError, match="losses are softmax, semihard, triplet, arcface, cosface, adaface"):
        loss_terms(loss)


@pytest.mark.parametrize("loss", ["arcface+cosface", "softmax+semihard"])
def test_two_losses_of_a_kind_are_refused(loss: str) -> None:
    with pytest.raises(UserError, match="one loss over centres and one over the batch"):
        loss_terms(loss)
