"""Which GPUs a job takes: one flag with one meaning, and one line that says what was chosen."""

import logging

import pytest

from lib import cluster
from lib.cluster import Gpus
from lib.errors import UserError
from lib.recognition.embedder import chosen_gpus


@pytest.mark.parametrize(
    ("there", "asked", "chosen", "line"),
    [
        (2, "auto", 2, "computing on 2 GPUs: --gpus 0 computes on the CPUs"),
        (2, 1, 1, "computing on 1 GPU: --gpus 0 computes on the CPUs"),
        (2, 0, 0, "computing on the CPUs: no GPU is wanted"),
        (0, "auto", 0, "computing on the CPUs: the cluster has no GPU"),
    ],
)
def test_what_is_chosen_is_told_in_one_line(
    there: int, asked: Gpus, chosen: int, line: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster, "num_gpus", lambda: there)
    with caplog.at_level(logging.INFO):
        assert cluster.chosen_gpus(asked) == chosen
    assert caplog.messages == [line]


def test_more_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "num_gpus", lambda: 2)
    with pytest.raises(UserError, match="--gpus is 3, but the cluster has 2"):
        cluster.chosen_gpus(3)


def test_an_onnx_model_that_can_use_no_gpu_leaves_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster, "num_gpus", lambda: 2)
    with caplog.at_level(logging.INFO):
        assert chosen_gpus("/models/a.onnx", "auto") == 0
        assert chosen_gpus("/models/a", "auto") == 2
    assert caplog.messages[0] == "/models/a.onnx runs on the CPUs: this ONNX Runtime has no GPU support"
