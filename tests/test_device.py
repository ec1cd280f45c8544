import logging

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from lib import device
from lib.errors import UserError

CPU = torch.device("cpu")
only_without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@only_without_gpu
def test_a_gpu_that_is_asked_for_and_not_there_is_one_line_with_the_next_step():
    with pytest.raises(UserError, match=r"^a GPU was asked for and cannot be used: .*; --gpus 0 runs on the CPUs$"):
        device.worker_device(use_gpu=True)


def test_without_gpus_the_device_is_the_cpu_in_float32():
    assert device.worker_device(use_gpu=False) == CPU
    assert device.chosen_precision("auto", CPU) == "fp32"
    assert device.chosen_precision("bf16", CPU) == "bf16"


def test_arrays_come_to_the_device_as_they_are():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    np.testing.assert_array_equal(device.to_device(array, CPU).numpy(), array)


def test_a_compiler_that_fails_is_told_once_and_the_model_runs_as_it_is(caplog, monkeypatch):
    def broken(function):
        def call(*_):
            raise TorchDynamoException("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.WARNING):
        double = device.compiled(lambda x: 2 * x, "on", CPU)
        assert [double(1), double(2)] == [2, 4]
    assert [record.message for record in caplog.records] == [
        "not compiled (no compiler here): the model runs as it is, slower"
    ]


def test_an_error_of_the_model_itself_is_not_taken_for_the_compilers(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)

    def wrong(_):
        raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model"):
        device.compiled(wrong, "on", CPU)(1)


@pytest.mark.parametrize(("asked", "pays"), [("off", True), ("auto", True), ("auto", False)])
def test_on_cpus_nothing_is_compiled_unless_asked_for(asked, pays):
    def function(x):
        return x

    assert device.compiled(function, asked, CPU, pays=pays) is function
