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


def test_a_module_that_cannot_be_compiled_runs_as_it_is(caplog, monkeypatch):
    def broken(function, **_):
        def call(*_):
            raise TorchDynamoException("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    expected = module(torch.ones(1, 3))
    for parts in ((), list(module)):
        with caplog.at_level(logging.WARNING):
            assert not device.compile_module(module, "on", CPU, lambda: module(torch.ones(1, 3)), parts=parts)
        assert caplog.messages == ["not compiled (no compiler here): the model runs as it is, slower"]
        caplog.clear()
        torch.testing.assert_close(module(torch.ones(1, 3)), expected)


@pytest.mark.parametrize(("asked", "pays"), [("off", True), ("auto", True)])
def test_a_module_on_a_cpu_is_compiled_only_where_that_is_asked_for(asked, pays):
    module = torch.nn.Linear(3, 2)
    assert not device.compile_module(module, asked, CPU, lambda: 1 / 0, pays=pays)
    assert module._compiled_call_impl is None


def test_the_largest_batch_fills_the_memory_and_no_more():
    fixed, each = 5_000, 70
    peaks = [fixed + each * 16, fixed + each * 48]
    largest = device.fitting(peaks, 100_000)
    assert fixed + each * largest <= 100_000 < fixed + each * (largest + 1)
    assert device.fitting(peaks, 3_000) == 0
    assert device.largest_batch(lambda _: 1 / 0, CPU, reserved=0) is None


def test_products_are_exact_where_distances_are_computed():
    torch.set_float32_matmul_precision("high")
    try:
        with device.exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
def test_what_goes_to_a_gpu_and_comes_back_is_the_same():
    gpu = torch.device("cuda", 0)
    upload = device.Upload(gpu)
    array = upload.empty(64, 240, 240, 3)
    array[:] = np.random.default_rng(0).integers(0, 256, array.shape, np.uint8)
    kept = array.copy()
    np.testing.assert_array_equal(device.Fetched(upload(array).tensor()).numpy(), kept)


@pytest.mark.gpu
def test_the_largest_batch_fits_into_a_gpu():
    gpu = torch.device("cuda", 0)
    each = 100_000_000

    def run(num_images):
        torch.empty(num_images * each, dtype=torch.uint8, device=gpu).zero_()

    largest = device.largest_batch(run, gpu, reserved=10 * each)
    run(largest)
    assert largest * each > 0.7 * torch.cuda.mem_get_info(gpu)[1] - 10 * each
